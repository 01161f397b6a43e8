package namespacebounds

import (
	"context"
	"fmt"
	"slices"

	vmopv1alpha2 "github.com/vmware-tanzu/vm-operator/api/v1alpha2"
	vmopv1alpha3 "github.com/vmware-tanzu/vm-operator/api/v1alpha3"
	vmopv1alpha4 "github.com/vmware-tanzu/vm-operator/api/v1alpha4"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/validation/path"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/controller-runtime/pkg/conversion"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

func machines() schema.GroupResource {
	return schema.GroupResource{Group: vmopv1.GroupName, Resource: "virtualmachines"}
}

func machineSets() schema.GroupResource {
	return schema.GroupResource{Group: vmopv1.GroupName, Resource: "virtualmachinereplicasets"}
}

// classAnnotation of a class instance is the name of its class (internal/controllers/virtualmachineclass).
const classAnnotation = "atoll.dev/vm-class"

// Kinds of images.
const (
	namespaceImage = "VirtualMachineImage"
	clusterImage   = "ClusterVirtualMachineImage"
)

// wants is what limits are for in a virtual machine.
type wants struct {
	class           string
	instance        string
	image           *vmopv1.VirtualMachineImageRef
	imageName       string
	cdroms          []vmopv1.VirtualMachineImageRef
	storageClass    string
	encryptionClass string
}

// machine holds a VirtualMachine, or the template of a VirtualMachineReplicaSet, to the limits. Of an old one, what is
// new is held to them.
func (p *Plugin) machine(ctx context.Context, a admission.Attributes, b *atoll.SupervisorNamespace) error {
	now, err := machineOf(a.GetObject(), a.GetKind())
	if err != nil {
		return err
	}
	var old *wants
	if a.GetOperation() == admission.Update && a.GetOldObject() != nil {
		if old, err = machineOf(a.GetOldObject(), a.GetKind()); err != nil {
			return err
		}
	}
	if err := p.machineClass(ctx, b, now, old); err != nil {
		return err
	}
	if old == nil || old.storageClass != now.storageClass || old.encryptionClass != now.encryptionClass {
		if err := p.machineStorage(b, now); err != nil {
			return err
		}
	}
	return p.machineImages(ctx, b, now, old)
}

// machineOf reads a virtual machine of any version.
func machineOf(obj runtime.Object, kind schema.GroupVersionKind) (*wants, error) {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return nil, fmt.Errorf("reading the virtual machine: it is %T", obj)
	}
	content := u.UnstructuredContent()
	if kind.Kind == "VirtualMachineReplicaSet" {
		spec, _, err := unstructured.NestedFieldNoCopy(content, "spec", "template", "spec")
		if err != nil {
			return nil, fmt.Errorf("reading spec.template.spec: %w", err)
		}
		content = map[string]any{"spec": spec}
	}
	vm := &vmopv1.VirtualMachine{}
	var from conversion.Convertible
	switch kind.Version {
	case "v1alpha2":
		from = &vmopv1alpha2.VirtualMachine{}
	case "v1alpha3":
		from = &vmopv1alpha3.VirtualMachine{}
	case "v1alpha4":
		from = &vmopv1alpha4.VirtualMachine{}
	case "v1alpha5":
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(content, vm); err != nil {
			return nil, fmt.Errorf("reading the virtual machine: %w", err)
		}
		return wantsOf(vm), nil
	default:
		return nil, fmt.Errorf("limits are not known to version %s of virtual machines; use one that kubectl api-versions lists", kind.Version)
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(content, from); err != nil {
		return nil, fmt.Errorf("reading the virtual machine: %w", err)
	}
	if err := from.ConvertTo(vm); err != nil {
		return nil, fmt.Errorf("reading the virtual machine: %w", err)
	}
	return wantsOf(vm), nil
}

func wantsOf(vm *vmopv1.VirtualMachine) *wants {
	w := &wants{class: vm.Spec.ClassName, image: vm.Spec.Image, imageName: vm.Spec.ImageName, storageClass: vm.Spec.StorageClass}
	if vm.Spec.Class != nil {
		w.instance = vm.Spec.Class.Name
	}
	if vm.Spec.Crypto != nil {
		w.encryptionClass = vm.Spec.Crypto.EncryptionClassName
	}
	if vm.Spec.Hardware != nil {
		for _, c := range vm.Spec.Hardware.Cdrom {
			w.cdroms = append(w.cdroms, c.Image)
		}
	}
	return w
}

const limitClasses = "spec.vmClasses"

// machineClass holds the class, and that of the class instance, to the limits.
func (p *Plugin) machineClass(ctx context.Context, b *atoll.SupervisorNamespace, now, old *wants) error {
	if b.Spec.VMClasses == nil {
		return nil
	}
	allowed := names(b.Spec.VMClasses)
	if (old == nil || old.class != now.class) && now.class != "" && !slices.Contains(allowed, now.class) {
		return refuse(b, limitClasses, allowed, "spec.className "+now.class)
	}
	if now.instance == "" || old != nil && old.instance == now.instance {
		return nil
	}
	instance, err := p.source.dynamic.Resource(vmopv1.GroupVersion.WithResource("virtualmachineclassinstances")).Namespace(b.Name).
		Get(ctx, now.instance, metav1.GetOptions{})
	class := ""
	switch {
	case err == nil:
		class = instance.GetAnnotations()[classAnnotation]
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("reading VirtualMachineClassInstance %s: %w", now.instance, err)
	}
	if !slices.Contains(allowed, class) {
		return refuse(b, limitClasses, allowed, fmt.Sprintf("spec.class.name %s, an instance of class %q", now.instance, class))
	}
	return nil
}

// machineStorage holds the storage of a virtual machine's own disks to the limits.
func (p *Plugin) machineStorage(b *atoll.SupervisorNamespace, now *wants) error {
	class := now.storageClass
	if class == "" {
		class = p.theDefault()
	}
	if class == "" || now.image == nil && now.imageName == "" && now.storageClass == "" { // no disk of its own
		return nil
	}
	if err := storageClass(b, class, fmt.Sprintf("spec.storageClass %q", class)); err != nil {
		return err
	}
	name := now.encryptionClass
	if name == "" {
		name = b.Spec.Encryption.ClassName
	}
	return p.encrypted(b, class, name, "a virtual machine")
}

// machineImages holds what a virtual machine is made of, and its CD-ROMs, to the content libraries.
func (p *Plugin) machineImages(ctx context.Context, b *atoll.SupervisorNamespace, now, old *wants) error {
	if b.Spec.ContentSources == nil {
		return nil
	}
	known := map[vmopv1.VirtualMachineImageRef]bool{}
	if old != nil {
		for _, ref := range old.refs() {
			known[ref] = true
		}
	}
	for _, ref := range now.refs() {
		if known[ref] {
			continue
		}
		if err := p.machineImage(ctx, b, ref.Kind, ref.Name, "image "+ref.Kind+"/"+ref.Name); err != nil {
			return err
		}
	}
	if now.image != nil || now.imageName == "" || old != nil && old.imageName == now.imageName {
		return nil
	}
	found, err := p.named(ctx, b.Name, now.imageName)
	if err != nil {
		return err
	}
	for _, ref := range found {
		if err := p.machineImage(ctx, b, ref.Kind, ref.Name, "spec.imageName "+now.imageName); err != nil {
			return err
		}
	}
	return nil
}

// named are the images that spec.imageName of a template may mean, which nobody resolves before a machine is made of it: an
// object of the namespace, else one of the cluster, else all that are displayed so. What is not there is of no library.
func (p *Plugin) named(ctx context.Context, namespace, name string) ([]vmopv1.VirtualMachineImageRef, error) {
	kinds := []string{namespaceImage, clusterImage}
	clients := []dynamic.ResourceInterface{
		p.source.dynamic.Resource(vmopv1.GroupVersion.WithResource("virtualmachineimages")).Namespace(namespace),
		p.source.dynamic.Resource(vmopv1.GroupVersion.WithResource("clustervirtualmachineimages")),
	}
	for i, c := range clients {
		if len(path.IsValidPathSegmentName(name)) > 0 {
			break // what is displayed may have slashes
		}
		_, err := c.Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			return []vmopv1.VirtualMachineImageRef{{Kind: kinds[i], Name: name}}, nil
		}
		if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("looking for image %s: %w", name, err)
		}
	}
	var out []vmopv1.VirtualMachineImageRef
	for i, c := range clients {
		list, err := c.List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("listing images: %w", err)
		}
		for _, image := range list.Items {
			if display, _, _ := unstructured.NestedString(image.Object, "status", "name"); display == name {
				out = append(out, vmopv1.VirtualMachineImageRef{Kind: kinds[i], Name: image.GetName()})
			}
		}
	}
	if len(out) == 0 {
		out = append(out, vmopv1.VirtualMachineImageRef{Kind: namespaceImage, Name: name})
	}
	return out, nil
}

