package vmsnapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// way is how far a machine is on its way back to a snapshot. It is kept in virtualmachine.RevertAnnotation, as JSON.
type way struct {
	Snapshot string `json:"snapshot"`
	UID      string `json:"uid"`
	Step     step   `json:"step"`
}

// step of going back.
//
//	(nothing) -- machine off, old marks gone --> rolling -- all volumes rolled back, spec replaced --> starting
//	    ^                                                                                                 |
//	    +------------------------------------- memory taken up, if there is any --------------------------+
type step string

const (
	rolling  step = "rolling"
	starting step = "starting"
)

// Reverter takes machines back to snapshots. It implements virtualmachine.Snapshots.
type Reverter struct {
	client.Client
	Events events.EventRecorder
}

// NewReverter uses a manager's client.
func NewReverter(mgr ctrl.Manager) *Reverter {
	return &Reverter{Client: mgr.GetClient(), Events: mgr.GetEventRecorder("virtualmachinesnapshot")}
}

// revertError is what keeps a machine from going back, with the reason of the condition.
type revertError struct{ reason, text string }

// Error implements error.
func (e revertError) Error() string { return e.text }

func cannot(reason, format string, args ...any) error {
	return revertError{reason, fmt.Sprintf(format, args...)}
}

// Revert does the next step of going back to spec.currentSnapshotName. It changes the machine's object, and sets the
// condition in its status, which the caller writes.
func (r *Reverter) Revert(ctx context.Context, vm *vmopv1.VirtualMachine, pod *corev1.Pod) (virtualmachine.Revert, error) {
	out, how, err := r.next(ctx, vm, pod)
	kind := vmopv1.VirtualMachineSnapshotRevertSucceeded
	if stopped, ok := errors.AsType[revertError](err); ok {
		condition.False(&vm.Status.Conditions, kind, stopped.reason, "%s", stopped.text)
		return out, nil
	}
	switch {
	case err != nil:
		condition.False(&vm.Status.Conditions, kind, vmopv1.VirtualMachineSnapshotRevertInProgressReason, "%s: %s", how, err)
	case out.Done:
		condition.True(&vm.Status.Conditions, kind)
	default:
		condition.False(&vm.Status.Conditions, kind, vmopv1.VirtualMachineSnapshotRevertInProgressReason, "%s", how)
	}
	return out, err
}

func (r *Reverter) next(ctx context.Context, vm *vmopv1.VirtualMachine, pod *corev1.Pod) (virtualmachine.Revert, string, error) {
	var w way
	_ = json.Unmarshal([]byte(vm.Annotations[virtualmachine.RevertAnnotation]), &w) // none, or nonsense, is the beginning
	held := virtualmachine.Revert{PowerOff: true, Busy: true}
	if vm.Spec.CurrentSnapshotName == "" {
		if w.Step != rolling { // nothing was changed yet, or everything is
			return virtualmachine.Revert{}, "giving up", r.write(ctx, vm, func(o *vmopv1.VirtualMachine) { delete(o.Annotations, virtualmachine.RevertAnnotation) })
		}
		// Volumes that are rolled back in part fit no machine, so that it is gone through with.
		return held, "going on", r.write(ctx, vm, func(o *vmopv1.VirtualMachine) { o.Spec.CurrentSnapshotName = w.Snapshot })
	}
	snap, p, err := r.target(ctx, vm)
	if err != nil {
		if w.Step == rolling {
			return held, "looking at the snapshot", err
		}
		return virtualmachine.Revert{}, "looking at the snapshot", err
	}
	if w.Snapshot != snap.Name || w.UID != string(snap.UID) {
		w = way{Snapshot: snap.Name, UID: string(snap.UID)}
	}
	switch w.Step {
	case starting:
		return r.start(ctx, vm, pod, snap, p)
	case rolling:
		left, err := r.roll(ctx, p)
		if err != nil || left != "" {
			return held, left, err
		}
		return held, "restoring the spec", r.restore(ctx, vm, p, w)
	}
	if pod != nil {
		return held, "powering the virtual machine off", nil
	}
	attachments, err := attachment.List(ctx, r.Client, vm)
	if err != nil {
		return held, "looking at its volumes", err
	}
	if len(attachments) > 0 {
		return held, fmt.Sprintf("waiting until node %s has let go of the volumes", attachments[0].Spec.NodeName), nil
	}
	if err := r.unmark(ctx, p); err != nil {
		return held, "preparing the volumes", err
	}
	w.Step = rolling
	return held, "rolling volumes back", r.note(ctx, vm, w)
}

