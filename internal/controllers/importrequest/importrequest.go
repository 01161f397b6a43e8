// Package importrequest is the controller of ContentLibraryItemImportRequests: each makes one library item, and says
// how far that is in VMware's conditions.
//
// The item outlives the request. It is set up in the server's manager; the bytes are fetched by a host's agent
// (internal/controllers/libraryitem). What can go wrong: the URL or checksum makes no sense, the library does not
// allow imports, an item of that name exists; a condition says which, and the request can be changed until its item
// is there.
package importrequest

import (
	"context"
	"crypto/sha1" // a name; nothing is secured by it
	"encoding/hex"
	"fmt"
	"net/url"
	"path"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// RequestAnnotation of an item is the name of the request that made it.
const RequestAnnotation = "atoll.dev/import-request"

// retryTarget is how often a library that does not fit is looked at again.
const retryTarget = 10 * time.Second

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("importrequest").For(&api.ContentLibraryItemImportRequest{}).
		Watches(&api.ContentLibraryItem{}, handler.EnqueueRequestsFromMapFunc(requestOf)).
		Complete(&reconciler{client: mgr.GetClient(), now: time.Now})
	if err != nil {
		return fmt.Errorf("import request controller: %w", err)
	}
	return nil
}

func requestOf(_ context.Context, obj client.Object) []reconcile.Request {
	name := obj.GetAnnotations()[RequestAnnotation]
	if name == "" {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: obj.GetNamespace(), Name: name}}}
}

type reconciler struct {
	client client.Client
	now    func() time.Time
}

// Reconcile implements reconcile.Reconciler.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var request api.ContentLibraryItemImportRequest
	if err := r.client.Get(ctx, req.NamespacedName, &request); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if request.DeletionTimestamp != nil {
		return ctrl.Result{}, nil
	}
	if done := request.Status.CompletionTime; done != nil {
		return r.expire(ctx, &request, done.Time)
	}
	was := request.DeepCopy()
	if request.Status.StartTime == nil {
		now := metav1.NewTime(r.now())
		request.Status.StartTime = &now
	}
	after, err := r.advance(ctx, &request)
	if err != nil {
		return ctrl.Result{}, err
	}
	if !equality.Semantic.DeepEqual(was.Status, request.Status) {
		if err := r.client.Status().Patch(ctx, &request, client.MergeFrom(was)); err != nil {
			return ctrl.Result{}, fmt.Errorf("writing the status of import request %s: %w", req, err)
		}
	}
	return ctrl.Result{RequeueAfter: after}, nil
}

// expire deletes a request that has been complete for long enough.
func (r *reconciler) expire(ctx context.Context, request *api.ContentLibraryItemImportRequest, done time.Time) (ctrl.Result, error) {
	ttl := request.Spec.TTLSecondsAfterFinished
	if ttl == nil {
		return ctrl.Result{}, nil
	}
	if left := done.Add(time.Duration(*ttl) * time.Second).Sub(r.now()); left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(r.client.Delete(ctx, request))
}

// set sets a condition.
func set(request *api.ContentLibraryItemImportRequest, kind string, ok bool, reason, message string) {
	c := metav1.Condition{Type: kind, Status: metav1.ConditionTrue, Reason: "True", ObservedGeneration: request.Generation}
	if !ok {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, reason, message
	}
	meta.SetStatusCondition(&request.Status.Conditions, c)
}

