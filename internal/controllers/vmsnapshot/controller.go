package vmsnapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
)

// Finalizer keeps a snapshot until the tree goes on without it. The name is VM Operator's.
const Finalizer = "vmoperator.vmware.com/virtualmachinesnapshot"

const (
	// lookEvery is how often something is looked at that no watch tells about.
	lookEvery = 2 * time.Second
	// checkAnnotation holds a machine off while snapshots of its disks are taken.
	checkAnnotation = vmopv1.CheckAnnotationPowerOn + "/snapshot"
)

// Reconciler takes and deletes snapshots.
type Reconciler struct {
	client.Client
	Events events.EventRecorder
}

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	r := &Reconciler{Client: mgr.GetClient(), Events: mgr.GetEventRecorder("virtualmachinesnapshot")}
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachinesnapshot").
		For(&vmopv1.VirtualMachineSnapshot{}).
		Owns(&snapshotv1.VolumeSnapshot{}).
		Owns(&corev1.PersistentVolumeClaim{}).
		Watches(&vmopv1.VirtualMachine{}, handler.EnqueueRequestsFromMapFunc(r.unfinished)).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(r.unfinished)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachineSnapshots: %w", err)
	}
	return nil
}

// unfinished names the snapshots that wait for a machine, or for its pod, which has its name.
func (r *Reconciler) unfinished(ctx context.Context, o client.Object) []reconcile.Request {
	if _, isPod := o.(*corev1.Pod); isPod && o.GetLabels()[machinev1.UIDLabel] == "" {
		return nil
	}
	list, err := r.of(ctx, o.GetNamespace(), o.GetName())
	if err != nil {
		return nil // the informer that failed will tell
	}
	var out []reconcile.Request
	for _, s := range list {
		if s.DeletionTimestamp != nil || !finished(s) {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(s)})
		}
	}
	return out
}

// of lists the snapshots of a virtual machine, oldest first.
func (r *Reconciler) of(ctx context.Context, namespace, vm string) ([]*vmopv1.VirtualMachineSnapshot, error) {
	return list(ctx, r.Client, namespace, vm)
}

func list(ctx context.Context, c client.Reader, namespace, vm string) ([]*vmopv1.VirtualMachineSnapshot, error) {
	var all vmopv1.VirtualMachineSnapshotList
	if err := c.List(ctx, &all, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("listing snapshots: %w", err)
	}
	var out []*vmopv1.VirtualMachineSnapshot
	for i := range all.Items {
		if all.Items[i].Spec.VMName == vm {
			out = append(out, &all.Items[i])
		}
	}
	slices.SortFunc(out, before)
	return out, nil
}

func before(a, b *vmopv1.VirtualMachineSnapshot) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
}

// taken tells that a snapshot exists, finished that it does or never will.
func taken(s *vmopv1.VirtualMachineSnapshot) bool {
	return condition.IsTrue(s.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition)
}

func finished(s *vmopv1.VirtualMachineSnapshot) bool {
	return condition.IsTrue(s.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition) || failed(s)
}

func failed(s *vmopv1.VirtualMachineSnapshot) bool {
	c := condition.Get(s.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition)
	return c != nil && c.Status == metav1.ConditionFalse && c.Reason == vmopv1.VirtualMachineSnapshotCreationFailedReason
}

// Reconcile does the next step of one snapshot.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	snap := &vmopv1.VirtualMachineSnapshot{}
	if err := r.Get(ctx, req.NamespacedName, snap); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if snap.DeletionTimestamp != nil {
		return r.finalize(ctx, snap)
	}
	base := snap.DeepCopy()
	again, err := r.advance(ctx, snap)
	if _, never := errors.AsType[impossibleError](err); never {
		r.fail(snap, err.Error())
		again, err = lookEvery, nil
	}
	if !equality.Semantic.DeepEqual(base.Status, snap.Status) {
		changed := base.DeepCopy()
		changed.ResourceVersion = snap.ResourceVersion
		// What was read may be older than what was written last.
		if writeErr := r.Status().Patch(ctx, snap, client.MergeFromWithOptions(changed, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(writeErr) != nil {
			err = errors.Join(err, fmt.Errorf("writing the status: %w", writeErr))
		}
	}
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: lookEvery}, nil // somebody was faster
	}
	return ctrl.Result{RequeueAfter: again}, err
}

