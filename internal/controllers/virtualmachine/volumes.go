package virtualmachine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/claims"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachine/power"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// volumes attaches what spec.volumes names.
func (r *Reconciler) volumes(ctx context.Context, v *view) error {
	vm := v.vm
	spec := vm.Spec.DeepCopy()
	var boot *placement.Slot
	if v.boot != nil || spec.Image != nil {
		boot = new(v.slot)
		if v.boot == nil {
			boot = new(placement.Boot(v.image))
		}
	}
	misplaced := placement.Assign(spec, boot)
	for i := range spec.Volumes {
		vol := &spec.Volumes[i]
		state := volumeState(vol)
		path := fmt.Sprintf("spec.volumes[%d]", i)
		at := slices.IndexFunc([]*field.Error(misplaced), func(e *field.Error) bool { return strings.HasPrefix(e.Field, path) })
		if at >= 0 {
			state.Error = misplaced[at].Error()
			v.volumeState = append(v.volumeState, state)
			continue
		}
		err := r.volume(ctx, v, vol, &state)
		if err != nil {
			text, retry := attachment.Text(err)
			if retry {
				return err
			}
			state.Error = text
			if v.phase() == power.PodNone {
				v.lacks(vmopv1.VirtualMachineConditionStorageReady, reasonNotReady, "%s: %s", path, text)
			}
		}
		v.volumeState = append(v.volumeState, state)
	}
	return nil
}

func volumeState(vol *vmopv1.VirtualMachineVolume) vmopv1.VirtualMachineVolumeStatus {
	s := vmopv1.VirtualMachineVolumeStatus{
		Name: vol.Name, Type: vmopv1.VolumeTypeManaged,
		ControllerType: vol.ControllerType, ControllerBusNumber: vol.ControllerBusNumber, UnitNumber: vol.UnitNumber,
		DiskMode: vol.DiskMode, SharingMode: vol.SharingMode,
	}
	if s.DiskMode == "" {
		s.DiskMode = vmopv1.VolumeDiskModePersistent
	}
	if s.SharingMode == "" {
		s.SharingMode = vmopv1.VolumeSharingModeNone
	}
	return s
}

// volume does the next step for one volume.
func (r *Reconciler) volume(ctx context.Context, v *view, vol *vmopv1.VirtualMachineVolume, state *vmopv1.VirtualMachineVolumeStatus) error {
	disk := machine.VolumeDisk(vol.Name)
	if vol.PersistentVolumeClaim == nil || vol.PersistentVolumeClaim.ClaimName == "" {
		return &attachment.Problem{Text: "persistentVolumeClaim.claimName is empty: name a PersistentVolumeClaim"}
	}
	claim, err := r.volumeClaim(ctx, v, vol)
	if err != nil {
		v.await(disk)
		return err
	}
	if owner := metav1.GetControllerOf(claim); owner != nil && owner.Kind == "VirtualMachine" && (owner.UID != v.vm.UID || claim.Annotations[claims.ImageAnnotation] != "" && claims.Number(v.vm, claim.Name) == 0 || claim.Name == MemoryClaim(v.vm)) {
		return &attachment.Problem{Text: fmt.Sprintf("PersistentVolumeClaim %s is a part of VirtualMachine %s: name a claim of your own", claim.Name, owner.Name)}
	}
	state.DiskUUID = machine.DiskUUID(string(claim.UID))
	v.sizes(state, claim)
	shared := vol.SharingMode == vmopv1.VolumeSharingModeMultiWriter
	if shared && !slices.Contains(claim.Spec.AccessModes, corev1.ReadWriteMany) {
		return &attachment.Problem{Text: fmt.Sprintf("sharingMode is MultiWriter, but PersistentVolumeClaim %s is not ReadWriteMany: make it with that access mode on a shared datastore", claim.Name)}
	}
	if err := attachment.Hold(ctx, r.Client, v.vm, claim, shared); err != nil {
		v.await(disk)
		return err
	}
	v.claims = append(v.claims, claim)
	v.attached(state, disk)
	handle, err := r.attach(ctx, v, claim)
	if err != nil {
		// A disk that the machine has is not taken from it because something is wrong with its attachment.
		if has, ok := v.told(disk, func(d machinev1.Disk) bool { return d.UUID == state.DiskUUID }); ok {
			v.disks = append(v.disks, has)
			return err
		}
		v.await(disk)
		return err
	}
	if handle == "" {
		v.await(disk)
		return nil
	}
	v.disks = append(v.disks, machine.Volume(vol, handle, state.DiskUUID))
	return nil
}

// await keeps a machine that is not started yet from starting without the disk.
func (v *view) await(disk string) { v.awaiting = append(v.awaiting, disk) }

// attach makes a claim's volume available where the machine runs. Without a machine it finds out only which nodes can
// have it.
func (r *Reconciler) attach(ctx context.Context, v *view, claim *corev1.PersistentVolumeClaim) (handle string, err error) {
	if node := v.node(); node != "" && v.pod.DeletionTimestamp == nil {
		return attachment.Attach(ctx, r.Client, v.vm, claim, node, attachment.Disks)
	}
	pv, err := attachment.Volume(ctx, r.Client, claim, "")
	if err != nil {
		if p := (*attachment.Problem)(nil); errors.As(err, &p) && p.Waiting && !v.alive() {
			return "", nil // it is bound when the machine has a node
		}
		return "", err
	}
	if pv.Spec.NodeAffinity != nil {
		v.reach = append(v.reach, pv.Spec.NodeAffinity.Required)
	}
	if !v.alive() {
		return "", nil
	}
	return "", &attachment.Problem{Text: "the virtual machine has no node yet", Waiting: true}
}

