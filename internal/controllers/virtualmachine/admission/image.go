package admission

import (
	"context"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	namespaceImage = "VirtualMachineImage"
	clusterImage   = "ClusterVirtualMachineImage"
)

// image resolves spec.imageName into spec.image, or the other way round.
func (w *Webhook) image(ctx context.Context, vm *vmopv1.VirtualMachine) (field.ErrorList, error) {
	path := field.NewPath("spec", "imageName")
	name, ref := vm.Spec.ImageName, vm.Spec.Image
	if name == "" {
		if ref != nil && ref.Name != "" {
			vm.Spec.ImageName = ref.Name
		}
		return nil, nil
	}
	if ref != nil && ref.Name == name {
		return nil, nil
	}
	found, err := resolve(ctx, w.Cached, vm.Namespace, name)
	if err == nil && len(found) == 0 {
		found, err = resolve(ctx, w.Live, vm.Namespace, name)
	}
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return field.ErrorList{field.Invalid(path, name, "no VirtualMachineImage or ClusterVirtualMachineImage has this name or display name; kubectl get vmi,cvmi lists those there are")}, nil
	case len(found) > 1:
		return field.ErrorList{field.Invalid(path, name, fmt.Sprintf("several images have this display name (%s): set spec.image to one of them", list(found)))}, nil
	case ref != nil && *ref != found[0]:
		return field.ErrorList{field.Invalid(path, name, fmt.Sprintf("is %s %s, but spec.image names %s %s: set only one of the two", found[0].Kind, found[0].Name, ref.Kind, ref.Name))}, nil
	}
	vm.Spec.Image = &found[0]
	return nil, nil
}

func list(refs []vmopv1.VirtualMachineImageRef) string {
	var out []string
	for _, r := range refs {
		out = append(out, r.Kind+" "+r.Name)
	}
	return strings.Join(out, ", ")
}

// resolve finds the images that a name means: an object of the namespace, else one of the cluster, else all those that
// are displayed under it.
func resolve(ctx context.Context, c client.Reader, namespace, name string) ([]vmopv1.VirtualMachineImageRef, error) {
	err := c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &vmopv1.VirtualMachineImage{})
	if err == nil {
		return []vmopv1.VirtualMachineImageRef{{Kind: namespaceImage, Name: name}}, nil
	}
	if apierrors.IsNotFound(err) {
		err = c.Get(ctx, client.ObjectKey{Name: name}, &vmopv1.ClusterVirtualMachineImage{})
	}
	if err == nil {
		return []vmopv1.VirtualMachineImageRef{{Kind: clusterImage, Name: name}}, nil
	}
	// A display name may not even be a name that the API takes.
	if !apierrors.IsNotFound(err) && !apierrors.IsBadRequest(err) && !apierrors.IsInvalid(err) {
		return nil, fmt.Errorf("reading image %s: %w", name, err)
	}
	var out []vmopv1.VirtualMachineImageRef
	var own vmopv1.VirtualMachineImageList
	if err := c.List(ctx, &own, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("listing images: %w", err)
	}
	for _, i := range own.Items {
		if i.Status.Name == name {
			out = append(out, vmopv1.VirtualMachineImageRef{Kind: namespaceImage, Name: i.Name})
		}
	}
	var all vmopv1.ClusterVirtualMachineImageList
	if err := c.List(ctx, &all); err != nil {
		return nil, fmt.Errorf("listing images: %w", err)
	}
	for _, i := range all.Items {
		if i.Status.Name == name {
			out = append(out, vmopv1.VirtualMachineImageRef{Kind: clusterImage, Name: i.Name})
		}
	}
	return out, nil
}
