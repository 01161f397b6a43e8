package virtualmachine

import (
	"context"
	"fmt"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	common "github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/resourcepolicy"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
	"atoll.dev/atoll/internal/controllers/virtualmachineclass"
)

// Reasons of conditions that are VM Operator's.
const (
	reasonNotFound    = "NotFound"
	reasonNotReady    = "NotReady"
	reasonNotSet      = "NotSet"
	reasonUnknownKind = "UnknownKind"
	reasonInvalid     = "Invalid"
)

// ClassAnnotation of a VirtualMachine is the VirtualMachineClassInstance that it has its size from. A change of the
// class has no effect on the machine until it asks for that.
const ClassAnnotation = "atoll.dev/class-instance"

// class finds the size of the machine.
func (r *Reconciler) class(ctx context.Context, v *view) error {
	vm := v.vm
	wanted, err := r.wantedInstance(ctx, v)
	if err != nil || wanted == nil {
		return err
	}
	v.size, err = size.Read(&wanted.Spec.VirtualMachineClassSpec)
	if err != nil {
		v.lacks(vmopv1.VirtualMachineConditionClassReady, reasonInvalid, "VirtualMachineClass %s: %v: correct the class", vm.Spec.ClassName, err)
		return nil
	}
	v.sized, v.class = true, wanted.Name
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionClassReady)
	vm.Status.Class = &common.LocalObjectRef{APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachineClass", Name: virtualmachineclass.ClassOf(wanted)}
	switch {
	case v.resized != "":
		condition.False(&vm.Status.Conditions, vmopv1.VirtualMachineClassConfigurationSynced, "ClassUpdated", "%s", v.resized)
	default:
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineClassConfigurationSynced)
	}
	if vm.Annotations[ClassAnnotation] != v.class {
		return r.annotate(ctx, vm, ClassAnnotation, v.class)
	}
	return nil
}

// wantedInstance is the class instance that the machine is to have: the one it names, else the one it has if that is
// still of its class and it does not ask for changes, else the active one of its class. It is nil when there is none.
func (r *Reconciler) wantedInstance(ctx context.Context, v *view) (*vmopv1.VirtualMachineClassInstance, error) {
	vm := v.vm
	get := func(name string) (*vmopv1.VirtualMachineClassInstance, error) {
		i := &vmopv1.VirtualMachineClassInstance{}
		err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: name}, i)
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		return i, err
	}
	if vm.Spec.Class != nil && vm.Spec.Class.Name != "" {
		i, err := get(vm.Spec.Class.Name)
		if err == nil && i == nil {
			v.lacks(vmopv1.VirtualMachineConditionClassReady, reasonNotFound, "VirtualMachineClassInstance %s does not exist: name another in spec.class, or remove spec.class", vm.Spec.Class.Name)
		}
		return i, err
	}
	var current *vmopv1.VirtualMachineClassInstance
	if name := vm.Annotations[ClassAnnotation]; name != "" {
		var err error
		if current, err = get(name); err != nil {
			return nil, err
		}
	}
	if vm.Spec.ClassName == "" {
		if current == nil {
			v.lacks(vmopv1.VirtualMachineConditionClassReady, reasonNotSet, "spec.className is empty: name a VirtualMachineClass; kubectl get vmclass lists them")
		}
		return current, nil
	}
	class := &vmopv1.VirtualMachineClass{}
	err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: vm.Spec.ClassName}, class)
	if apierrors.IsNotFound(err) {
		if current != nil && virtualmachineclass.ClassOf(current) == vm.Spec.ClassName {
			return current, nil // goes on as it is
		}
		v.lacks(vmopv1.VirtualMachineConditionClassReady, reasonNotFound, "VirtualMachineClass %s does not exist in namespace %s: name another in spec.className; kubectl get vmclass -n %s lists them", vm.Spec.ClassName, vm.Namespace, vm.Namespace)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	active := virtualmachineclass.InstanceName(class)
	if current != nil && current.Name != active && virtualmachineclass.ClassOf(current) == class.Name {
		if _, asked := vm.Annotations[vmopv1.VirtualMachineSameVMClassResizeAnnotation]; !asked {
			v.resized = fmt.Sprintf("VirtualMachineClass %s has changed since the machine took it up: set the annotation %s to have the change", class.Name, vmopv1.VirtualMachineSameVMClassResizeAnnotation)
			return current, nil
		}
	}
	if current != nil && current.Name == active {
		return current, nil
	}
	return virtualmachineclass.Ensure(ctx, r.Client, class)
}

// annotate sets an annotation of the VirtualMachine and leaves its status in memory alone.
func (r *Reconciler) annotate(ctx context.Context, vm *vmopv1.VirtualMachine, key, value string) error {
	before, status := vm.DeepCopy(), vm.Status.DeepCopy()
	if value == "" {
		delete(vm.Annotations, key)
	} else {
		metav1.SetMetaDataAnnotation(&vm.ObjectMeta, key, value)
	}
	err := r.Patch(ctx, vm, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	vm.Status = *status
	if err != nil {
		return fmt.Errorf("setting annotation %s: %w", key, err)
	}
	return nil
}

// policy checks the resource policy.
func (r *Reconciler) policy(ctx context.Context, v *view) error {
	vm := v.vm
	if vm.Spec.Reserved == nil || vm.Spec.Reserved.ResourcePolicyName == "" {
		condition.Remove(&vm.Status.Conditions, vmopv1.VirtualMachineConditionVMSetResourcePolicyReady)
		return nil
	}
	name := vm.Spec.Reserved.ResourcePolicyName
	p := &vmopv1.VirtualMachineSetResourcePolicy{}
	err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: name}, p)
	switch {
	case apierrors.IsNotFound(err):
		v.lacks(vmopv1.VirtualMachineConditionVMSetResourcePolicyReady, reasonNotFound, "VirtualMachineSetResourcePolicy %s does not exist: make it, or clear spec.reserved.resourcePolicyName", name)
		return nil
	case err != nil:
		return err
	case p.DeletionTimestamp != nil:
		v.lacks(vmopv1.VirtualMachineConditionVMSetResourcePolicyReady, reasonNotReady, "VirtualMachineSetResourcePolicy %s is being deleted", name)
		return nil
	}
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionVMSetResourcePolicyReady)
	v.policyUnused = resourcepolicy.WithoutEffect(p)
	return nil
}