// refs are all images of a virtual machine.
func (w *wants) refs() []vmopv1.VirtualMachineImageRef {
	out := slices.Clone(w.cdroms)
	if w.image != nil {
		out = append(out, *w.image)
	}
	return out
}

// contentSources are the libraries of a namespace, as TYPE/NAME.
func contentSources(b *atoll.SupervisorNamespace) []string {
	out := make([]string, 0, len(b.Spec.ContentSources))
	for _, s := range b.Spec.ContentSources {
		kind := s.Type
		if kind == "" {
			kind = "ClusterContentLibrary"
		}
		out = append(out, kind+"/"+s.Name)
	}
	return out
}

// machineImage tells whether an image is of one of the namespace's content libraries.
func (p *Plugin) machineImage(ctx context.Context, b *atoll.SupervisorNamespace, kind, name, asked string) error {
	if b.Spec.ContentSources == nil {
		return nil
	}
	library, err := p.library(ctx, b.Name, kind, name)
	if err != nil {
		return err
	}
	if allowed := contentSources(b); !slices.Contains(allowed, library) {
		if library == "" {
			library = "no library"
		}
		return refuse(b, "spec.contentSources", allowed, asked+" of "+library)
	}
	return nil
}

// library is that of an image, TYPE/NAME, "" where there is none.
func (p *Plugin) library(ctx context.Context, namespace, kind, name string) (string, error) {
	images := p.source.dynamic.Resource(vmopv1.GroupVersion.WithResource("clustervirtualmachineimages"))
	items := p.source.dynamic.Resource(imageregistry.GroupVersion().WithResource("clustercontentlibraryitems"))
	get, getItem, library := images.Get, items.Get, "ClusterContentLibrary/"
	switch kind {
	case clusterImage:
	case namespaceImage:
		get = p.source.dynamic.Resource(vmopv1.GroupVersion.WithResource("virtualmachineimages")).Namespace(namespace).Get
		getItem = p.source.dynamic.Resource(imageregistry.GroupVersion().WithResource("contentlibraryitems")).Namespace(namespace).Get
		library = "ContentLibrary/"
	default:
		return "", nil
	}
	if name == "" {
		return "", nil
	}
	image, err := get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("reading image %s: %w", name, err)
	}
	provider, _, _ := unstructured.NestedString(image.Object, "spec", "providerRef", "name")
	if provider == "" {
		return "", nil
	}
	item, err := getItem(ctx, provider, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("reading the library item of image %s: %w", name, err)
	}
	in, _, _ := unstructured.NestedString(item.Object, "spec", "library")
	if in == "" {
		in = imageregistry.DefaultLibrary
	}
	return library + in, nil
}
