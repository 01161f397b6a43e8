package virtualmachine

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/pod"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// RevertAnnotation of a VirtualMachine says how far it is on its way back to a snapshot. While it is there
// Hooks.Snapshots is asked even when nobody wishes it any more: volumes may be rolled back in part.
const RevertAnnotation = "atoll.dev/revert"

// lookRevert is how often a machine on its way back is looked at.
const lookRevert = time.Second

const restartPrefix = "restart-"

// change tells a running machine what is new, and has it restarted when that is asked for.
func (r *Reconciler) change(ctx context.Context, v *view) error {
	if err := r.label(ctx, v); err != nil {
		return err
	}
	if !v.sized {
		return nil
	}
	wanted := v.build(nil)
	known := v.boot != nil || v.vm.Spec.Image == nil
	if known {
		if anew, err := r.renew(ctx, v, wanted); anew || err != nil {
			return err
		}
	}
	ready, err := r.resize(ctx, v)
	if err != nil {
		return err
	}
	if !ready {
		wanted.CPU.Count, wanted.Memory.Bytes = v.machine.CPU.Count, v.machine.Memory.Bytes
	}
	if !known {
		return nil
	}
	merged, pending, changed := machine.Merge(v.machine, wanted)
	v.pending = append(v.pending, pending...)
	if changed {
		if err := running.Write(ctx, r.Client, v.pod, merged); err != nil {
			return err
		}
		v.machine = merged
	}
	return r.restart(ctx, v)
}

// renew deletes a pod that no node has taken yet when its machine is to be another one than it can become: nothing has run,
// and the next one is made as it is wanted now.
func (r *Reconciler) renew(ctx context.Context, v *view, wanted machinev1.Machine) (bool, error) {
	if v.pod.Spec.NodeName != "" || v.machine.Restore != nil {
		return false, nil
	}
	_, pending, _ := machine.Merge(v.machine, wanted)
	if len(pending) == 0 && wanted.CPU.Count == v.machine.CPU.Count && wanted.Memory.Bytes == v.machine.Memory.Bytes {
		return false, nil
	}
	err := r.Delete(ctx, v.pod, client.Preconditions{UID: &v.pod.UID, ResourceVersion: &v.pod.ResourceVersion})
	if err != nil { // also when a node has taken it meanwhile
		return false, client.IgnoreNotFound(fmt.Errorf("deleting a pod that no node has taken: %w", err))
	}
	r.event(v.vm, normal, "Renewed", "PowerOn", "pod %s, which no node had taken, is made anew", v.pod.Name)
	return true, r.deleteSeed(ctx, v.pod)
}

// label gives the pod the labels of the VirtualMachine.
func (r *Reconciler) label(ctx context.Context, v *view) error {
	wanted := pod.Labels(v.vm)
	if maps.Equal(wanted, v.pod.Labels) {
		return nil
	}
	before := v.pod.DeepCopy()
	v.pod.Labels = wanted
	if err := r.Patch(ctx, v.pod, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("labelling the pod: %w", err)
	}
	return nil
}

