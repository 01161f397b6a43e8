// Package subresources serves the consoles of virtual machines in the API server, see api/subresources/v1alpha1.
//
// Requests have passed the API server's own authentication, RBAC and audit when they get here: the paths are those of a
// resource and its subresources. A stream is an exec of machinev1.CommandStream in the machine's pod, made by the
// API server itself, so it takes the way that every exec takes, to the kubelet of the machine's host and on to its
// shim, and no further port or credential is needed on any host; see docs/decisions/0015-consoles.md.
//
// Web consoles are open to whoever has the ticket of a VirtualMachineWebConsoleRequest. A ticket is good once, until
// it expires; the request's controller (internal/controllers/vmconsole) makes it and keeps its hash only.
//
// internal/kube/apiserver calls Install. What can go wrong: the machine does not run or its host does not answer, which
// the client is told in a Status, or in the websocket's closing message.
package subresources

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"

	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
)

// Config of the streams.
type Config struct {
	// Server gets the paths; it must not have been prepared to run yet.
	Server *genericapiserver.GenericAPIServer
	// Loopback is the API server's client for itself.
	Loopback *rest.Config
	Logger   *slog.Logger
}

// streams answers the requests.
type streams struct {
	config  *rest.Config
	client  kubernetes.Interface
	objects dynamic.Interface
	codecs  serializer.CodecFactory
	log     *slog.Logger
	// looking bounds how many tickets are looked up at once.
	looking chan struct{}
	// exec runs a command in a pod with the streams of a connection; tests replace it.
	exec func(ctx context.Context, namespace, pod string, kind machinev1.StreamKind, conn io.ReadWriter) error
}

// maxLooking is how many tickets are looked up at once. Who asks for more is told to come again.
const maxLooking = 16

// gv is the group and version.
func gv() schema.GroupVersion {
	return schema.GroupVersion{Group: subresources.Group, Version: subresources.Version}
}

// Install adds the paths to the server.
func Install(cfg Config) error {
	s, err := newStreams(cfg)
	if err != nil {
		return fmt.Errorf("consoles: %w", err)
	}
	mux := cfg.Server.Handler.NonGoRestfulMux
	root := "/apis/" + subresources.Group
	mux.UnlistedHandle(root, http.HandlerFunc(s.group))
	mux.UnlistedHandle(root+"/"+subresources.Version, http.HandlerFunc(s.resources))
	mux.UnlistedHandlePrefix(root+"/"+subresources.Version+"/", http.HandlerFunc(s.stream))
	mux.UnlistedHandle(subresources.WebConsolePage, http.HandlerFunc(s.page))
	mux.UnlistedHandle(subresources.WebConsoleStream, http.HandlerFunc(s.ticket))
	if m := cfg.Server.AggregatedDiscoveryGroupManager; m != nil {
		m.AddGroupVersion(subresources.Group, discovery())
	}
	return nil
}

func newStreams(cfg Config) (*streams, error) {
	client, err := kubernetes.NewForConfig(cfg.Loopback)
	if err != nil {
		return nil, err
	}
	plain := rest.CopyConfig(cfg.Loopback)
	plain.ContentType = ""
	objects, err := dynamic.NewForConfig(plain)
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	scheme.AddUnversionedTypes(schema.GroupVersion{Version: "v1"}, &metav1.Status{}, &metav1.APIGroup{}, &metav1.APIResourceList{})
	s := &streams{
		config: cfg.Loopback, client: client, objects: objects, codecs: serializer.NewCodecFactory(scheme), log: cfg.Logger,
		looking: make(chan struct{}, maxLooking),
	}
	s.exec = s.execInPod
	return s, nil
}

// LongRunning makes the streams requests that may take long, in the eyes of an API server. It must be called before
// the server is made.
func LongRunning(cfg *genericapiserver.Config) {
	base := cfg.LongRunningFunc
	cfg.LongRunningFunc = func(r *http.Request, info *apirequest.RequestInfo) bool {
		return info != nil && info.IsResourceRequest && info.APIGroup == subresources.Group && info.Subresource != "" ||
			r.URL.Path == subresources.WebConsoleStream || base != nil && base(r, info)
	}
}