// advance does the next steps of a request.
func (r *reconciler) advance(ctx context.Context, request *api.ContentLibraryItemImportRequest) (time.Duration, error) {
	incomplete := func(reason, message string) { set(request, api.ImportComplete, false, reason, message) }
	if reason, message := source(request.Spec.Source); reason != "" {
		set(request, api.ImportSourceValid, false, reason, message)
		incomplete(reason, message)
		return 0, nil
	}
	set(request, api.ImportSourceValid, true, "", "")
	if request.Status.ItemRef == nil {
		reason, message, err := r.target(ctx, request)
		if err != nil {
			return 0, err
		}
		if reason != "" {
			set(request, api.ImportTargetValid, false, reason, message)
			incomplete(reason, message)
			return retryTarget, nil
		}
		set(request, api.ImportTargetValid, true, "", "")
		err = r.create(ctx, request)
		if apierrors.IsForbidden(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) { // such as by a quota
			set(request, api.ImportItemCreated, false, api.ImportTargetItemCreationFailure, err.Error())
			incomplete(api.ImportTargetItemCreationFailure, err.Error())
			return retryTarget, nil
		}
		if err != nil {
			return 0, err
		}
	}
	var item api.ContentLibraryItem
	err := r.client.Get(ctx, types.NamespacedName{Namespace: request.Namespace, Name: request.Status.ItemRef.Name}, &item)
	switch {
	case apierrors.IsNotFound(err):
		message := fmt.Sprintf("item %s is not there (any more)", request.Status.ItemRef.Name)
		set(request, api.ImportItemReady, false, api.ImportTargetItemUnavailable, message)
		incomplete(api.ImportTargetItemUnavailable, message)
		return time.Second, nil
	case err != nil:
		return 0, fmt.Errorf("reading item %s: %w", request.Status.ItemRef.Name, err)
	}
	r.follow(request, &item)
	return 0, nil
}

// source checks where the file is.
func source(s api.ContentLibraryItemImportRequestSource) (reason, message string) {
	u, err := url.Parse(s.URL)
	switch {
	case err != nil:
		return api.ImportSourceURLInvalid, fmt.Sprintf("spec.source.url %q: %v", s.URL, err)
	case u.Scheme != "http" && u.Scheme != "https":
		return api.ImportSourceURLSchemeInvalid, fmt.Sprintf("spec.source.url %q: the scheme must be http or https", s.URL)
	case u.Host == "":
		return api.ImportSourceURLHostInvalid, fmt.Sprintf("spec.source.url %q has no host", s.URL)
	case s.Checksum != nil:
		if _, err := hex.DecodeString(s.Checksum.Value); err != nil || s.Checksum.Value == "" {
			return api.ImportSourceChecksumInvalid, fmt.Sprintf("spec.source.checksum.value %q is not hexadecimal", s.Checksum.Value)
		}
	}
	return "", ""
}

// target checks where the item goes.
func (r *reconciler) target(ctx context.Context, request *api.ContentLibraryItemImportRequest) (reason, message string, err error) {
	ref := request.Spec.Target.Library
	if ref.Kind != "" && ref.Kind != "ContentLibrary" {
		return api.ImportTargetLibraryInvalid, fmt.Sprintf("spec.target.library.kind %q must be ContentLibrary", ref.Kind), nil
	}
	var library api.ContentLibrary
	err = r.client.Get(ctx, types.NamespacedName{Namespace: request.Namespace, Name: ref.Name}, &library)
	switch {
	case apierrors.IsNotFound(err):
		return api.ImportTargetLibraryInvalid, fmt.Sprintf("there is no ContentLibrary %q in namespace %s; each namespace has one that is called %q",
			ref.Name, request.Namespace, api.DefaultLibrary), nil
	case err != nil:
		return "", "", fmt.Errorf("reading library %s: %w", ref.Name, err)
	case library.Spec.Registry != nil:
		return api.ImportTargetLibraryInvalid, fmt.Sprintf("ContentLibrary %q is a project of the registry, whose items are what is pushed there; name another library in spec.target.library.name, such as %q, or push the disk with `atoll image push`",
			ref.Name, api.DefaultLibrary), nil
	case !library.Spec.AllowImport || !library.Spec.Writable:
		return api.ImportTargetLibraryInvalid, fmt.Sprintf("ContentLibrary %q does not allow imports; its spec.writable and spec.allowImport must be true", ref.Name), nil
	}
	var list api.ContentLibraryItemList
	if err := r.client.List(ctx, &list, client.InNamespace(request.Namespace)); err != nil {
		return "", "", fmt.Errorf("listing library items: %w", err)
	}
	for _, i := range list.Items {
		if i.Spec.Library == ref.Name && i.Spec.Name == displayName(request) && i.Annotations[RequestAnnotation] != request.Name {
			return api.ImportTargetItemInvalid, fmt.Sprintf("library %q has an item %q already (%s); choose another spec.target.item.name", ref.Name, i.Spec.Name, i.Name), nil
		}
	}
	return "", "", nil
}