// volumeClaim is the claim of a volume. Those of instance storage are made.
func (r *Reconciler) volumeClaim(ctx context.Context, v *view, vol *vmopv1.VirtualMachineVolume) (*corev1.PersistentVolumeClaim, error) {
	name := vol.PersistentVolumeClaim.ClaimName
	claim := &corev1.PersistentVolumeClaim{}
	err := r.Get(ctx, client.ObjectKey{Namespace: v.vm.Namespace, Name: name}, claim)
	if !apierrors.IsNotFound(err) {
		return claim, err
	}
	instance := vol.PersistentVolumeClaim.InstanceVolumeClaim
	if instance == nil {
		return nil, &attachment.Problem{Text: fmt.Sprintf("PersistentVolumeClaim %s does not exist: make it, or remove the volume", name), Waiting: true}
	}
	claim = claims.New(v.vm, name, instance.Size)
	if instance.StorageClass != "" {
		claim.Spec.StorageClassName = &instance.StorageClass
	}
	if number := claims.Number(v.vm, name); number > 0 {
		claims.FromImage(claim, v.vm, v.imageRef, number)
	}
	if err := r.Create(ctx, claim); err != nil {
		if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) {
			return nil, &attachment.Problem{Text: fmt.Sprintf("PersistentVolumeClaim %s cannot be made: %v", name, err)}
		}
		return nil, fmt.Errorf("making PersistentVolumeClaim %s: %w", name, err)
	}
	return claim, nil
}

// sizes sets what the claim asks for.
func (v *view) sizes(s *vmopv1.VirtualMachineVolumeStatus, claim *corev1.PersistentVolumeClaim) {
	if q, ok := claim.Spec.Resources.Requests[corev1.ResourceStorage]; ok {
		s.Requested = new(q.DeepCopy())
		s.Limit = new(q.DeepCopy())
	}
	if q, ok := claim.Status.Capacity[corev1.ResourceStorage]; ok && !q.IsZero() {
		s.Limit = new(q.DeepCopy())
	}
}

// attached sets what the host says about a disk.
func (v *view) attached(s *vmopv1.VirtualMachineVolumeStatus, disk string) {
	for _, d := range v.state.Disks {
		if d.Name != disk || v.state.Phase == machinev1.Ended {
			continue
		}
		s.Attached = d.Attached
		if d.Error != "" {
			s.Error = health.Clean(d.Error)
		}
		if d.Bytes > 0 {
			s.Limit = resource.NewQuantity(d.Bytes, resource.BinarySI)
		}
	}
}

// release takes away what the machine is not to have any more: a disk first goes from the machine, then its attachment
// from the host, and only then is its claim let go of.
func (r *Reconciler) release(ctx context.Context, v *view) error {
	if v.incomplete || v.pod != nil && v.pod.DeletionTimestamp != nil && !running.Ended(v.pod) {
		return nil // the machine still has all of them, or it is not known what it should have
	}
	wanted := map[string]bool{}
	for _, c := range v.claims {
		wanted[string(c.UID)] = true
	}
	attachments, err := attachment.List(ctx, r.Client, v.vm)
	if err != nil {
		return err
	}
	busy := map[string]bool{}
	for i := range attachments {
		a := &attachments[i]
		claim := a.Labels[attachment.ClaimLabel]
		busy[claim] = true
		here := v.alive() && a.Spec.NodeName == v.node()
		if here && (wanted[claim] || a.Labels[attachment.PurposeLabel] != attachment.Disks) {
			continue
		}
		if here {
			has, err := r.machineHas(ctx, v, ptr.Deref(a.Spec.Source.PersistentVolumeName, ""))
			if err != nil {
				return err
			}
			if has {
				continue
			}
		}
		if err := attachment.Detach(ctx, r.Client, a); err != nil {
			return err
		}
	}
	var held corev1.PersistentVolumeClaimList
	if err := r.List(ctx, &held, client.InNamespace(v.vm.Namespace), client.MatchingFields{holderIndex: string(v.vm.UID)}); err != nil {
		return fmt.Errorf("listing PersistentVolumeClaims: %w", err)
	}
	for i := range held.Items {
		c := &held.Items[i]
		if wanted[string(c.UID)] || busy[string(c.UID)] {
			continue
		}
		if err := attachment.LetGo(ctx, r.Client, v.vm, c); err != nil {
			return err
		}
	}
	return nil
}

// machineHas tells whether the machine was told of a volume, or has it still.
func (r *Reconciler) machineHas(ctx context.Context, v *view, volume string) (bool, error) {
	pv := &corev1.PersistentVolume{}
	err := r.Get(ctx, client.ObjectKey{Name: volume}, pv)
	if apierrors.IsNotFound(err) || err == nil && pv.Spec.CSI == nil {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading PersistentVolume %s: %w", volume, err)
	}
	handle := pv.Spec.CSI.VolumeHandle
	return slices.ContainsFunc(v.machine.Disks, func(d machinev1.Disk) bool { return d.Volume == handle }) ||
		slices.ContainsFunc(v.state.Disks, func(d machinev1.DiskState) bool { return d.Volume == handle }), nil
}