// target is the snapshot to go back to. It must be one of this machine, and whole.
func (r *Reverter) target(ctx context.Context, vm *vmopv1.VirtualMachine) (*vmopv1.VirtualMachineSnapshot, *plan, error) {
	snap := &vmopv1.VirtualMachineSnapshot{}
	name := vm.Spec.CurrentSnapshotName
	err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: name}, snap)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertFailedReason, "there is no snapshot %q in this namespace; correct or clear spec.currentSnapshotName", name)
	case err != nil:
		return nil, nil, fmt.Errorf("reading snapshot %s: %w", name, err)
	case snap.Spec.VMName != vm.Name:
		return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertFailedReason, "snapshot %s is of virtual machine %s; clear spec.currentSnapshotName", name, snap.Spec.VMName)
	case !condition.IsTrue(snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition):
		return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertSkippedReason, "snapshot %s is not ready; see its conditions", name)
	}
	p := planOf(snap)
	if p == nil || p.Spec == nil || len(p.Disks) == 0 {
		return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertFailedInvalidVMManifestReason, "annotation %s of snapshot %s is gone or damaged; clear spec.currentSnapshotName", planAnnotation, name)
	}
	if p.Machine != string(vm.UID) {
		return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertFailedReason, "snapshot %s is of an earlier virtual machine of this name; clear spec.currentSnapshotName", name)
	}
	if p.Memory != "" {
		err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: memoryClaim(snap)}, &corev1.PersistentVolumeClaim{})
		if apierrors.IsNotFound(err) {
			return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertFailedReason, "PersistentVolumeClaim %s with the memory of snapshot %s was deleted; clear spec.currentSnapshotName", memoryClaim(snap), name)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("reading PersistentVolumeClaim %s: %w", memoryClaim(snap), err)
		}
	}
	for i, d := range p.Disks {
		claim := &corev1.PersistentVolumeClaim{}
		err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: d.Claim}, claim)
		if apierrors.IsNotFound(err) || err == nil && claim.Spec.VolumeName != d.Volume {
			return nil, nil, cannot(vmopv1.VirtualMachineSnapshotRevertFailedReason, "PersistentVolumeClaim %s, which was disk %s, is gone; clear spec.currentSnapshotName, and make a new volume of VolumeSnapshot %s", d.Claim, d.Name, d.Object)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("reading PersistentVolumeClaim %s: %w", d.Claim, err)
		}
		// The handle is the content's, which users cannot write, and not what the plan says.
		if p.Disks[i].Snapshot, err = contentHandle(ctx, r.Client, vm.Namespace, d.Object); err != nil {
			return nil, nil, err
		}
	}
	return snap, p, nil
}

// unmark removes what an earlier way back has left in the volumes.
func (r *Reverter) unmark(ctx context.Context, p *plan) error {
	for _, d := range p.Disks {
		if err := r.mark(ctx, d, ""); err != nil {
			return err
		}
	}
	return nil
}

// mark asks for a volume to be rolled back, or takes that away.
func (r *Reverter) mark(ctx context.Context, d disk, snapshot string) error {
	pv := &corev1.PersistentVolume{}
	if err := r.Get(ctx, client.ObjectKey{Name: d.Volume}, pv); err != nil {
		return fmt.Errorf("reading PersistentVolume %s: %w", d.Volume, err)
	}
	if pv.Annotations[imageregistry.RollbackAnnotation] == snapshot && snapshot != "" {
		return nil
	}
	base := pv.DeepCopy()
	for _, name := range []string{imageregistry.RollbackAnnotation, imageregistry.RolledBackAnnotation, imageregistry.RollbackErrorAnnotation} {
		delete(pv.Annotations, name)
	}
	if snapshot != "" {
		metav1.SetMetaDataAnnotation(&pv.ObjectMeta, imageregistry.RollbackAnnotation, snapshot)
	}
	if len(base.Annotations) == len(pv.Annotations) && snapshot == "" {
		return nil
	}
	if err := r.Patch(ctx, pv, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("marking PersistentVolume %s: %w", d.Volume, err)
	}
	return nil
}

