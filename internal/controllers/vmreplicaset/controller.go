package vmreplicaset

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"atoll.dev/atoll/internal/controllers/condition"
)

const (
	// batch is how many machines are made or deleted in one pass; the next pass follows at once.
	batch = 20
	// retryRefused is when a machine that was refused is tried again.
	retryRefused = 15 * time.Second
	// reasonInvalid is the reason of ReplicaFailure when the object itself is wrong.
	reasonInvalid = "Invalid"
	// reasonDeletionFailed is the reason of ReplicaFailure when machines cannot be deleted.
	reasonDeletionFailed = "VirtualMachineDeletionFailed"
	// reasonNotReady is the reason of VirtualMachinesReady while it is not True.
	reasonNotReady = "NotReady"
)

// Reconciler keeps the machines of replica sets.
type Reconciler struct {
	client.Client
	// Reader reads past the cache: what was made a moment ago must not be made again.
	Reader client.Reader
	Events events.EventRecorder
}

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	r := &Reconciler{Client: mgr.GetClient(), Reader: mgr.GetAPIReader(), Events: mgr.GetEventRecorder("virtualmachinereplicaset")}
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachinereplicaset").
		For(&vmopv1.VirtualMachineReplicaSet{}).
		Owns(&vmopv1.VirtualMachine{}).
		Watches(&vmopv1.VirtualMachine{}, handler.EnqueueRequestsFromMapFunc(r.orphanOf)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachineReplicaSets: %w", err)
	}
	return nil
}

// orphanOf names the replica sets that may adopt a machine without a controller.
func (r *Reconciler) orphanOf(ctx context.Context, vm client.Object) []reconcile.Request {
	if metav1.GetControllerOf(vm) != nil || len(vm.GetLabels()) == 0 {
		return nil
	}
	var list vmopv1.VirtualMachineReplicaSetList
	if err := r.List(ctx, &list, client.InNamespace(vm.GetNamespace())); err != nil {
		return nil // the informer that failed will tell
	}
	var out []reconcile.Request
	for _, rs := range list.Items {
		if s, err := selector(&rs); err == nil && s.Matches(labels.Set(vm.GetLabels())) {
			out = append(out, reconcile.Request{NamespacedName: types.NamespacedName{Namespace: rs.Namespace, Name: rs.Name}})
		}
	}
	return out
}

// selector of a replica set. It must be there and match the template.
func selector(rs *vmopv1.VirtualMachineReplicaSet) (labels.Selector, error) {
	if rs.Spec.Selector == nil || len(rs.Spec.Selector.MatchLabels)+len(rs.Spec.Selector.MatchExpressions) == 0 {
		return nil, errors.New("spec.selector is empty; name labels that spec.template.metadata.labels has")
	}
	s, err := metav1.LabelSelectorAsSelector(rs.Spec.Selector)
	if err != nil {
		return nil, fmt.Errorf("spec.selector: %w", err)
	}
	if !s.Matches(labels.Set(rs.Spec.Template.Labels)) {
		return nil, fmt.Errorf("spec.selector %q does not match spec.template.metadata.labels; add the labels to the template", s)
	}
	return s, nil
}

// Reconcile makes and deletes machines until there are as many as there should be.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	rs := &vmopv1.VirtualMachineReplicaSet{}
	if err := r.Get(ctx, req.NamespacedName, rs); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !rs.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil // the machines are owned, the garbage collector deletes them
	}
	before := rs.DeepCopy()
	matching, err := selector(rs)
	if err != nil {
		condition.True(&rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure)
		setReason(rs, reasonInvalid, err.Error())
		rs.Status.ObservedGeneration = rs.Generation
		return ctrl.Result{}, r.write(ctx, before, rs, "")
	}
	owned, err := r.machines(ctx, rs, matching)
	if err != nil {
		return ctrl.Result{}, err
	}
	more, scaleErr := r.scale(ctx, rs, owned)
	if err := r.status(ctx, before, rs, matching, owned); err != nil {
		return ctrl.Result{}, errors.Join(scaleErr, err)
	}
	if apierrors.IsForbidden(scaleErr) || apierrors.IsInvalid(scaleErr) || apierrors.IsBadRequest(scaleErr) {
		return ctrl.Result{RequeueAfter: retryRefused}, nil // the conditions say it; quota and images come and go
	}
	if more && scaleErr == nil {
		return ctrl.Result{RequeueAfter: 1}, nil // as soon as others have had their turn
	}
	return ctrl.Result{}, scaleErr
}

