package vmgroup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"atoll.dev/atoll/internal/controllers/condition"
)

// Reasons of conditions, VM Operator's.
const (
	reasonMembersNotReady = "MembersNotReady"
	reasonNotFound        = "NotFound"
	reasonNotMember       = "NotMember"
	reasonError           = "Error"
	reasonSetOwner        = "SetOwnerRefError"
	reasonPatchOwner      = "OwnerRefPatchError"
	reasonNotSynced       = "NotSynced"
	reasonPending         = "Pending"
	reasonPatchPower      = "PowerStatePatchError"
	reasonNotReady        = "NotReady"
)

const (
	kindMachine = "VirtualMachine"
	kindGroup   = "VirtualMachineGroup"
	// MaxDepth is how deep groups may be in groups.
	MaxDepth = 32
)

// Reconciler keeps groups.
type Reconciler struct {
	client.Client
	// Now is the clock.
	Now func() time.Time
}

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	r := &Reconciler{Client: mgr.GetClient(), Now: time.Now}
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachinegroup").
		For(&vmopv1.VirtualMachineGroup{}).
		Watches(&vmopv1.VirtualMachine{}, handler.EnqueueRequestsFromMapFunc(r.groupsOf)).
		Watches(&vmopv1.VirtualMachineGroup{}, handler.EnqueueRequestsFromMapFunc(r.groupsOf)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachineGroups: %w", err)
	}
	return nil
}

// Member is a VirtualMachine or a VirtualMachineGroup.
type Member interface {
	client.Object
	GetMemberKind() string
	GetGroupName() string
}

// Lists tells whether a machine or group is in the boot order of a group.
func Lists(g *vmopv1.VirtualMachineGroup, o Member) bool {
	return slices.ContainsFunc(members(g), func(x member) bool { return x.kind == o.GetMemberKind() && x.name == o.GetName() })
}

// groupsOf names the groups that an object is, was or wants to be in.
func (r *Reconciler) groupsOf(ctx context.Context, o client.Object) []reconcile.Request {
	m, ok := o.(Member)
	if !ok {
		return nil
	}
	var list vmopv1.VirtualMachineGroupList
	if err := r.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
		return nil // the informer that failed will tell
	}
	var out []reconcile.Request
	for i := range list.Items {
		g := &list.Items[i]
		if owns(g, o) || Lists(g, m) {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(g)})
		}
	}
	return out
}

func owns(g *vmopv1.VirtualMachineGroup, o client.Object) bool {
	return slices.ContainsFunc(o.GetOwnerReferences(), func(ref metav1.OwnerReference) bool { return ref.UID == g.UID })
}

// member is one name in spec.bootOrder.
type member struct {
	kind, name string
	// delay is after which time it is powered on.
	delay time.Duration

	object Member // nil when it does not exist
	linked bool
	status *vmopv1.VirtualMachineGroupMemberStatus
}

// members of a group, in order; a name that comes twice counts where it comes first.
func members(g *vmopv1.VirtualMachineGroup) []member {
	var out []member
	var delay time.Duration
	for _, order := range g.Spec.BootOrder {
		if order.PowerOnDelay != nil && order.PowerOnDelay.Duration > 0 {
			delay += order.PowerOnDelay.Duration
		}
		for _, m := range order.Members {
			kind := m.Kind
			if kind == "" {
				kind = kindMachine
			}
			if !slices.ContainsFunc(out, func(x member) bool { return x.kind == kind && x.name == m.Name }) {
				out = append(out, member{kind: kind, name: m.Name, delay: delay})
			}
		}
	}
	return out
}