// roll asks for all volumes to be rolled back, and says in words which are not yet.
func (r *Reverter) roll(ctx context.Context, p *plan) (string, error) {
	var left []string
	for _, d := range p.Disks {
		if err := r.mark(ctx, d, d.Snapshot); err != nil {
			return "rolling volumes back", err
		}
		pv := &corev1.PersistentVolume{}
		if err := r.Get(ctx, client.ObjectKey{Name: d.Volume}, pv); err != nil {
			return "rolling volumes back", fmt.Errorf("reading PersistentVolume %s: %w", d.Volume, err)
		}
		if pv.Annotations[imageregistry.RolledBackAnnotation] == d.Snapshot && pv.Annotations[imageregistry.RollbackAnnotation] == d.Snapshot {
			continue
		}
		why := d.Name
		if text := pv.Annotations[imageregistry.RollbackErrorAnnotation]; text != "" {
			why += " (" + clean(text) + ")"
		}
		left = append(left, why)
	}
	if len(left) == 0 {
		return "", nil
	}
	return "rolling volumes back: " + strings.Join(left, ", "), nil
}

// restore gives the machine the spec of the snapshot. Who it is and what it belongs to stays.
func (r *Reverter) restore(ctx context.Context, vm *vmopv1.VirtualMachine, p *plan, w way) error {
	want := p.Spec.DeepCopy()
	want.CurrentSnapshotName, want.NextRestartTime, want.GroupName = vm.Spec.CurrentSnapshotName, vm.Spec.NextRestartTime, vm.Spec.GroupName
	want.BiosUUID, want.InstanceUUID = vm.Spec.BiosUUID, vm.Spec.InstanceUUID
	want.PowerState = vmopv1.VirtualMachinePowerStateOff
	if p.Memory != "" {
		want.PowerState = vmopv1.VirtualMachinePowerStateOn
	}
	w.Step = starting
	return r.write(ctx, vm, func(o *vmopv1.VirtualMachine) {
		o.Spec = *want
		setNote(o, w)
	})
}

// start has the machine go on from the memory of the snapshot, if it has that, and is the end otherwise.
func (r *Reverter) start(ctx context.Context, vm *vmopv1.VirtualMachine, pod *corev1.Pod, snap *vmopv1.VirtualMachineSnapshot, p *plan) (virtualmachine.Revert, string, error) {
	if err := r.unmark(ctx, p); err != nil {
		return virtualmachine.Revert{PowerOff: true, Busy: true}, "cleaning up", err
	}
	// Somebody who powers it off now does not want it to go on.
	if p.Memory != "" && vm.Spec.PowerState == vmopv1.VirtualMachinePowerStateOn && !started(pod) {
		return virtualmachine.Revert{MemoryClaim: memoryClaim(snap)}, "starting from the memory of the snapshot", nil
	}
	err := r.write(ctx, vm, func(o *vmopv1.VirtualMachine) {
		o.Spec.CurrentSnapshotName = ""
		delete(o.Annotations, virtualmachine.RevertAnnotation)
	})
	if err != nil {
		return virtualmachine.Revert{}, "finishing", err
	}
	vm.Status.CurrentSnapshot = new(reference(snap.Name))
	r.Events.Eventf(vm, snap, corev1.EventTypeNormal, "Reverted", "Revert", "it is as it was in snapshot %s", snap.Name)
	return virtualmachine.Revert{Done: true}, "", nil
}

// started tells whether a machine runs that went on from memory.
func started(pod *corev1.Pod) bool {
	if pod == nil || running.Ended(pod) || pod.DeletionTimestamp != nil {
		return false
	}
	m, err := running.Machine(pod)
	state := running.State(pod)
	return err == nil && m.Restore != nil && state.Phase == machinev1.Running
}

// note writes down how far the machine is.
func (r *Reverter) note(ctx context.Context, vm *vmopv1.VirtualMachine, w way) error {
	return r.write(ctx, vm, func(o *vmopv1.VirtualMachine) { setNote(o, w) })
}

func setNote(vm *vmopv1.VirtualMachine, w way) {
	text, err := json.Marshal(w)
	if err != nil {
		panic(err) // three strings
	}
	metav1.SetMetaDataAnnotation(&vm.ObjectMeta, virtualmachine.RevertAnnotation, string(text))
}

// write changes the machine's object, and leaves the status that is in memory alone.
func (r *Reverter) write(ctx context.Context, vm *vmopv1.VirtualMachine, change func(*vmopv1.VirtualMachine)) error {
	status := vm.Status.DeepCopy()
	base := vm.DeepCopy()
	change(vm)
	err := r.Patch(ctx, vm, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{}))
	vm.Status = *status
	if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
		return cannot(vmopv1.VirtualMachineSnapshotRevertFailedInvalidVMManifestReason, "the spec of the snapshot is refused: %s", err)
	}
	if err != nil {
		return fmt.Errorf("changing the virtual machine: %w", err)
	}
	return nil
}
