package vmsnapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

func reference(name string) vmopv1.VirtualMachineSnapshotReference {
	return vmopv1.VirtualMachineSnapshotReference{Type: vmopv1.VirtualMachineSnapshotReferenceTypeManaged, Name: name}
}

// family sorts the snapshots of a machine into roots and, by their parent's name, children. A parent that is not there
// any more makes a root.
func family(all []*vmopv1.VirtualMachineSnapshot, machine string) (roots []vmopv1.VirtualMachineSnapshotReference, children map[string][]vmopv1.VirtualMachineSnapshotReference) {
	children = map[string][]vmopv1.VirtualMachineSnapshotReference{}
	var members []*vmopv1.VirtualMachineSnapshot
	for _, s := range all {
		if p := planOf(s); p != nil && p.Machine == machine && taken(s) && s.DeletionTimestamp == nil {
			members = append(members, s)
		}
	}
	for _, s := range members {
		parent := planOf(s).Parent
		known := slices.ContainsFunc(members, func(o *vmopv1.VirtualMachineSnapshot) bool { return o.Name == parent && o.UID != s.UID })
		if known {
			children[parent] = append(children[parent], reference(s.Name))
		} else {
			roots = append(roots, reference(s.Name))
		}
	}
	return roots, children
}

// tree writes who is whose child, in the snapshots' statuses and the machine's. The status of snap itself is written
// by the caller.
func (r *Reconciler) tree(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) error {
	all, err := r.of(ctx, vm.Namespace, vm.Name)
	if err != nil {
		return err
	}
	for i, s := range all {
		if snap != nil && s.UID == snap.UID {
			all[i] = snap // what is known of it now
		}
	}
	roots, children := family(all, string(vm.UID))
	for _, s := range all {
		if equality.Semantic.DeepEqual(s.Status.Children, children[s.Name]) || s.DeletionTimestamp != nil {
			continue
		}
		base := s.DeepCopy()
		s.Status.Children = children[s.Name]
		if snap != nil && s.UID == snap.UID {
			continue
		}
		if err := r.Status().Patch(ctx, s, client.MergeFrom(base)); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("writing the children of snapshot %s: %w", s.Name, err)
		}
	}
	if equality.Semantic.DeepEqual(vm.Status.RootSnapshots, roots) {
		return nil
	}
	base := vm.DeepCopy()
	vm.Status.RootSnapshots = roots
	if err := r.Status().Patch(ctx, vm, client.MergeFrom(base)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("writing the root snapshots: %w", err)
	}
	return nil
}

// finalize takes a snapshot out of its tree: its children become its parent's. The volumes' snapshots are deleted by
// the garbage collector when the object is gone.
func (r *Reconciler) finalize(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(snap, Finalizer) {
		return ctrl.Result{}, nil
	}
	vm := &vmopv1.VirtualMachine{}
	err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: snap.Spec.VMName}, vm)
	if err != nil && !apierrors.IsNotFound(err) {
		return ctrl.Result{}, fmt.Errorf("reading virtual machine %s: %w", snap.Spec.VMName, err)
	}
	p := planOf(snap)
	if err == nil && vm.DeletionTimestamp == nil && p != nil && string(vm.UID) == p.Machine {
		wait, err := r.leave(ctx, snap, vm, p)
		if apierrors.IsConflict(err) {
			return ctrl.Result{RequeueAfter: lookEvery}, nil
		}
		if err != nil || wait > 0 {
			return ctrl.Result{RequeueAfter: wait}, err
		}
	}
	base := snap.DeepCopy()
	controllerutil.RemoveFinalizer(snap, Finalizer)
	if err := r.Patch(ctx, snap, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("letting go of snapshot %s: %w", snap.Name, err)
	}
	return ctrl.Result{}, nil
}

// leave is finalize for a snapshot whose machine stays. It says how long to wait when something is still under way.
func (r *Reconciler) leave(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan) (time.Duration, error) {
	if vm.Spec.CurrentSnapshotName == snap.Name && vm.Annotations[virtualmachine.RevertAnnotation] != "" {
		r.Events.Eventf(snap, vm, corev1.EventTypeWarning, "InUse", "Delete", "the virtual machine is being taken back to it; it is deleted after that")
		return lookEvery, nil
	}
	pod, err := running.Pod(ctx, r.Client, vm)
	if err != nil {
		return 0, err
	}
	if pod != nil && string(pod.UID) == p.Pod && !running.Ended(pod) {
		if m, err := running.Machine(pod); err == nil && slices.ContainsFunc(m.Operations, isOperation(operation(snap))) {
			if result := running.Result(pod, operation(snap)); result == nil || !result.Done {
				return lookEvery, nil // the host cannot stop half-way
			}
			// What it has made goes with the objects.
			if err := r.publish(ctx, snap, p); err != nil {
				return 0, err
			}
		}
	}
	if err := r.release(ctx, snap); err != nil {
		return 0, err
	}
	all, err := r.of(ctx, snap.Namespace, snap.Spec.VMName)
	if err != nil {
		return 0, err
	}
	var failures error
	for _, s := range all {
		child := planOf(s)
		if child == nil || child.Parent != snap.Name || s.UID == snap.UID || s.DeletionTimestamp != nil {
			continue
		}
		child.Parent = p.Parent
		failures = errors.Join(failures, r.keep(ctx, s, child))
	}
	if failures != nil {
		return 0, failures
	}
	if at := vm.Status.CurrentSnapshot; at != nil && at.Name == snap.Name {
		base := vm.DeepCopy()
		vm.Status.CurrentSnapshot = nil
		if slices.ContainsFunc(all, func(s *vmopv1.VirtualMachineSnapshot) bool { return s.Name == p.Parent && s.DeletionTimestamp == nil }) {
			vm.Status.CurrentSnapshot = new(reference(p.Parent))
		}
		if err := r.Status().Patch(ctx, vm, client.MergeFrom(base)); err != nil {
			return 0, fmt.Errorf("choosing the current snapshot: %w", err)
		}
	}
	return 0, r.tree(ctx, nil, vm)
}