// Reconcile brings one group up to date.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	g := &vmopv1.VirtualMachineGroup{}
	if err := r.Get(ctx, req.NamespacedName, g); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !g.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil // its members go with it, the garbage collector sees to that
	}
	before := g.DeepCopy()
	list := members(g)
	g.Status.Members = r.statuses(g, list)
	var failed error
	for i := range list {
		list[i].status = &g.Status.Members[i]
		failed = errors.Join(failed, r.link(ctx, g, &list[i]))
	}
	failed = errors.Join(failed, r.release(ctx, g, list))
	next, err := r.power(ctx, g, list)
	failed = errors.Join(failed, err)
	for i := range list {
		observe(&list[i])
	}
	sumUp(g)
	if !equality.Semantic.DeepEqual(before.Status, g.Status) {
		if err := r.Status().Patch(ctx, g, client.MergeFrom(before)); err != nil {
			failed = errors.Join(failed, client.IgnoreNotFound(err))
		}
	}
	if failed != nil {
		return ctrl.Result{}, failed
	}
	return ctrl.Result{RequeueAfter: next}, nil
}

// statuses are those of the members, with what is known of them already.
func (r *Reconciler) statuses(g *vmopv1.VirtualMachineGroup, list []member) []vmopv1.VirtualMachineGroupMemberStatus {
	out := make([]vmopv1.VirtualMachineGroupMemberStatus, len(list))
	for i, m := range list {
		out[i] = vmopv1.VirtualMachineGroupMemberStatus{Name: m.name, Kind: m.kind}
		for _, old := range g.Status.Members {
			if old.Kind == m.kind && old.Name == m.name {
				out[i].Conditions = slices.Clone(old.Conditions)
			}
		}
	}
	return out
}

// link finds a member and makes the group its owner.
func (r *Reconciler) link(ctx context.Context, g *vmopv1.VirtualMachineGroup, m *member) error {
	unlinked := func(reason, format string, args ...any) {
		m.status.Conditions = nil // nothing else is known then
		condition.False(&m.status.Conditions, vmopv1.VirtualMachineGroupMemberConditionGroupLinked, reason, format, args...)
	}
	var o Member = &vmopv1.VirtualMachine{}
	if m.kind == kindGroup {
		o = &vmopv1.VirtualMachineGroup{}
	}
	err := r.Get(ctx, client.ObjectKey{Namespace: g.Namespace, Name: m.name}, o)
	switch {
	case apierrors.IsNotFound(err):
		unlinked(reasonNotFound, "there is no %s %q in this namespace", m.kind, m.name)
		return nil
	case err != nil:
		unlinked(reasonError, "%s", err)
		return fmt.Errorf("reading member %s: %w", m.name, err)
	case o.GetGroupName() != g.Name:
		unlinked(reasonNotMember, "spec.groupName of it is %q; set it to %q", o.GetGroupName(), g.Name)
		return nil
	}
	if m.kind == kindGroup {
		cycle, err := r.above(ctx, g, m.name)
		if err != nil {
			unlinked(reasonError, "%s", err)
			return err
		}
		if cycle {
			unlinked(reasonError, "group %q is, by its spec.groupName, below %q itself; groups cannot go in circles", g.Name, m.name)
			return nil
		}
	}
	m.object, m.status.UID = o, o.GetUID()
	if !owns(g, o) && o.GetDeletionTimestamp() == nil {
		base := o.DeepCopyObject().(client.Object)
		if err := controllerutil.SetOwnerReference(g, o, r.Scheme()); err != nil {
			unlinked(reasonSetOwner, "%s", err)
			return fmt.Errorf("owning member %s: %w", m.name, err)
		}
		if err := r.Patch(ctx, o, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
			unlinked(reasonPatchOwner, "%s", err)
			return fmt.Errorf("owning member %s: %w", m.name, err)
		}
	}
	m.linked = true
	condition.True(&m.status.Conditions, vmopv1.VirtualMachineGroupMemberConditionGroupLinked)
	return nil
}

// above tells whether a group is above another one.
func (r *Reconciler) above(ctx context.Context, g *vmopv1.VirtualMachineGroup, name string) (bool, error) {
	up := g
	for range MaxDepth {
		if up.Name == name {
			return true, nil
		}
		if up.Spec.GroupName == "" {
			return false, nil
		}
		next := &vmopv1.VirtualMachineGroup{}
		err := r.Get(ctx, client.ObjectKey{Namespace: g.Namespace, Name: up.Spec.GroupName}, next)
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("reading group %s: %w", up.Spec.GroupName, err)
		}
		up = next
	}
	return true, nil
}

