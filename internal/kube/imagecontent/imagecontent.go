// Package imagecontent serves the bytes of library items in the API server: uploads and exports, see
// api/content/v1alpha1.
//
// Requests have passed the API server's own authentication, RBAC and audit when they get here. The bytes are in the
// library of this host; the agent, which brings items in, sees an upload in the same directory. internal/kube/apiserver
// calls Install.
//
// What can go wrong: an item is not one to be uploaded, is complete, is not complete yet, or its content is on another
// host; the client is told in a Status.
package imagecontent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	content "atoll.dev/atoll/api/content/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/storage/library"
)

// Config of the server.
type Config struct {
	// Server gets the paths; it must not have been prepared to run yet.
	Server *genericapiserver.GenericAPIServer
	// Loopback is the API server's client for itself.
	Loopback *rest.Config
	Library  *library.Library
	Logger   *slog.Logger
}

// handler answers the requests.
type handler struct {
	objects dynamic.Interface
	library *library.Library
	codecs  serializer.CodecFactory
	log     *slog.Logger
	// exporting bounds how many images are converted at once, which takes processors and room.
	exporting chan struct{}
}

// maxExporting is how many images are converted at once. Who asks for more waits.
const maxExporting = 2

func gv() schema.GroupVersion {
	return schema.GroupVersion{Group: content.Group, Version: content.Version}
}

// Install adds the paths to the server.
func Install(cfg Config) error {
	plain := rest.CopyConfig(cfg.Loopback)
	plain.ContentType = ""
	objects, err := dynamic.NewForConfig(plain)
	if err != nil {
		return fmt.Errorf("image content: %w", err)
	}
	h := newHandler(objects, cfg.Library, cfg.Logger)
	root := "/apis/" + content.Group
	cfg.Server.Handler.NonGoRestfulMux.UnlistedHandlePrefix(root+"/"+content.Version+"/", h)
	cfg.Server.Handler.NonGoRestfulMux.UnlistedHandle(root, http.HandlerFunc(h.group))
	cfg.Server.Handler.NonGoRestfulMux.UnlistedHandle(root+"/"+content.Version, http.HandlerFunc(h.resources))
	return nil
}

func newHandler(objects dynamic.Interface, l *library.Library, log *slog.Logger) *handler {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	scheme.AddUnversionedTypes(schema.GroupVersion{Version: "v1"}, &metav1.Status{}, &metav1.APIGroup{}, &metav1.APIResourceList{})
	return &handler{objects: objects, library: l, codecs: serializer.NewCodecFactory(scheme), log: log, exporting: make(chan struct{}, maxExporting)}
}

// LongRunning makes uploads and exports requests that may take long, in the eyes of an API server. It must be called
// before the server is made.
func LongRunning(cfg *genericapiserver.Config) {
	base := cfg.LongRunningFunc
	cfg.LongRunningFunc = func(r *http.Request, info *apirequest.RequestInfo) bool {
		return info != nil && info.IsResourceRequest && info.APIGroup == content.Group && info.Subresource != "" || base != nil && base(r, info)
	}
}

func (h *handler) group(w http.ResponseWriter, r *http.Request) {
	version := metav1.GroupVersionForDiscovery{GroupVersion: gv().String(), Version: content.Version}
	h.answer(w, r, &metav1.APIGroup{
		TypeMeta: metav1.TypeMeta{Kind: "APIGroup", APIVersion: "v1"},
		Name:     content.Group, Versions: []metav1.GroupVersionForDiscovery{version}, PreferredVersion: version,
	})
}

// resources lists none: to kubectl "contentlibraryitems/upload" is a resource "contentlibraryitems", too, which it would
// take for the items.
func (h *handler) resources(w http.ResponseWriter, r *http.Request) {
	h.answer(w, r, &metav1.APIResourceList{
		TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: gv().String(), APIResources: []metav1.APIResource{},
	})
}

func (h *handler) answer(w http.ResponseWriter, r *http.Request, object runtime.Object) {
	responsewriters.WriteObjectNegotiated(h.codecs, negotiation.DefaultEndpointRestrictions, schema.GroupVersion{Version: "v1"}, w, r, http.StatusOK, object, false)
}

