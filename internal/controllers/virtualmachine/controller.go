package virtualmachine

import (
	"context"
	"errors"
	"fmt"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/restarts"
)

// Finalizer keeps a VirtualMachine until its machine and attachments are gone. The name is VM Operator's.
const Finalizer = "vmoperator.vmware.com/virtualmachine"

const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 30 * time.Second
	// lookAgain is when something is looked at again that nothing tells us about.
	lookAgain = 10 * time.Second
)

// Bootstrap makes the files of a machine's seed disk. A nil result is none.
type Bootstrap interface {
	Render(ctx context.Context, in BootstrapInput) (*Seed, error)
}

// BootstrapInput is what the files are made of.
type BootstrapInput struct {
	VM   *vmopv1.VirtualMachine
	NICs []machinev1.NIC
	// Image is the status of the machine's image, nil when it has none.
	Image *vmopv1.VirtualMachineImageStatus
	// Hostname and Domain of the guest.
	Hostname, Domain string
	// LastInstanceID is the Seed.InstanceID that the guest had last.
	LastInstanceID string
}

// Seed is the content of a seed disk.
type Seed struct {
	// Label of the file system.
	Label string
	// Files by name, in the form of a Secret, see machinev1.SeedVolume.
	Files map[string][]byte
	// InstanceID is cloud-init's, empty without cloud-init.
	InstanceID string
	// Notes say what was passed on without what it asked for.
	Notes []string
}

// Snapshots takes machines back to snapshots. It is called at each look while spec.currentSnapshotName is set.
type Snapshots interface {
	Revert(ctx context.Context, vm *vmopv1.VirtualMachine, pod *corev1.Pod) (Revert, error)
}

// Revert is how far a machine is on its way back.
type Revert struct {
	// PowerOff: the machine must be off before it can go on. It is powered off hard, and stays off until Done.
	PowerOff bool
	// Busy: the machine must neither be started nor changed now.
	Busy bool
	// MemoryClaim is a claim of the memory that the machine is to go on from; it is not used up by that.
	MemoryClaim string
	Done        bool
}

// Reconciler of VirtualMachines.
type Reconciler struct {
	client.Client
	// Live reads past the cache.
	Live      client.Reader
	Events    events.EventRecorder
	Bootstrap Bootstrap // may be nil: machines without a seed disk
	Snapshots Snapshots // may be nil: no snapshots
	Clock     clock.PassiveClock

	restarts restarts.Restarts
	suspends restarts.Suspends
}

// Hooks are what other packages add.
type Hooks struct {
	Bootstrap Bootstrap
	Snapshots Snapshots
}

// Setup returns a function that adds the controller to a manager.
func Setup(hooks Hooks) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		r := &Reconciler{
			Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Events: mgr.GetEventRecorder("virtualmachine"),
			Bootstrap: hooks.Bootstrap, Snapshots: hooks.Snapshots, Clock: clock.RealClock{},
		}
		if err := addIndexes(mgr); err != nil {
			return fmt.Errorf("setting up the controller of VirtualMachines: %w", err)
		}
		b := ctrl.NewControllerManagedBy(mgr).
			Named("virtualmachine").
			For(&vmopv1.VirtualMachine{}).
			Owns(&corev1.Pod{}).
			WithOptions(controller.Options{
				MaxConcurrentReconciles: 8,
				RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](retryFirst, retryMost),
			})
		if err := r.watch(b).Complete(r); err != nil {
			return fmt.Errorf("setting up the controller of VirtualMachines: %w", err)
		}
		return nil
	}
}

// Reconcile does what one VirtualMachine needs now.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	vm := &vmopv1.VirtualMachine{}
	if err := r.Get(ctx, req.NamespacedName, vm); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if paused(vm) {
		return ctrl.Result{}, r.pause(ctx, vm)
	}
	if vm.DeletionTimestamp != nil {
		return r.finalize(ctx, vm)
	}
	if err := r.complete(ctx, vm); err != nil {
		return ctrl.Result{}, ignoreConflict(err)
	}
	before := vm.DeepCopy()
	v := &view{vm: vm}
	var failed []error
	for _, step := range r.steps() {
		if err := step(ctx, v); err != nil {
			failed = append(failed, err)
			v.incomplete = true
			if v.stop {
				break
			}
		}
	}
	keepTimes(before.Status.Conditions, vm.Status.Conditions)
	if !equality.Semantic.DeepEqual(before.Status, vm.Status) {
		failed = append(failed, r.writeStatus(ctx, before, vm))
		r.announce(before, vm)
	}
	switch err := errors.Join(failed...); {
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause): // which would wait for its pods, and so for guests
		return ctrl.Result{}, client.IgnoreNotFound(r.Delete(ctx, vm))
	case apierrors.IsConflict(err):
		log.FromContext(ctx).V(1).Info("something has changed meanwhile", "reason", err.Error())
		return ctrl.Result{RequeueAfter: retryFirst}, nil
	case err != nil:
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: v.again}, nil
}

// keepTimes gives conditions back the times that they had, if steps have only set them to and fro.
func keepTimes(before, now []metav1.Condition) {
	for i := range now {
		if was := meta.FindStatusCondition(before, now[i].Type); was != nil && was.Status == now[i].Status {
			now[i].LastTransitionTime = was.LastTransitionTime
		}
	}
}

// step adds to the view. A condition says what is missing; an error is one of the API server, to be tried again.
type step func(ctx context.Context, v *view) error

func (r *Reconciler) steps() []step {
	return []step{
		r.look, r.class, r.policy, r.image, r.storage, r.network, r.bootstrap,
		r.bootDisk, r.volumes, r.cdroms, r.revert, r.power, r.status,
	}
}

// complete sets what a webhook would have set.
func (r *Reconciler) complete(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	before := vm.DeepCopy()
	if controllerutil.AddFinalizer(vm, Finalizer) {
		status := vm.Status
		if err := r.Patch(ctx, vm, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return fmt.Errorf("adding the finalizer: %w", err)
		}
		vm.Status = status
	}
	return nil
}

// writeStatus writes the status, if nobody else has meanwhile.
func (r *Reconciler) writeStatus(ctx context.Context, before, vm *vmopv1.VirtualMachine) error {
	base := before.DeepCopy()
	base.ResourceVersion = vm.ResourceVersion
	if err := r.Status().Patch(ctx, vm, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("writing the status: %w", client.IgnoreNotFound(err))
	}
	return nil
}

func ignoreConflict(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// paused tells whether somebody has asked that the machine is left alone.
func paused(vm *vmopv1.VirtualMachine) bool {
	_, annotated := vm.Annotations[vmopv1.PauseAnnotation]
	_, labelled := vm.Labels[vmopv1.PausedVMLabelKey]
	return annotated || labelled
}

func (r *Reconciler) pause(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	before := vm.DeepCopy()
	condition.False(&vm.Status.Conditions, vmopv1.VirtualMachineReconcileReady, vmopv1.VirtualMachineReconcilePausedReason,
		"the virtual machine is left as it is while it has the annotation or label %s", vmopv1.PauseAnnotation)
	if equality.Semantic.DeepEqual(before.Status, vm.Status) {
		return nil
	}
	return r.writeStatus(ctx, before, vm)
}
