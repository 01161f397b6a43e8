package virtualmachine

import (
	"context"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/claims"
	"atoll.dev/atoll/internal/controllers/virtualmachine/early"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
)

// slotAnnotation of its claim is the place of a boot disk, which must not change when the image does.
const slotAnnotation = "atoll.dev/disk-place"

// BootClaim is the name of the claim of the boot disk.
func BootClaim(vm *vmopv1.VirtualMachine) string {
	return "disk-" + machine.DiskUUID(string(vm.UID), machine.BootDisk)
}

func claimOf(vm *vmopv1.VirtualMachine) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: vm.Namespace, Name: BootClaim(vm)}}
}

// bootDisk makes the claim of the boot disk, and lets it grow.
func (r *Reconciler) bootDisk(ctx context.Context, v *view) error {
	vm := v.vm
	if vm.Spec.Image == nil {
		if len(v.missing) == 0 {
			condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
		}
		return nil
	}
	claim := &corev1.PersistentVolumeClaim{}
	err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: BootClaim(vm)}, claim)
	switch {
	case apierrors.IsNotFound(err) && v.created():
		if err := r.Live.Get(ctx, client.ObjectKeyFromObject(claimOf(vm)), claim); err == nil {
			v.soon(retryFirst) // not in the cache yet
			v.missing = append(v.missing, "the boot disk is being made")
			return nil
		}
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonNotFound, "the boot disk, PersistentVolumeClaim %s, has been deleted: delete the virtual machine, or restore the claim", BootClaim(vm))
		return nil
	case apierrors.IsNotFound(err) && v.image == nil:
		return nil // named by the image's condition
	case apierrors.IsNotFound(err):
		if claim, err = r.makeBootClaim(ctx, v); err != nil || claim == nil {
			return err
		}
	case err != nil:
		return err
	case claim.DeletionTimestamp != nil:
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonNotReady, "the boot disk, PersistentVolumeClaim %s, is being deleted", claim.Name)
		return nil
	}
	if err := r.growBootDisk(ctx, v, claim); err != nil {
		return err
	}
	v.boot = claim
	v.slot = placement.ParseSlot(claim.Annotations[slotAnnotation])
	disk := machine.Boot("", strings.TrimPrefix(claim.Name, "disk-"), v.slot)
	if claim.Spec.VolumeName != "" {
		pv := &corev1.PersistentVolume{}
		if err := r.Get(ctx, client.ObjectKey{Name: claim.Spec.VolumeName}, pv); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("reading PersistentVolume %s: %w", claim.Spec.VolumeName, err)
		} else if err == nil && pv.Spec.CSI != nil {
			disk.Volume = pv.Spec.CSI.VolumeHandle
		}
	}
	if has, ok := v.told(disk.Name, func(d machinev1.Disk) bool { return d.UUID == disk.UUID }); ok && disk.Volume == "" {
		disk.Volume = has.Volume
	}
	if disk.Volume == "" {
		v.awaiting = append(v.awaiting, disk.Name)
	} else {
		v.disks = append(v.disks, disk)
	}
	v.volumeState = append(v.volumeState, v.bootState(claim, disk))
	if left := early.Wait(claim, r.Clock.Now()); left > 0 && !v.created() {
		v.missing = append(v.missing, "the boot disk is being made")
		v.soon(left)
	}
	if !v.created() && len(v.missing) == 0 {
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
		r.event(vm, normal, "Created", "Create", "boot disk %s is made of %s", claim.Name, v.imageRef)
	}
	return nil
}

// makeBootClaim makes the claim when everything for it is there.
func (r *Reconciler) makeBootClaim(ctx context.Context, v *view) (*corev1.PersistentVolumeClaim, error) {
	vm := v.vm
	capacity, why := size.Boot(vm, v.image)
	if why != "" {
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonInvalid, "%s", why)
		return nil, nil
	}
	if len(v.missing) > 0 {
		return nil, nil
	}
	slot := placement.Boot(v.image)
	claim := claims.New(vm, BootClaim(vm), capacity)
	claim.Annotations = map[string]string{slotAnnotation: slot.String()}
	claims.FromImage(claim, vm, v.imageRef, 0)
	if added, err := r.addImageDisks(ctx, v); added || err != nil {
		return nil, err
	}
	err := early.Place(ctx, r.Client, claim)
	if err == nil {
		err = r.Create(ctx, claim)
	}
	switch {
	case apierrors.IsAlreadyExists(err):
		v.soon(retryFirst) // not in the cache yet
		return nil, nil
	case apierrors.IsForbidden(err) || apierrors.IsInvalid(err):
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonNotReady, "the boot disk cannot be made: %v", err)
		v.soon(retryMost)
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("making the boot disk: %w", err)
	}
	return claim, nil
}

// addImageDisks adds volumes for the disks of the image beyond the first, before the boot disk is made, and tells whether
// there were some to add.
func (r *Reconciler) addImageDisks(ctx context.Context, v *view) (bool, error) {
	more := claims.OfImage(v.vm, v.image)
	if len(more) == 0 {
		return false, nil
	}
	vm := &vmopv1.VirtualMachine{}
	if err := r.Live.Get(ctx, client.ObjectKeyFromObject(v.vm), vm); err != nil {
		return false, client.IgnoreNotFound(err)
	}
	before := vm.DeepCopy()
	vm.Spec.Volumes = append(vm.Spec.Volumes, claims.OfImage(vm, v.image)...)
	v.missing = append(v.missing, "the disks of the image are being added to spec.volumes")
	v.soon(retryFirst)
	err := r.Patch(ctx, vm, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
		v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonInvalid, "the %d further disks of the image cannot be added to spec.volumes: %v", len(more), err)
		return true, nil
	}
	return true, err
}

// growBootDisk asks for more room, which the volume has without a restart.
func (r *Reconciler) growBootDisk(ctx context.Context, v *view, claim *corev1.PersistentVolumeClaim) error {
	wanted := size.BootCapacity(v.vm)
	if wanted == nil || wanted.Cmp(claim.Spec.Resources.Requests[corev1.ResourceStorage]) <= 0 || claim.Status.Phase != corev1.ClaimBound {
		return nil
	}
	before := claim.DeepCopy()
	claim.Spec.Resources.Requests[corev1.ResourceStorage] = *wanted
	err := r.Patch(ctx, claim, client.MergeFrom(before))
	if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) {
		v.pending = append(v.pending, fmt.Sprintf("a boot disk of %s, which is refused: %v", wanted, err))
		*claim = *before
		return nil
	}
	if err != nil {
		return fmt.Errorf("growing the boot disk: %w", err)
	}
	r.event(v.vm, normal, "Resized", "Resize", "the boot disk grows to %s", wanted)
	return nil
}

// bootState is the boot disk in the status.
func (v *view) bootState(claim *corev1.PersistentVolumeClaim, disk machinev1.Disk) vmopv1.VirtualMachineVolumeStatus {
	s := vmopv1.VirtualMachineVolumeStatus{
		Name: claim.Name, Type: vmopv1.VolumeTypeClassic, DiskUUID: disk.UUID, DiskMode: vmopv1.VolumeDiskModePersistent,
		ControllerType: v.slot.Type, ControllerBusNumber: new(v.slot.Bus), UnitNumber: new(v.slot.Unit),
	}
	v.sizes(&s, claim)
	v.attached(&s, disk.Name)
	return s
}