// image finds the image that the boot disk is made of.
func (r *Reconciler) image(ctx context.Context, v *view) error {
	vm := v.vm
	if vm.Spec.Image == nil {
		if vm.Spec.ImageName != "" {
			v.lacks(vmopv1.VirtualMachineConditionImageReady, reasonNotFound, "no VirtualMachineImage or ClusterVirtualMachineImage is called %s: name another in spec.imageName; kubectl get vmi,cvmi lists them", vm.Spec.ImageName)
			return nil
		}
		// A machine that is installed from a CD-ROM has none.
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionImageReady)
		return nil
	}
	status, err := r.imageStatus(ctx, vm.Namespace, *vm.Spec.Image)
	if err != nil {
		return err
	}
	ref := vm.Spec.Image.Kind + " " + vm.Spec.Image.Name
	if status == nil {
		if v.created() {
			condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionImageReady) // its disk does not need it any more
			return nil
		}
		v.lacks(vmopv1.VirtualMachineConditionImageReady, reasonNotFound, "%s does not exist: name another in spec.image; kubectl get vmi,cvmi lists them", ref)
		return nil
	}
	v.image, v.imageRef = status, vm.Spec.Image.Kind+"/"+vm.Spec.Image.Name
	if c := meta.FindStatusCondition(status.Conditions, "Ready"); !v.created() && (c == nil || c.Status != metav1.ConditionTrue) {
		reason, message := reasonNotReady, "it is still being imported"
		if c != nil && c.Message != "" {
			reason, message = c.Reason, c.Message
		}
		v.lacks(vmopv1.VirtualMachineConditionImageReady, reason, "%s is not ready: %s", ref, message)
		return nil
	}
	if status.Type == "ISO" && !v.created() {
		v.lacks(vmopv1.VirtualMachineConditionImageReady, reasonInvalid, "%s is a CD-ROM: name it in spec.hardware.cdrom instead of spec.image, with a volume to install on", ref)
		return nil
	}
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionImageReady)
	return nil
}

// created tells that the boot disk exists, or the machine has run.
func (v *view) created() bool {
	return condition.IsTrue(v.vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
}

// imageStatus is the status of an image, nil when there is none of that name.
func (r *Reconciler) imageStatus(ctx context.Context, namespace string, ref vmopv1.VirtualMachineImageRef) (*vmopv1.VirtualMachineImageStatus, error) {
	var err error
	var status *vmopv1.VirtualMachineImageStatus
	if ref.Kind == "ClusterVirtualMachineImage" {
		i := &vmopv1.ClusterVirtualMachineImage{}
		err, status = r.Get(ctx, client.ObjectKey{Name: ref.Name}, i), &i.Status
	} else {
		i := &vmopv1.VirtualMachineImage{}
		err, status = r.Get(ctx, client.ObjectKey{Namespace: namespace, Name: ref.Name}, i), &i.Status
	}
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return status, err
}

// storage checks the storage class.
func (r *Reconciler) storage(ctx context.Context, v *view) error {
	vm := v.vm
	name := vm.Spec.StorageClass
	if name == "" {
		class, err := r.defaultClass(ctx)
		if err != nil {
			return err
		}
		if class == "" && vm.Spec.Image != nil {
			v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonNotSet, "spec.storageClass is empty, and there is no default StorageClass: name one; kubectl get storageclass lists them")
			return nil
		}
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionStorageReady)
		return nil
	}
	class := &storagev1.StorageClass{}
	err := r.Get(ctx, client.ObjectKey{Name: name}, class)
	switch {
	case apierrors.IsNotFound(err):
		if v.created() {
			break
		}
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonNotFound, "StorageClass %s does not exist: name another in spec.storageClass; kubectl get storageclass lists them", name)
		return nil
	case err != nil:
		return err
	case class.Provisioner != attachment.Driver:
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonInvalid, "StorageClass %s is of %s: virtual machines need one of %s", name, class.Provisioner, attachment.Driver)
		return nil
	}
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionStorageReady)
	return nil
}

// defaultClass is the name of the default StorageClass, empty when there is none.
func (r *Reconciler) defaultClass(ctx context.Context) (string, error) {
	var list storagev1.StorageClassList
	if err := r.List(ctx, &list); err != nil {
		return "", fmt.Errorf("listing StorageClasses: %w", err)
	}
	for _, c := range list.Items {
		if c.Annotations["storageclass.kubernetes.io/is-default-class"] == "true" && c.Provisioner == attachment.Driver {
			return c.Name, nil
		}
	}
	return "", nil
}

// event tells people what has happened.
func (r *Reconciler) event(vm *vmopv1.VirtualMachine, kind, reason, action, format string, args ...any) {
	if r.Events != nil {
		r.Events.Eventf(vm, nil, kind, reason, action, format, args...)
	}
}

// normal and warning are the kinds of events.
const (
	normal  = corev1.EventTypeNormal
	warning = corev1.EventTypeWarning
)
