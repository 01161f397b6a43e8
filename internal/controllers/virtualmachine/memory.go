package virtualmachine

import (
	"context"
	"fmt"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/claims"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/power"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

const (
	// memoryAnnotation of the claim with a machine's memory is how far that is.
	memoryAnnotation = "atoll.dev/memory"
	memorySaved      = "saved"
	// memoryUsed: a machine was started from it. When that machine is gone the memory does not fit the disks any more.
	memoryUsed = "used"
	// forMemory is the purpose of its attachment.
	forMemory = "memory"
	// awaitMemory stands for it among what a machine waits for.
	awaitMemory = "memory"
	// memoryExtra is what the state of devices may take beside the memory.
	memoryExtra = 256 << 20
)

// MemoryClaim is the name of the claim with the memory of a suspended machine.
func MemoryClaim(vm *vmopv1.VirtualMachine) string {
	return "memory-" + machine.DiskUUID(string(vm.UID), "memory")
}

// memoryClaim is that claim, nil when there is none.
func (r *Reconciler) memoryClaim(ctx context.Context, vm *vmopv1.VirtualMachine) (*corev1.PersistentVolumeClaim, error) {
	claim := &corev1.PersistentVolumeClaim{}
	err := r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: MemoryClaim(vm)}, claim)
	if apierrors.IsNotFound(err) || err == nil && claim.DeletionTimestamp != nil {
		return nil, nil
	}
	return claim, err
}

// suspend has the memory saved: there is a claim for it, it is attached, and the host is asked.
func (r *Reconciler) suspend(ctx context.Context, v *view) error {
	vm := v.vm
	claim, err := r.memoryClaim(ctx, vm)
	if err != nil {
		return err
	}
	if claim == nil {
		bytes := max(v.state.Memory, v.machine.Memory.Bytes) + memoryExtra
		claim = claims.New(vm, MemoryClaim(vm), *resource.NewQuantity(bytes, resource.BinarySI))
		err := r.Create(ctx, claim)
		if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) {
			v.missing = append(v.missing, fmt.Sprintf("its memory cannot be saved: %v", err))
			v.soon(retryMost)
			return nil
		}
		if err != nil {
			v.soon(retryFirst)
			return client.IgnoreAlreadyExists(err)
		}
	}
	handle, err := attachment.Attach(ctx, r.Client, vm, claim, v.node(), forMemory)
	if err != nil {
		text, retry := attachment.Text(err)
		if retry {
			return err
		}
		v.missing = append(v.missing, text)
		return nil
	}
	op := machinev1.Operation{
		ID: suspendID(v), Kind: machinev1.Suspend, Mode: machine.Mode(vm.Spec.SuspendMode), Memory: &machinev1.MemoryState{Volume: handle},
	}
	if failed := suspendFailed(v); failed != "" {
		return r.suspendAgain(ctx, v, op, failed)
	}
	if why := r.suspends.Why(v.pod.UID); why != "" {
		v.missing = append(v.missing, why)
	}
	return running.Request(ctx, r.Client, v.pod, op)
}

func suspendID(v *view) string { return "suspend-" + string(v.pod.UID) }

// suspendFailed is why the memory could not be saved, empty when it was or may yet be.
func suspendFailed(v *view) string {
	if result := running.Result(v.pod, suspendID(v)); result != nil && result.Done && result.Error != "" {
		return health.Clean(result.Error)
	}
	return ""
}

// suspendAgain has an attempt forgotten that has failed, after a while or once another mode is wanted. The next one is
// made when the host has forgotten it.
func (r *Reconciler) suspendAgain(ctx context.Context, v *view, op machinev1.Operation, failed string) error {
	why := "its memory could not be saved: " + failed
	v.missing = append(v.missing, why)
	at := slices.IndexFunc(v.machine.Operations, func(o machinev1.Operation) bool { return o.ID == op.ID })
	if at < 0 {
		return nil
	}
	left, news := r.suspends.Failed(v.pod.UID, why, r.Clock.Now())
	if news {
		r.event(v.vm, warning, "SuspendFailed", "Suspend", "saving the memory: %s", failed)
	}
	if left > 0 && v.machine.Operations[at].Mode == op.Mode {
		v.soon(left)
		return nil
	}
	if err := running.Forget(ctx, r.Client, v.pod, op.ID); err != nil {
		return err
	}
	r.suspends.Again(v.pod.UID)
	return nil
}

// unsuspend forgets an attempt that has failed of a machine that is to go on.
func (r *Reconciler) unsuspend(ctx context.Context, v *view) error {
	r.suspends.Forget(v.pod.UID)
	if suspendFailed(v) == "" {
		return nil
	}
	if err := running.Forget(ctx, r.Client, v.pod, suspendID(v)); err != nil {
		return err
	}
	var err error
	v.machine, err = running.Machine(v.pod)
	return err
}

// keepMemory remembers that the memory is saved.
func (r *Reconciler) keepMemory(ctx context.Context, v *view) error {
	claim, err := r.memoryClaim(ctx, v.vm)
	if err != nil || claim == nil || claim.Annotations[memoryAnnotation] == memorySaved {
		return err
	}
	r.event(v.vm, normal, "Suspended", "Suspend", "the memory is saved in PersistentVolumeClaim %s", claim.Name)
	return r.markMemory(ctx, claim, memorySaved)
}