// machines returns the replica set's machines, after adopting and letting go.
func (r *Reconciler) machines(ctx context.Context, rs *vmopv1.VirtualMachineReplicaSet, matching labels.Selector) ([]*vmopv1.VirtualMachine, error) {
	var list vmopv1.VirtualMachineList
	if err := r.Reader.List(ctx, &list, client.InNamespace(rs.Namespace)); err != nil {
		return nil, fmt.Errorf("listing virtual machines: %w", err)
	}
	var out []*vmopv1.VirtualMachine
	for i := range list.Items {
		vm := &list.Items[i]
		matches, owner := matching.Matches(labels.Set(vm.Labels)), metav1.GetControllerOf(vm)
		switch {
		case owner != nil && owner.UID == rs.UID && matches:
			out = append(out, vm)
		case owner != nil && owner.UID == rs.UID && vm.DeletionTimestamp.IsZero():
			if err := r.release(ctx, rs, vm); err != nil {
				return nil, err
			}
		case owner == nil && matches && vm.DeletionTimestamp.IsZero():
			if err := r.adopt(ctx, rs, vm); err != nil {
				return nil, err
			}
			out = append(out, vm)
		}
	}
	return out, nil
}

func (r *Reconciler) adopt(ctx context.Context, rs *vmopv1.VirtualMachineReplicaSet, vm *vmopv1.VirtualMachine) error {
	base := vm.DeepCopy()
	if err := controllerutil.SetControllerReference(rs, vm, r.Scheme()); err != nil {
		return fmt.Errorf("adopting virtual machine %s: %w", vm.Name, err)
	}
	if err := r.Patch(ctx, vm, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("adopting virtual machine %s: %w", vm.Name, err)
	}
	r.Events.Eventf(rs, vm, corev1.EventTypeNormal, "Adopted", "Adopt", "virtual machine %s matches the selector and had no owner", vm.Name)
	return nil
}

func (r *Reconciler) release(ctx context.Context, rs *vmopv1.VirtualMachineReplicaSet, vm *vmopv1.VirtualMachine) error {
	base := vm.DeepCopy()
	vm.OwnerReferences = slices.DeleteFunc(vm.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == rs.UID })
	delete(vm.Labels, vmopv1.VirtualMachineReplicaSetNameLabel)
	if err := r.Patch(ctx, vm, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("letting go of virtual machine %s: %w", vm.Name, client.IgnoreNotFound(err))
	}
	r.Events.Eventf(rs, vm, corev1.EventTypeNormal, "Released", "Release", "virtual machine %s does not match the selector any more", vm.Name)
	return nil
}

// desired is how many machines there should be.
func desired(rs *vmopv1.VirtualMachineReplicaSet) int {
	if rs.Spec.Replicas == nil {
		return 1
	}
	return max(0, int(*rs.Spec.Replicas))
}

// scale makes or deletes up to a batch of machines and tells whether more are to follow. It sets the conditions
// about that.
func (r *Reconciler) scale(ctx context.Context, rs *vmopv1.VirtualMachineReplicaSet, owned []*vmopv1.VirtualMachine) (bool, error) {
	var living []*vmopv1.VirtualMachine
	for _, vm := range owned {
		if vm.DeletionTimestamp.IsZero() {
			living = append(living, vm)
		}
	}
	want, have := desired(rs), len(living)
	switch {
	case have < want:
		condition.False(&rs.Status.Conditions, vmopv1.ResizedCondition, vmopv1.ScalingUpReason, "scaling up to %d replicas, there are %d", want, have)
		for range min(batch, want-have) {
			if err := r.create(ctx, rs); err != nil {
				condition.False(&rs.Status.Conditions, vmopv1.VirtualMachinesCreatedCondition, vmopv1.VirtualMachineCreationFailedReason, "%s", err)
				fail(rs, vmopv1.VirtualMachineCreationFailedReason, err)
				return false, err
			}
		}
	case have > want:
		condition.False(&rs.Status.Conditions, vmopv1.ResizedCondition, vmopv1.ScalingDownReason, "scaling down to %d replicas, there are %d", want, have)
		slices.SortFunc(living, worstFirst)
		for _, vm := range living[:min(batch, have-want)] {
			err := r.Delete(ctx, vm, client.Preconditions{UID: &vm.UID})
			if client.IgnoreNotFound(err) != nil {
				err = fmt.Errorf("deleting virtual machine %s: %w", vm.Name, err)
				fail(rs, reasonDeletionFailed, err)
				return false, err
			}
			r.Events.Eventf(rs, vm, corev1.EventTypeNormal, "SuccessfulDelete", "Scale", "deleted virtual machine %s", vm.Name)
		}
	case len(owned) == want:
		condition.True(&rs.Status.Conditions, vmopv1.ResizedCondition)
	}
	condition.True(&rs.Status.Conditions, vmopv1.VirtualMachinesCreatedCondition)
	condition.Remove(&rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure)
	return have+batch < want || have-batch > want, nil
}

// fail sets ReplicaFailure, which is True when something is wrong.
func fail(rs *vmopv1.VirtualMachineReplicaSet, reason string, err error) {
	condition.True(&rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure)
	setReason(rs, reason, err.Error())
}

func setReason(rs *vmopv1.VirtualMachineReplicaSet, reason, message string) {
	c := condition.Get(rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure)
	c.Reason, c.Message = reason, message
}

