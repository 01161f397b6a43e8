package vmsnapshot

import (
	"context"
	"fmt"
	"strings"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// publish makes the snapshots that a host has taken known: as contents that are there already, and the objects that
// they belong to.
func (r *Reconciler) publish(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, p *plan) error {
	for _, d := range p.Disks {
		// The handle is made of what the volume says, not of the plan, which users can write.
		pv := &corev1.PersistentVolume{}
		if err := r.Get(ctx, client.ObjectKey{Name: d.Volume}, pv); err != nil {
			return fmt.Errorf("reading PersistentVolume %s: %w", d.Volume, err)
		}
		if pv.Spec.CSI == nil || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.Namespace != snap.Namespace {
			return impossible("PersistentVolume %s is not one of this namespace", d.Volume)
		}
		mode := corev1.PersistentVolumeFilesystem
		if pv.Spec.VolumeMode != nil {
			mode = *pv.Spec.VolumeMode
		}
		content := &snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: contentName(snap, d.Name)},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				DeletionPolicy:    snapshotv1.VolumeSnapshotContentDelete,
				Driver:            attachment.Driver,
				Source:            snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: new(snapshotHandle(pv.Spec.CSI.VolumeHandle, snap, d.Name))},
				SourceVolumeMode:  &mode,
				VolumeSnapshotRef: corev1.ObjectReference{Namespace: snap.Namespace, Name: d.Object},
			},
		}
		if err := r.Create(ctx, content); err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("making VolumeSnapshotContent %s: %w", content.Name, err)
		}
		if _, err := r.volumeSnapshot(ctx, snap, d, snapshotv1.VolumeSnapshotSource{VolumeSnapshotContentName: new(content.Name)}); err != nil {
			return err
		}
	}
	return nil
}

// volumeSnapshot makes the object of one disk.
func (r *Reconciler) volumeSnapshot(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, d disk, source snapshotv1.VolumeSnapshotSource) (*snapshotv1.VolumeSnapshot, error) {
	object := &snapshotv1.VolumeSnapshot{}
	err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: d.Object}, object)
	if err == nil {
		return object, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("reading VolumeSnapshot %s: %w", d.Object, err)
	}
	object = &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: snap.Namespace, Name: d.Object, Labels: map[string]string{vmopv1.VMNameForSnapshotLabel: snap.Spec.VMName}},
		Spec:       snapshotv1.VolumeSnapshotSpec{Source: source},
	}
	if err := controllerutil.SetControllerReference(snap, object, r.Scheme()); err != nil {
		return nil, fmt.Errorf("owning VolumeSnapshot %s: %w", d.Object, err)
	}
	if err := r.Create(ctx, object); err != nil && !apierrors.IsAlreadyExists(err) {
		if apierrors.IsForbidden(err) {
			return nil, impossible("VolumeSnapshot %s is refused: %v", d.Object, err)
		}
		return nil, fmt.Errorf("making VolumeSnapshot %s: %w", d.Object, err)
	}
	return object, nil
}

// settle follows the VolumeSnapshots of a snapshot that was taken, and keeps the tree.
func (r *Reconciler) settle(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) error {
	p := planOf(snap)
	if p == nil {
		return fmt.Errorf("annotation %s of snapshot %s is gone or damaged; delete the snapshot", planAnnotation, snap.Name)
	}
	var waits []string
	for _, d := range p.Disks {
		object := &snapshotv1.VolumeSnapshot{}
		err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: d.Object}, object)
		switch {
		case apierrors.IsNotFound(err):
			waits = append(waits, fmt.Sprintf("VolumeSnapshot %s of disk %s was deleted, the machine cannot go back to this snapshot any more", d.Object, d.Name))
		case err != nil:
			return fmt.Errorf("reading VolumeSnapshot %s: %w", d.Object, err)
		case object.Status == nil || object.Status.ReadyToUse == nil || !*object.Status.ReadyToUse:
			why := fmt.Sprintf("VolumeSnapshot %s is not ready", d.Object)
			if object.Status != nil && object.Status.Error != nil && object.Status.Error.Message != nil {
				why += ": " + *object.Status.Error.Message
			}
			waits = append(waits, why)
		}
	}
	if len(waits) > 0 {
		text := strings.Join(waits, "; ")
		condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCSIVolumeSyncedCondition, vmopv1.VirtualMachineSnapshotCSIVolumeSyncInProgressReason, "%s", text)
		condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition, vmopv1.VirtualMachineSnapshotWaitingForCSISyncReason, "%s", text)
	} else {
		condition.True(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCSIVolumeSyncedCondition)
		condition.True(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition)
	}
	return r.tree(ctx, snap, vm)
}

// release undoes what a snapshot that failed, or goes, holds of its machine: it may be powered on, the host forgets the
// operation, and the memory is detached.
func (r *Reconciler) release(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot) error {
	vm := &vmopv1.VirtualMachine{}
	if err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: snap.Spec.VMName}, vm); err != nil {
		return client.IgnoreNotFound(err)
	}
	if err := r.hold(ctx, vm, snap, false); err != nil {
		return err
	}
	if err := r.forget(ctx, snap, vm); err != nil {
		return err
	}
	return r.detach(ctx, snap, vm)
}

// forget has the host forget the operation.
func (r *Reconciler) forget(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) error {
	pod, err := running.Pod(ctx, r.Client, vm)
	if err != nil || pod == nil || running.Ended(pod) {
		return nil //nolint:nilerr // a pod that is not the machine's has no operation of it
	}
	return client.IgnoreNotFound(running.Forget(ctx, r.Client, pod, operation(snap)))
}

// clean makes one line without control characters of what a host says, which may hold words of a guest.
func clean(s string) string {
	const longest = 1024
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
	return strings.ToValidUTF8(s[:min(len(s), longest)], "")
}

// contentHandle is the CSI handle of a VolumeSnapshot, which its content says.
func contentHandle(ctx context.Context, c client.Reader, namespace, name string) (string, error) {
	object := &snapshotv1.VolumeSnapshot{}
	if err := c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, object); err != nil {
		return "", fmt.Errorf("reading VolumeSnapshot %s: %w", name, err)
	}
	if object.Status == nil || object.Status.BoundVolumeSnapshotContentName == nil {
		return "", fmt.Errorf("VolumeSnapshot %s has no content yet", name)
	}
	content := &snapshotv1.VolumeSnapshotContent{}
	if err := c.Get(ctx, client.ObjectKey{Name: *object.Status.BoundVolumeSnapshotContentName}, content); err != nil {
		return "", fmt.Errorf("reading VolumeSnapshotContent %s: %w", *object.Status.BoundVolumeSnapshotContentName, err)
	}
	ref := content.Spec.VolumeSnapshotRef
	if content.Status == nil || content.Status.SnapshotHandle == nil || ref.Namespace != namespace || ref.Name != name {
		return "", fmt.Errorf("VolumeSnapshotContent %s has no handle yet, or is not of VolumeSnapshot %s", content.Name, name)
	}
	return *content.Status.SnapshotHandle, nil
}

func isOperation(id string) func(machinev1.Operation) bool {
	return func(o machinev1.Operation) bool { return o.ID == id }
}