// kinds are the streams by their subresource.
func kinds() map[string]machinev1.StreamKind {
	return map[string]machinev1.StreamKind{subresources.Console: machinev1.StreamSerial, subresources.VNC: machinev1.StreamVNC}
}

// discovery lists no resource, see resources.
func discovery() apidiscoveryv2.APIVersionDiscovery {
	return apidiscoveryv2.APIVersionDiscovery{Version: subresources.Version, Freshness: apidiscoveryv2.DiscoveryFreshnessCurrent}
}

func (s *streams) group(w http.ResponseWriter, r *http.Request) {
	version := metav1.GroupVersionForDiscovery{GroupVersion: gv().String(), Version: subresources.Version}
	s.answer(w, r, &metav1.APIGroup{
		TypeMeta: metav1.TypeMeta{Kind: "APIGroup", APIVersion: "v1"},
		Name:     subresources.Group, Versions: []metav1.GroupVersionForDiscovery{version}, PreferredVersion: version,
	})
}

// resources lists none: to kubectl "virtualmachines/console" is a resource "virtualmachines", too, which it would take
// for the virtual machines.
func (s *streams) resources(w http.ResponseWriter, r *http.Request) {
	s.answer(w, r, &metav1.APIResourceList{
		TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: gv().String(), APIResources: []metav1.APIResource{},
	})
}

func (s *streams) answer(w http.ResponseWriter, r *http.Request, object runtime.Object) {
	responsewriters.WriteObjectNegotiated(s.codecs, negotiated(), schema.GroupVersion{Version: "v1"}, w, r, http.StatusOK, object, false)
}

func (s *streams) fail(w http.ResponseWriter, r *http.Request, err error) {
	responsewriters.ErrorNegotiated(err, s.codecs, schema.GroupVersion{Version: "v1"}, w, r)
}

// stream opens a console of a virtual machine.
func (s *streams) stream(w http.ResponseWriter, r *http.Request) {
	info, ok := apirequest.RequestInfoFrom(r.Context())
	// The path is looked at again, so that what RBAC has allowed is what is done.
	if !ok || !info.IsResourceRequest || info.APIGroup != subresources.Group || info.Resource != subresources.Resource ||
		info.Name == "" || len(info.Parts) != 3 || r.URL.Path != subresources.Path(info.Namespace, info.Name, info.Subresource) {
		s.fail(w, r, apierrors.NewNotFound(gv().WithResource(subresources.Resource).GroupResource(), strings.TrimPrefix(r.URL.Path, "/apis/")))
		return
	}
	kind, ok := kinds()[info.Subresource]
	if !ok {
		s.fail(w, r, apierrors.NewNotFound(gv().WithResource(subresources.Resource).GroupResource(), info.Name+"/"+info.Subresource))
		return
	}
	if r.Method != http.MethodGet {
		s.fail(w, r, apierrors.NewMethodNotSupported(gv().WithResource(subresources.Resource).GroupResource(), r.Method))
		return
	}
	pod, err := s.pod(r.Context(), info.Namespace, info.Name)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.serve(w, r, pod, kind)
}

// pod is the pod of a virtual machine that runs. A pod that only has its name is none.
func (s *streams) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	resource := gv().WithResource(subresources.Resource).GroupResource()
	pod, err := s.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, err
	}
	ours := err == nil && pod.Spec.RuntimeClassName != nil && *pod.Spec.RuntimeClassName == machinev1.RuntimeClass && pod.Labels[machinev1.UIDLabel] != ""
	if owner := metav1.GetControllerOf(pod); !ours || owner == nil || owner.Kind != "VirtualMachine" || string(owner.UID) != pod.Labels[machinev1.UIDLabel] {
		return nil, apierrors.NewConflict(resource, name, fmt.Errorf("there is no virtual machine of this name that is powered on"))
	}
	if pod.Status.Phase != corev1.PodRunning {
		return nil, apierrors.NewConflict(resource, name, fmt.Errorf("the virtual machine is not running yet (%s)", strings.ToLower(string(pod.Status.Phase))))
	}
	return pod, nil
}