// worstFirst orders machines by how little is lost with them.
func worstFirst(a, b *vmopv1.VirtualMachine) int {
	if isReady(a) != isReady(b) {
		if isReady(b) {
			return -1
		}
		return 1
	}
	return cmp.Or(b.CreationTimestamp.Compare(a.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
}

// create makes one machine of the template.
func (r *Reconciler) create(ctx context.Context, rs *vmopv1.VirtualMachineReplicaSet) error {
	vm := &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:    rs.Namespace,
			GenerateName: rs.Name + "-",
			Labels:       maps.Clone(rs.Spec.Template.Labels),
			Annotations:  maps.Clone(rs.Spec.Template.Annotations),
		},
		Spec: *rs.Spec.Template.Spec.DeepCopy(),
	}
	metav1.SetMetaDataLabel(&vm.ObjectMeta, vmopv1.VirtualMachineReplicaSetNameLabel, labelValue(rs.Name))
	if err := controllerutil.SetControllerReference(rs, vm, r.Scheme()); err != nil {
		return fmt.Errorf("making a virtual machine: %w", err)
	}
	if err := r.Create(ctx, vm); err != nil {
		r.Events.Eventf(rs, nil, corev1.EventTypeWarning, "FailedCreate", "Scale", "making a virtual machine: %s", err)
		return fmt.Errorf("making a virtual machine: %w", err)
	}
	r.Events.Eventf(rs, vm, corev1.EventTypeNormal, "SuccessfulCreate", "Scale", "made virtual machine %s", vm.Name)
	return nil
}

// labelValue is the name of a replica set as a label, which is at most 63 characters long.
func labelValue(name string) string {
	const longest = 63
	if len(name) <= longest {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return name[:longest-9] + "-" + hex.EncodeToString(sum[:4])
}

// isReady tells whether a machine does its work.
func isReady(vm *vmopv1.VirtualMachine) bool {
	if vm.Spec.ReadinessProbe != nil || condition.Get(vm.Status.Conditions, vmopv1.ReadyConditionType) != nil {
		return condition.IsTrue(vm.Status.Conditions, vmopv1.ReadyConditionType)
	}
	return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn && vm.Status.Network != nil &&
		(vm.Status.Network.PrimaryIP4 != "" || vm.Status.Network.PrimaryIP6 != "")
}

// status counts the machines and writes the status.
func (r *Reconciler) status(ctx context.Context, before, rs *vmopv1.VirtualMachineReplicaSet, matching labels.Selector, owned []*vmopv1.VirtualMachine) error {
	st := &rs.Status
	st.Replicas, st.ReadyReplicas, st.FullyLabeledReplicas, st.ObservedGeneration = 0, 0, 0, rs.Generation
	template := labels.SelectorFromSet(rs.Spec.Template.Labels)
	var waiting []string
	for _, vm := range owned {
		if !vm.DeletionTimestamp.IsZero() {
			continue
		}
		st.Replicas++
		if template.Matches(labels.Set(vm.Labels)) {
			st.FullyLabeledReplicas++
		}
		if isReady(vm) {
			st.ReadyReplicas++
		} else {
			waiting = append(waiting, vm.Name)
		}
	}
	if want := desired(rs); int(st.ReadyReplicas) >= want {
		condition.True(&st.Conditions, vmopv1.VirtualMachinesReadyCondition)
	} else {
		slices.Sort(waiting)
		condition.False(&st.Conditions, vmopv1.VirtualMachinesReadyCondition, reasonNotReady, "%d of %d are ready%s", st.ReadyReplicas, want, named(waiting))
	}
	return r.write(ctx, before, rs, matching.String())
}

// named lists a few names.
func named(names []string) string {
	const few = 5
	if len(names) == 0 {
		return ""
	}
	text := "; not ready: "
	for i, n := range names {
		if i == few {
			return text + ", and others"
		}
		if i > 0 {
			text += ", "
		}
		text += n
	}
	return text
}

// write patches the status, and status.selector, which the type does not have, beside it.
func (r *Reconciler) write(ctx context.Context, before, rs *vmopv1.VirtualMachineReplicaSet, matching string) error {
	if !equality.Semantic.DeepEqual(before.Status, rs.Status) {
		if err := r.Status().Patch(ctx, rs, client.MergeFrom(before)); err != nil {
			return client.IgnoreNotFound(err)
		}
	}
	if matching == "" {
		return nil
	}
	raw := &unstructured.Unstructured{}
	raw.SetGroupVersionKind(vmopv1.GroupVersion.WithKind("VirtualMachineReplicaSet"))
	if err := r.Reader.Get(ctx, client.ObjectKeyFromObject(rs), raw); err != nil {
		return client.IgnoreNotFound(err)
	}
	if have, _, _ := unstructured.NestedString(raw.Object, "status", "selector"); have == matching {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"selector": matching}})
	if err != nil {
		return fmt.Errorf("writing the selector: %w", err)
	}
	return client.IgnoreNotFound(r.Status().Patch(ctx, raw, client.RawPatch(types.MergePatchType, patch)))
}
