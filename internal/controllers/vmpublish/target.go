package vmpublish

import (
	"cmp"
	"context"
	"fmt"

	"github.com/distribution/reference"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
)

// target is the library that takes the image, nil when it does not, which a condition says. Our own item is no
// hindrance.
func (r *Reconciler) target(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest, ours *imageregistry.ContentLibraryItem) (*imageregistry.ContentLibrary, error) {
	kind := vmopv1.VirtualMachinePublishRequestConditionTargetValid
	refuse := func(reason, format string, args ...any) (*imageregistry.ContentLibrary, error) {
		condition.False(&p.Status.Conditions, kind, reason, format, args...)
		return nil, nil
	}
	at := &p.Status.TargetRef.Location
	if at.Kind != "" && at.Kind != "ContentLibrary" {
		return refuse(vmopv1.TargetContentLibraryNotExistReason, "spec.target.location.kind %q is not supported; use ContentLibrary", at.Kind)
	}
	library, err := r.library(ctx, p)
	if err != nil {
		return nil, err
	}
	if library == nil {
		if at.Name == "" {
			return refuse(vmopv1.TargetContentLibraryNotExistReason, "no ContentLibrary of this namespace has the label %s; name one in spec.target.location.name", defaultLabel)
		}
		return refuse(vmopv1.TargetContentLibraryNotExistReason, "there is no ContentLibrary %q in this namespace; correct spec.target.location.name", at.Name)
	}
	at.Name = library.Name
	if !library.Spec.Writable {
		return refuse(vmopv1.TargetContentLibraryNotWritableReason, "ContentLibrary %s is not writable; name another one, or set its spec.writable", library.Name)
	}
	c := condition.Get(library.Status.Conditions, imageregistry.ReadyCondition)
	switch {
	case c == nil && library.Spec.Registry != nil:
		return refuse(vmopv1.TargetContentLibraryNotReadyReason, "ContentLibrary %s has not been looked at yet", library.Name)
	case c != nil && c.Status == metav1.ConditionFalse:
		return refuse(vmopv1.TargetContentLibraryNotReadyReason, "ContentLibrary %s is not ready: %s", library.Name, c.Message)
	}
	name := p.Status.TargetRef.Item.Name
	if library.Spec.Registry != nil {
		reason, why, err := r.inProject(p, ours)
		if err != nil {
			return nil, err
		}
		if reason != "" {
			return refuse(reason, "%s", why)
		}
		name = imageregistry.TagName(imageregistry.SplitTagName(name))
	}
	var items imageregistry.ContentLibraryItemList
	if err := r.List(ctx, &items, client.InNamespace(p.Namespace)); err != nil {
		return nil, fmt.Errorf("listing library items: %w", err)
	}
	for _, i := range items.Items {
		same := cmp.Or(i.Spec.Name, i.Name) == name || i.Name == itemName(p, library)
		if same && i.Spec.Library == library.Name && (ours == nil || i.UID != ours.UID) {
			return refuse(vmopv1.TargetItemAlreadyExistsReason, "ContentLibrary %s has an item %q already; choose another spec.target.item.name, or delete the item", library.Name, p.Status.TargetRef.Item.Name)
		}
	}
	condition.True(&p.Status.Conditions, kind)
	return library, nil
}

// reasonName says that the name of an item cannot be one in the registry.
const reasonName = "TargetItemNameInvalid"

// inProject tells why the project of the namespace does not take a name: because it cannot be one, or is there already,
// as a disk or as anything else.
func (r *Reconciler) inProject(p *vmopv1.VirtualMachinePublishRequest, ours *imageregistry.ContentLibraryItem) (reason, why string, err error) {
	asked := p.Status.TargetRef.Item.Name
	repository, tag := imageregistry.SplitTagName(asked)
	full := p.Namespace + "/" + repository
	named, err := reference.WithName(full)
	if err == nil {
		_, err = reference.WithTag(named, tag)
	}
	if err != nil || len(full) > maxRepository {
		return reasonName, fmt.Sprintf("spec.target.item.name %q cannot be the name of an image in the registry; use lower-case letters, digits and . _ - /, and perhaps :TAG, such as web:1.0", asked), nil
	}
	if ours != nil {
		return "", "", nil
	}
	there, err := r.Tagged(p.Namespace, repository, tag)
	if err != nil {
		return "", "", fmt.Errorf("looking for %s:%s in the registry: %w", full, tag, err)
	}
	if there {
		return vmopv1.TargetItemAlreadyExistsReason, fmt.Sprintf("%s/%s:%s is in the registry already; choose another spec.target.item.name or tag, or delete it with `atoll registry rm`", atoll.RegistryHost, full, tag), nil
	}
	return "", "", nil
}

// maxRepository is how long the name of a repository may be.
const maxRepository = 255

// library is the one that the request names, or the namespace's default one; nil when there is none.
func (r *Reconciler) library(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest) (*imageregistry.ContentLibrary, error) {
	name := p.Status.TargetRef.Location.Name
	if name == "" {
		var list imageregistry.ContentLibraryList
		if err := r.List(ctx, &list, client.InNamespace(p.Namespace)); err != nil {
			return nil, fmt.Errorf("listing content libraries: %w", err)
		}
		name = imageregistry.DefaultLibrary
		for _, l := range list.Items {
			if _, ok := l.Labels[defaultLabel]; ok {
				name = l.Name
				break
			}
		}
	}
	library := &imageregistry.ContentLibrary{}
	err := r.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: name}, library)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading ContentLibrary %s: %w", name, err)
	}
	return library, nil
}