// resize asks the kubelet for more processors and memory, and tells whether the machine may have what is wanted.
func (r *Reconciler) resize(ctx context.Context, v *view) (ready bool, err error) {
	grown := v.size.CPUs >= v.machine.CPU.Count && v.size.CPUs <= v.machine.CPU.Max &&
		v.size.Memory >= v.machine.Memory.Bytes && v.size.Memory <= v.machine.Memory.Max
	same := v.size.CPUs == v.machine.CPU.Count && v.size.Memory == v.machine.Memory.Bytes
	if !grown || same {
		return true, nil // Merge says what is pending
	}
	if len(v.pod.Spec.Containers) == 0 {
		return false, nil
	}
	have := &v.pod.Spec.Containers[0].Resources
	if !equality.Semantic.DeepEqual(have.Requests, v.size.Requests) || !equality.Semantic.DeepEqual(have.Limits, v.size.Limits) {
		p := v.pod.DeepCopy()
		p.Spec.Containers[0].Resources.Requests, p.Spec.Containers[0].Resources.Limits = v.size.Requests, v.size.Limits
		err := r.SubResource("resize").Update(ctx, p)
		if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) {
			v.pending = append(v.pending, fmt.Sprintf("the size of the class, which is refused while it runs: %v", err))
			v.soon(retryMost)
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("resizing the pod: %w", err)
		}
		r.event(v.vm, normal, "Resizing", "Resize", "to %d processors and %s of memory", v.size.CPUs, v.size.Limits.Memory())
		return false, nil
	}
	for _, c := range v.pod.Status.Conditions {
		if c.Type == corev1.PodResizePending && c.Status == corev1.ConditionTrue {
			v.pending = append(v.pending, fmt.Sprintf("the size of the class, for which its host has no room (%s): %s", c.Reason, c.Message))
			return false, nil
		}
	}
	if len(v.pod.Status.ContainerStatuses) == 0 {
		return false, nil
	}
	for name, wanted := range v.size.Requests {
		allocated, ok := v.pod.Status.ContainerStatuses[0].AllocatedResources[name]
		if !ok || allocated.Cmp(wanted) < 0 {
			return false, nil
		}
	}
	return true, nil
}

// restart restarts the guest once for each new spec.nextRestartTime.
func (r *Reconciler) restart(ctx context.Context, v *view) error {
	vm := v.vm
	asked, err := time.Parse(time.RFC3339Nano, vm.Spec.NextRestartTime)
	due := err == nil && (vm.Status.LastRestartTime == nil || asked.Truncate(time.Second).After(vm.Status.LastRestartTime.Time))
	id := fmt.Sprintf("%s%d", restartPrefix, asked.Unix())
	if due {
		if started := v.pod.CreationTimestamp.Time; started.After(asked) {
			vm.Status.LastRestartTime = &metav1.Time{Time: asked} // it has begun anew since
			due = false
		}
	}
	for _, op := range v.machine.Operations {
		result := running.Result(v.pod, op.ID)
		if !strings.HasPrefix(op.ID, restartPrefix) || result == nil || !result.Done {
			continue
		}
		if op.ID == id && due {
			// It is forgotten only when the status says so, so that it is not done again.
			vm.Status.LastRestartTime = &metav1.Time{Time: asked} // one that is asked for from here on is another
			health.Restarted(vm, v.state, asked, result.Error)
			if result.Error != "" {
				r.event(vm, warning, "RestartFailed", "Restart", "%s", health.Clean(result.Error))
			} else {
				r.event(vm, normal, "Restarted", "Restart", "the guest was restarted (%s)", op.Mode)
			}
			v.soon(time.Second)
			return nil
		}
		if err := running.Forget(ctx, r.Client, v.pod, op.ID); err != nil {
			return err
		}
		if v.machine, err = running.Machine(v.pod); err != nil {
			return err
		}
	}
	if !due || v.state.Phase != machinev1.Running {
		return nil
	}
	if slices.ContainsFunc(v.machine.Operations, func(o machinev1.Operation) bool { return o.ID == id }) {
		return nil
	}
	return running.Request(ctx, r.Client, v.pod, machinev1.Operation{ID: id, Kind: machinev1.Reset, Mode: machine.Mode(vm.Spec.RestartMode)})
}

// revert takes the machine back to a snapshot.
func (r *Reconciler) revert(ctx context.Context, v *view) error {
	vm := v.vm
	if _, begun := vm.Annotations[RevertAnnotation]; vm.Spec.CurrentSnapshotName == "" && !begun {
		return nil
	}
	if r.Snapshots == nil {
		v.lacks(vmopv1.VirtualMachineSnapshotRevertSucceeded, vmopv1.VirtualMachineSnapshotRevertSkippedReason,
			"snapshots are not supported by this server: clear spec.currentSnapshotName")
		return nil
	}
	var err error
	v.reverting, err = r.Snapshots.Revert(ctx, vm, v.pod)
	if v.reverting.Busy || v.reverting.MemoryClaim != "" {
		v.soon(lookRevert) // no watch tells that volumes are rolled back
	}
	return err
}
