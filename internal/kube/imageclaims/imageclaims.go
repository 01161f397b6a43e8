// Package imageclaims finds the image that a PersistentVolumeClaim's volume is to be a copy of.
//
// The claim's annotation names a VirtualMachineImage of its namespace or a ClusterVirtualMachineImage; that names the
// library item, whose status says what disks there are. Nothing is kept. The agent's storage part is the caller. What
// can go wrong: something is not there, or not ready; errors name it and the way out. An API server that does not
// answer is datastore.ErrUnavailable.
package imageclaims

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Image is what a claim names.
type Image struct {
	// Name is as in the annotation, Item the uid of the library item.
	Name, Item string
	Disk       int
	Size       int64
	// Host is the node that has the content.
	Host string
}

// Reader reads claims and images.
type Reader struct {
	client  kubernetes.Interface
	objects dynamic.Interface
}

// New makes a reader. It does not talk to the API server.
func New(config *rest.Config) (*Reader, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reading images of claims: %w", err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reading images of claims: %w", err)
	}
	return &Reader{client: client, objects: objects}, nil
}

// outage is datastore.ErrUnavailable without its text.
type outage struct{ error }

func (o outage) Unwrap() error      { return o.error }
func (outage) Is(target error) bool { return target == datastore.ErrUnavailable }
func unanswered(err error) error    { return outage{err} }
func gvr(r string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "vmoperator.vmware.com", Version: "v1alpha5", Resource: r}
}

// Claim returns the image that a claim names, or nil.
func (r *Reader) Claim(ctx context.Context, namespace, name string) (*Image, error) {
	claim, err := r.client.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("reading which image claim %s/%s names: %w", namespace, name, unanswered(err))
	}
	text, ok := claim.Annotations[api.ImageAnnotation]
	if !ok {
		return nil, nil
	}
	item, err := r.item(ctx, claim, text)
	if err != nil {
		return nil, err
	}
	n := 0
	if text, ok := claim.Annotations[api.ImageDiskAnnotation]; ok {
		if n, err = strconv.Atoi(text); err != nil || n < 0 {
			return nil, fmt.Errorf("annotation %q of claim %s/%s is %q, and must be the number of a disk, from 0", api.ImageDiskAnnotation, namespace, name, text)
		}
	}
	if n >= len(item.Status.Disks) {
		return nil, fmt.Errorf("claim %s/%s wants disk %d of image %s, which has %d disks", namespace, name, n, text, len(item.Status.Disks))
	}
	return &Image{Name: text, Item: string(item.UID), Disk: n, Size: item.Status.Disks[n].Capacity.Value(), Host: item.Status.Host}, nil
}

// item finds the library item of an image.
func (r *Reader) item(ctx context.Context, claim *corev1.PersistentVolumeClaim, text string) (*api.ContentLibraryItem, error) {
	kind, name, ok := strings.Cut(text, "/")
	var images, items dynamic.ResourceInterface
	switch {
	case ok && kind == "VirtualMachineImage" && name != "":
		images, items = r.objects.Resource(gvr("virtualmachineimages")).Namespace(claim.Namespace), r.objects.Resource(api.Items()).Namespace(claim.Namespace)
	case ok && kind == "ClusterVirtualMachineImage" && name != "":
		images, items = r.objects.Resource(gvr("clustervirtualmachineimages")), r.objects.Resource(api.ClusterItems())
	default:
		return nil, fmt.Errorf("annotation %q of claim %s/%s is %q, and must be VirtualMachineImage/NAME or ClusterVirtualMachineImage/NAME",
			api.ImageAnnotation, claim.Namespace, claim.Name, text)
	}
	image, err := images.Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("there is no %s (annotation %q of claim %s/%s); `atoll image ls --vm` lists what there is",
			text, api.ImageAnnotation, claim.Namespace, claim.Name)
	case err != nil:
		return nil, fmt.Errorf("reading image %s: %w", text, unanswered(err))
	}
	item, _, err := unstructured.NestedString(image.Object, "spec", "providerRef", "name")
	if err != nil || item == "" {
		return nil, fmt.Errorf("image %s has no spec.providerRef, so that nobody knows its content", text)
	}
	obj, err := items.Get(ctx, item, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("image %s: its library item %s is gone", text, item)
	case err != nil:
		return nil, fmt.Errorf("reading library item %s of image %s: %w", item, text, unanswered(err))
	}
	var out api.ContentLibraryItem // both kinds are made alike
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &out); err != nil {
		return nil, fmt.Errorf("reading library item %s of image %s: %w", item, text, err)
	}
	if !out.Status.Ready {
		why := errors.New("nobody has looked at it yet")
		if c := meta.FindStatusCondition(out.Status.Conditions, api.ReadyCondition); c != nil {
			why = fmt.Errorf("%s: %s", c.Reason, c.Message)
		}
		return nil, fmt.Errorf("image %s is not ready: %w", text, why)
	}
	return &out, nil
}