// release lets go of what was a member.
func (r *Reconciler) release(ctx context.Context, g *vmopv1.VirtualMachineGroup, list []member) error {
	var machines vmopv1.VirtualMachineList
	var groups vmopv1.VirtualMachineGroupList
	if err := errors.Join(r.List(ctx, &machines, client.InNamespace(g.Namespace)), r.List(ctx, &groups, client.InNamespace(g.Namespace))); err != nil {
		return fmt.Errorf("listing former members: %w", err)
	}
	var all []Member
	for i := range machines.Items {
		all = append(all, &machines.Items[i])
	}
	for i := range groups.Items {
		all = append(all, &groups.Items[i])
	}
	var failed error
	for _, o := range all {
		linked := slices.ContainsFunc(list, func(m member) bool { return m.linked && m.status.UID == o.GetUID() })
		if linked || !owns(g, o) || o.GetDeletionTimestamp() != nil {
			continue
		}
		base := o.DeepCopyObject().(client.Object)
		o.SetOwnerReferences(slices.DeleteFunc(slices.Clone(o.GetOwnerReferences()), func(ref metav1.OwnerReference) bool { return ref.UID == g.UID }))
		if err := r.Patch(ctx, o, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
			failed = errors.Join(failed, fmt.Errorf("letting go of %s: %w", o.GetName(), err))
		}
	}
	return failed
}

// observe adds to a linked member's status how it is.
func observe(m *member) {
	switch o := m.object.(type) {
	case *vmopv1.VirtualMachine:
		if o.Status.PowerState != "" {
			m.status.PowerState = new(o.Status.PowerState)
		}
		kind := vmopv1.VirtualMachineGroupMemberConditionPlacementReady
		switch {
		case o.Status.NodeName != "":
			m.status.Placement = &vmopv1.VirtualMachinePlacementStatus{Node: o.Status.NodeName, Zone: o.Status.Zone}
			condition.True(&m.status.Conditions, kind)
		case o.Spec.PowerState != vmopv1.VirtualMachinePowerStateOn && condition.IsTrue(o.Status.Conditions, vmopv1.VirtualMachineConditionCreated):
			// It is placed each time it is powered on.
			if o.Status.Zone != "" {
				m.status.Placement = &vmopv1.VirtualMachinePlacementStatus{Zone: o.Status.Zone}
			}
			condition.True(&m.status.Conditions, kind)
		default:
			why := "it has not been given a node yet"
			if c := condition.Get(o.Status.Conditions, vmopv1.VirtualMachineConditionPlacementReady); c != nil && c.Message != "" {
				why = c.Message
			}
			condition.False(&m.status.Conditions, kind, reasonNotReady, "%s", why)
		}
	case *vmopv1.VirtualMachineGroup:
		if c := condition.Get(o.Status.Conditions, vmopv1.ReadyConditionType); c != nil && c.Status == metav1.ConditionTrue {
			condition.True(&m.status.Conditions, vmopv1.ReadyConditionType)
		} else {
			why := "it has not been looked at yet"
			if c != nil {
				why = c.Message
			}
			condition.False(&m.status.Conditions, vmopv1.ReadyConditionType, reasonMembersNotReady, "%s", why)
		}
	}
}

// sumUp sets the group's condition.
func sumUp(g *vmopv1.VirtualMachineGroup) {
	var not []string
	for _, m := range g.Status.Members {
		if !condition.AllTrue(m.Conditions) {
			not = append(not, m.Name)
		}
	}
	if len(not) == 0 {
		condition.True(&g.Status.Conditions, vmopv1.ReadyConditionType)
		return
	}
	condition.False(&g.Status.Conditions, vmopv1.ReadyConditionType, reasonMembersNotReady, "%d of %d members are not ready: %s; see status.members",
		len(not), len(g.Status.Members), strings.Join(not[:min(len(not), 10)], ", "))
}