// displayName is the name that people see.
func displayName(request *api.ContentLibraryItemImportRequest) string {
	for _, name := range []string{request.Spec.Target.Item.Name, request.Spec.Target.Item.ItemName} {
		if name != "" {
			return name
		}
	}
	if u, err := url.Parse(request.Spec.Source.URL); err == nil {
		if base := path.Base(u.Path); base != "/" && base != "." {
			return strings.TrimSuffix(base, path.Ext(base))
		}
	}
	return request.Name
}

// create makes the item, unless an earlier call has.
func (r *reconciler) create(ctx context.Context, request *api.ContentLibraryItemImportRequest) error {
	sum := sha1.Sum([]byte(request.UID))
	s := request.Spec.Source
	item := &api.ContentLibraryItem{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: request.Namespace, Name: "clitem-" + hex.EncodeToString(sum[:])[:17],
			Annotations: map[string]string{RequestAnnotation: request.Name},
		},
		Spec: api.ContentLibraryItemSpec{
			Library: request.Spec.Target.Library.Name, Name: displayName(request), Description: request.Spec.Target.Item.Description,
			Source: &api.ItemSource{HTTP: &api.HTTPSource{URL: s.URL, Checksum: s.Checksum, SSLCertificate: s.SSLCertificate}},
		},
	}
	if s.SSLCertificate == "" {
		item.Spec.Source.HTTP.SSLCertificate = s.PEM
	}
	if err := r.client.Create(ctx, item); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making the item of import request %s: %w", request.Name, err)
	}
	request.Status.ItemRef = &api.LocalObjectRef{APIVersion: api.GroupVersion().String(), Kind: "ContentLibraryItem", Name: item.Name}
	set(request, api.ImportItemCreated, true, "", "")
	return nil
}

// follow says how far the item is.
func (r *reconciler) follow(request *api.ContentLibraryItemImportRequest, item *api.ContentLibraryItem) {
	file := api.FileTransferStatus{Name: displayName(request), Status: "Waiting"}
	reason, message := api.ImportUploadInProgress, "the file is being fetched"
	c := meta.FindStatusCondition(item.Status.Conditions, api.ReadyCondition)
	if p := item.Status.Progress; p != nil {
		file.Status, file.BytesTransferred = "Transferring", &p.BytesDone
		if p.BytesTotal > 0 {
			file.Size = &p.BytesTotal
		}
		if p.Phase != api.ItemTransferring {
			file.Status, file.BytesTransferred, file.Size = "Validating", nil, nil
		}
	}
	if c != nil && c.Status != metav1.ConditionTrue {
		switch c.Reason {
		case api.ItemChecksum, api.ItemSourceBad, api.ItemContentBad, api.ItemRetrying:
			file.Status, file.ErrorMessage = "Error", c.Message
			reason, message = api.ImportUploadFailure, c.Reason+": "+c.Message
		}
	}
	if item.Status.Ready {
		size := item.Status.SizeInBytes.Value()
		file.Status, file.Size, file.BytesTransferred = "Ready", &size, &size
		now := metav1.NewTime(r.now())
		request.Status.CompletionTime = &now
		for _, kind := range []string{api.ImportUploaded, api.ImportItemReady, api.ImportComplete} {
			set(request, kind, true, "", "")
		}
	} else {
		set(request, api.ImportUploaded, false, reason, message)
		set(request, api.ImportItemReady, false, api.ImportTargetItemNotReady, message)
		set(request, api.ImportComplete, false, reason, message)
	}
	request.Status.FileUploadStatus = &api.ContentLibraryItemFileUploadStatus{SessionUUID: item.UID, FileUploads: []api.FileTransferStatus{file}}
}
