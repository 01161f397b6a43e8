package virtualmachine

import (
	"context"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// finalize ends a VirtualMachine: its power is cut, its volumes are detached, what was made for it goes, and claims that
// the user made stay.
func (r *Reconciler) finalize(ctx context.Context, vm *vmopv1.VirtualMachine) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(vm, Finalizer) {
		return ctrl.Result{}, nil
	}
	for key := range vm.Annotations {
		if strings.HasPrefix(key, vmopv1.CheckAnnotationDelete+"/") {
			r.event(vm, normal, "DeletionHeldBack", "Delete", "annotation %s holds the deletion back", key)
			return ctrl.Result{}, nil
		}
	}
	v := &view{vm: vm}
	p := &corev1.Pod{}
	switch err := r.Live.Get(ctx, client.ObjectKeyFromObject(vm), p); {
	case err == nil && metav1.IsControlledBy(p, vm):
		v.pod = p
		if v.machine, err = running.Machine(p); err != nil {
			v.machine = machinev1.Machine{}
		}
		v.state = running.State(p)
		if p.DeletionTimestamp != nil {
			return ctrl.Result{RequeueAfter: lookAgain}, r.hurry(ctx, v)
		}
		return ctrl.Result{RequeueAfter: lookAgain}, r.deletePod(ctx, v, machinev1.Stop{Mode: machinev1.Hard})
	case err != nil && !apierrors.IsNotFound(err):
		return ctrl.Result{}, fmt.Errorf("reading the pod: %w", err)
	}
	attachments, err := attachment.List(ctx, r.Client, vm)
	if err != nil {
		return ctrl.Result{}, err
	}
	for i := range attachments {
		if err := attachment.Detach(ctx, r.Client, &attachments[i]); err != nil {
			return ctrl.Result{}, err
		}
	}
	if len(attachments) > 0 {
		return ctrl.Result{RequeueAfter: lookAgain}, nil
	}
	if err := r.letGoOfAll(ctx, vm); err != nil {
		return ctrl.Result{}, err
	}
	r.restarts.Forget(vm.UID)
	before := vm.DeepCopy()
	controllerutil.RemoveFinalizer(vm, Finalizer)
	if err := r.Patch(ctx, vm, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		if apierrors.IsConflict(err) {
			return ctrl.Result{RequeueAfter: retryFirst}, nil
		}
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	return ctrl.Result{}, nil
}

// letGoOfAll lets go of the user's claims and deletes our own.
func (r *Reconciler) letGoOfAll(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	var held, own corev1.PersistentVolumeClaimList
	if err := r.List(ctx, &held, client.InNamespace(vm.Namespace), client.MatchingFields{holderIndex: string(vm.UID)}); err != nil {
		return fmt.Errorf("listing PersistentVolumeClaims: %w", err)
	}
	for i := range held.Items {
		if err := attachment.LetGo(ctx, r.Client, vm, &held.Items[i]); err != nil {
			return err
		}
	}
	if err := r.List(ctx, &own, client.InNamespace(vm.Namespace), client.MatchingLabels{machinev1.UIDLabel: string(vm.UID)}); err != nil {
		return fmt.Errorf("listing PersistentVolumeClaims: %w", err)
	}
	for i := range own.Items {
		c := &own.Items[i]
		if !metav1.IsControlledBy(c, vm) || c.DeletionTimestamp != nil {
			continue
		}
		if err := r.Delete(ctx, c); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting PersistentVolumeClaim %s: %w", c.Name, err)
		}
	}
	return nil
}

// announce tells of what has changed in the status.
func (r *Reconciler) announce(before, vm *vmopv1.VirtualMachine) {
	if was := before.Status.PowerState; was != vm.Status.PowerState && (was != "" || vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn) {
		r.event(vm, normal, string(vm.Status.PowerState), "Power", "the machine is now %s", vm.Status.PowerState)
	}
	for _, c := range vm.Status.Conditions {
		if c.Status != metav1.ConditionFalse || c.Reason == "NotSynced" || c.Type == vmopv1.VirtualMachineToolsCondition || c.Type == readyCondition {
			continue
		}
		same := false
		for _, old := range before.Status.Conditions {
			same = same || old.Type == c.Type && old.Status == c.Status && old.Reason == c.Reason && old.Message == c.Message
		}
		if !same {
			r.event(vm, warning, c.Reason, "Reconcile", "%s: %s", c.Type, c.Message)
		}
	}
}