// advance does what comes next, and says when to look again.
func (r *Reconciler) advance(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot) (time.Duration, error) {
	if failed(snap) {
		return 0, r.release(ctx, snap)
	}
	vm := &vmopv1.VirtualMachine{}
	err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: snap.Spec.VMName}, vm)
	if err != nil && !apierrors.IsNotFound(err) {
		return 0, fmt.Errorf("reading virtual machine %s: %w", snap.Spec.VMName, err)
	}
	p := planOf(snap)
	if err != nil || p != nil && string(vm.UID) != p.Machine {
		if taken(snap) {
			return 0, nil // its machine is gone, and soon it will be
		}
		waiting(snap, "there is no virtual machine %q in this namespace", snap.Spec.VMName)
		return 0, nil
	}
	if taken(snap) {
		if err := r.forget(ctx, snap, vm); err != nil {
			return 0, err
		}
	} else {
		if again, err := r.take(ctx, snap, vm, p); err != nil || !taken(snap) {
			return again, err
		}
	}
	if err := r.settle(ctx, snap, vm); err != nil {
		return 0, err
	}
	if !condition.IsTrue(snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition) {
		return lookEvery, nil
	}
	return 0, nil
}

// waiting says what has to happen before a snapshot is begun.
func waiting(snap *vmopv1.VirtualMachineSnapshot, format string, args ...any) {
	condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition, vmopv1.VirtualMachineSnapshotWaitingForCreationReason, format, args...)
	condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition, vmopv1.VirtualMachineSnapshotWaitingForCreationReason, format, args...)
}

// progressing says what is being done.
func progressing(snap *vmopv1.VirtualMachineSnapshot, format string, args ...any) {
	condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition, vmopv1.VirtualMachineSnapshotCreationInProgressReason, format, args...)
	condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition, vmopv1.VirtualMachineSnapshotWaitingForCreationReason, format, args...)
}

// fail ends a snapshot that cannot be taken. What was made for it goes with it. The host keeps why, and the machine is
// held, until advance has read back that it has failed.
func (r *Reconciler) fail(snap *vmopv1.VirtualMachineSnapshot, why string) {
	why += "; delete this snapshot, and take another"
	condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition, vmopv1.VirtualMachineSnapshotCreationFailedReason, "%s", why)
	condition.False(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition, vmopv1.VirtualMachineSnapshotWaitingForCreationReason, "%s", why)
	r.Events.Eventf(snap, nil, corev1.EventTypeWarning, "SnapshotFailed", "Take", "%s", why)
}

// claim makes the snapshot part of its machine: it goes with it, and is found by its label.
func (r *Reconciler) claim(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) error {
	base, status := snap.DeepCopy(), snap.Status
	controllerutil.AddFinalizer(snap, Finalizer)
	metav1.SetMetaDataLabel(&snap.ObjectMeta, vmopv1.VMNameForSnapshotLabel, vm.Name)
	if err := controllerutil.SetOwnerReference(vm, snap, r.Scheme()); err != nil {
		return fmt.Errorf("joining the virtual machine: %w", err)
	}
	if slices.Equal(base.Finalizers, snap.Finalizers) && maps.Equal(base.Labels, snap.Labels) && len(base.OwnerReferences) == len(snap.OwnerReferences) {
		return nil
	}
	if err := r.Patch(ctx, snap, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("joining the virtual machine: %w", err)
	}
	snap.Status = status
	return nil
}

// hold keeps a machine from being powered on, or ends that.
func (r *Reconciler) hold(ctx context.Context, vm *vmopv1.VirtualMachine, snap *vmopv1.VirtualMachineSnapshot, on bool) error {
	have, held := vm.Annotations[checkAnnotation]
	if held == on && (!on || have == snap.Name) || !on && have != snap.Name {
		return nil
	}
	base := vm.DeepCopy()
	if on {
		metav1.SetMetaDataAnnotation(&vm.ObjectMeta, checkAnnotation, snap.Name)
	} else {
		delete(vm.Annotations, checkAnnotation)
	}
	if err := r.Patch(ctx, vm, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("holding the virtual machine: %w", client.IgnoreNotFound(err))
	}
	return nil
}