func (h *handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	responsewriters.ErrorNegotiated(err, h.codecs, schema.GroupVersion{Version: "v1"}, w, r)
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	info, ok := apirequest.RequestInfoFrom(r.Context())
	// The path is looked at again, so that what RBAC has allowed is what is done.
	if !ok || !info.IsResourceRequest || info.APIGroup != content.Group || info.Name == "" || r.URL.Path != content.Path(info.Namespace, info.Name, info.Subresource) {
		h.fail(w, r, apierrors.NewNotFound(gv().WithResource(content.Items).GroupResource(), strings.TrimPrefix(r.URL.Path, "/apis/")))
		return
	}
	item, err := h.item(r, info.Namespace, info.Name)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	switch {
	case info.Subresource == content.Upload && r.Method == http.MethodGet:
		h.uploaded(w, r, item, http.StatusOK)
	case info.Subresource == content.Upload && r.Method == http.MethodPut:
		h.upload(w, r, item)
	case info.Subresource == content.Content && r.Method == http.MethodGet:
		h.content(w, r, item)
	default:
		h.fail(w, r, apierrors.NewMethodNotSupported(gv().WithResource(info.Resource+"/"+info.Subresource).GroupResource(), r.Method))
	}
}

// item reads an item.
func (h *handler) item(r *http.Request, namespace, name string) (*api.ContentLibraryItem, error) {
	var source dynamic.ResourceInterface = h.objects.Resource(api.ClusterItems())
	if namespace != "" {
		source = h.objects.Resource(api.Items()).Namespace(namespace)
	}
	obj, err := source.Get(r.Context(), name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	var item api.ContentLibraryItem // both kinds are made alike
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &item); err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	return &item, nil
}

// uploaded says how much of an upload is here.
func (h *handler) uploaded(w http.ResponseWriter, r *http.Request, item *api.ContentLibraryItem, code int) {
	out := content.Uploaded{Complete: item.Status.Ready}
	if !out.Complete {
		var err error
		if out.Received, out.Total, err = h.library.Received(string(item.UID)); err != nil {
			h.fail(w, r, apierrors.NewInternalError(err))
			return
		}
		out.Complete = out.Total > 0 && out.Received == out.Total
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(out) // nobody reads it if this fails
}

// upload takes bytes.
func (h *handler) upload(w http.ResponseWriter, r *http.Request, item *api.ContentLibraryItem) {
	if item.Spec.Source == nil || item.Spec.Source.Upload == nil {
		h.fail(w, r, apierrors.NewBadRequest(fmt.Sprintf("item %s is not one to be uploaded; its spec.source.upload is not set", item.Name)))
		return
	}
	first, total, err := contentRange(r)
	if err != nil {
		h.fail(w, r, apierrors.NewBadRequest(err.Error()))
		return
	}
	_, err = h.library.Receive(r.Context(), string(item.UID), item.Spec.Source.Upload.FileName, first, total, r.Body)
	switch {
	case err == nil:
		h.uploaded(w, r, item, http.StatusOK)
	case errors.Is(err, library.ErrOffset):
		h.uploaded(w, r, item, http.StatusConflict)
	case errors.Is(err, library.ErrSource):
		h.fail(w, r, apierrors.NewBadRequest(err.Error()))
	case errors.Is(err, library.ErrFull):
		h.fail(w, r, apierrors.NewGenericServerResponse(http.StatusInsufficientStorage, "update", gv().WithResource(content.Items).GroupResource(), item.Name, err.Error(), 0, true))
	default:
		h.log.Warn("receiving an image", "item", item.Name, "error", err)
		h.fail(w, r, apierrors.NewServiceUnavailable(err.Error()))
	}
}

// contentRange reads what part of the file a request has.
func contentRange(r *http.Request) (first, total int64, err error) {
	text := r.Header.Get("Content-Range")
	if text == "" {
		if r.ContentLength <= 0 {
			return 0, 0, errors.New("the request has neither Content-Range nor Content-Length")
		}
		return 0, r.ContentLength, nil
	}
	var last int64
	if n, err := fmt.Sscanf(text, "bytes %d-%d/%d", &first, &last, &total); err != nil || n != 3 || first < 0 || last < first || total <= last {
		return 0, 0, fmt.Errorf("Content-Range %.80q must be bytes FIRST-LAST/TOTAL", text)
	}
	if r.ContentLength >= 0 && r.ContentLength != last-first+1 {
		return 0, 0, fmt.Errorf("Content-Range %.80q and Content-Length %s do not fit together", text, strconv.FormatInt(r.ContentLength, 10))
	}
	return first, total, nil
}