func (r *Reconciler) markMemory(ctx context.Context, claim *corev1.PersistentVolumeClaim, how string) error {
	before := claim.DeepCopy()
	metav1.SetMetaDataAnnotation(&claim.ObjectMeta, memoryAnnotation, how)
	if err := r.Patch(ctx, claim, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("marking the saved memory: %w", err)
	}
	return nil
}

// restore is the memory that a machine is to be started from, with what that asks of the node; nil to boot.
func (r *Reconciler) restore(ctx context.Context, v *view) (*machinev1.MemoryState, []*corev1.NodeSelector, error) {
	claim := &corev1.PersistentVolumeClaim{}
	if name := v.reverting.MemoryClaim; name != "" {
		if err := r.Get(ctx, client.ObjectKey{Namespace: v.vm.Namespace, Name: name}, claim); err != nil {
			return nil, nil, fmt.Errorf("reading PersistentVolumeClaim %s: %w", name, err)
		}
	} else {
		own, err := r.memoryClaim(ctx, v.vm)
		if err != nil || own == nil || own.Annotations[memoryAnnotation] != memorySaved {
			return nil, nil, err
		}
		claim = own
	}
	pv, err := attachment.Volume(ctx, r.Client, claim, "")
	if err != nil {
		text, retry := attachment.Text(err)
		if retry {
			return nil, nil, err
		}
		v.missing = append(v.missing, text)
		return nil, nil, nil
	}
	var reach []*corev1.NodeSelector
	if pv.Spec.NodeAffinity != nil {
		reach = append(reach, pv.Spec.NodeAffinity.Required)
	}
	return &machinev1.MemoryState{Volume: pv.Spec.CSI.VolumeHandle}, reach, nil
}

// memory looks after saved memory beside the power: it is attached for a machine that starts from it, and deleted when
// it is used up.
func (r *Reconciler) memory(ctx context.Context, v *view) error {
	claim, err := r.memoryClaim(ctx, v.vm)
	if err != nil {
		return err
	}
	restoring := v.alive() && v.machine.Restore != nil && v.state.Started == ""
	if restoring {
		from := claim
		if name := v.reverting.MemoryClaim; name != "" {
			from = &corev1.PersistentVolumeClaim{}
			if err := r.Get(ctx, client.ObjectKey{Namespace: v.vm.Namespace, Name: name}, from); err != nil {
				return fmt.Errorf("reading PersistentVolumeClaim %s: %w", name, err)
			}
		}
		if from != nil && v.node() != "" {
			if _, err := attachment.Attach(ctx, r.Client, v.vm, from, v.node(), forMemory); err != nil {
				if _, retry := attachment.Text(err); retry {
					return err
				}
				v.await(awaitMemory)
			}
		} else {
			v.await(awaitMemory)
		}
	}
	if v.alive() && !restoring && v.vm.Spec.PowerState == vmopv1.VirtualMachinePowerStateOn {
		if err := r.detachMemory(ctx, v.vm); err != nil {
			return err
		}
	}
	if claim == nil {
		return nil
	}
	state := claim.Annotations[memoryAnnotation]
	switch {
	case restoring && state == memorySaved:
		return r.markMemory(ctx, claim, memoryUsed)
	case state != memoryUsed || restoring:
		return nil
	case v.phase() == power.PodEnded && v.state.Started == "" && v.state.End.Reason == machinev1.EndFailed:
		return r.markMemory(ctx, claim, memorySaved) // it was not begun
	case v.phase() == power.PodAlive && v.state.Started == "":
		return nil
	}
	return r.deleteMemory(ctx, v, claim)
}

// detachMemory gives back memory that a machine has gone on from, be it its own or that of a snapshot.
func (r *Reconciler) detachMemory(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	attachments, err := attachment.List(ctx, r.Client, vm)
	if err != nil {
		return err
	}
	for i := range attachments {
		if attachments[i].Labels[attachment.PurposeLabel] != forMemory {
			continue
		}
		if err := attachment.Detach(ctx, r.Client, &attachments[i]); err != nil {
			return err
		}
	}
	return nil
}

// deleteMemory deletes the claim when it is not attached any more.
func (r *Reconciler) deleteMemory(ctx context.Context, v *view, claim *corev1.PersistentVolumeClaim) error {
	attachments, err := attachment.List(ctx, r.Client, v.vm)
	if err != nil {
		return err
	}
	busy := false
	for i := range attachments {
		if attachments[i].Labels[attachment.ClaimLabel] != string(claim.UID) {
			continue
		}
		busy = true
		if err := attachment.Detach(ctx, r.Client, &attachments[i]); err != nil {
			return err
		}
	}
	if busy {
		return nil
	}
	if err := r.Delete(ctx, claim); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting the saved memory: %w", err)
	}
	return nil
}

// discard gives up the saved memory of a machine that is to be powered off.
func (r *Reconciler) discard(ctx context.Context, v *view) error {
	claim, err := r.memoryClaim(ctx, v.vm)
	if err != nil || claim == nil {
		return err
	}
	r.event(v.vm, normal, "MemoryDiscarded", "PowerOff", "the saved memory is deleted")
	return r.deleteMemory(ctx, v, claim)
}
