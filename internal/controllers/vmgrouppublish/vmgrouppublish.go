// Package vmgrouppublish makes images of the machines of a group: it answers VirtualMachineGroupPublishRequests with a
// VirtualMachinePublishRequest for each machine, and sums up how those are.
//
// The machines are those that the request names, or all of the group and of the groups in it, found once. The requests
// are owned by it. What can go wrong is in the condition Complete and in the conditions of the requests, which the
// status repeats. The controllers' manager in the server calls Setup.
package vmgrouppublish

import (
	"cmp"
	"context"
	"crypto/sha256"
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

	"atoll.dev/atoll/internal/controllers/condition"
)

const (
	// lookEvery is how often the group is looked at while it is not ready.
	lookEvery = 5 * time.Second
	// maxDepth is how deep groups may be in groups.
	maxDepth = 32
	// reasonSource says that there is nothing to publish.
	reasonSource = "SourceVirtualMachineGroupNotValid"
)

// Reconciler answers requests.
type Reconciler struct {
	client.Client
	// Now is the clock.
	Now func() time.Time
}

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	r := &Reconciler{Client: mgr.GetClient(), Now: time.Now}
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachinegrouppublishrequest").
		For(&vmopv1.VirtualMachineGroupPublishRequest{}).
		Owns(&vmopv1.VirtualMachinePublishRequest{}).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachineGroupPublishRequests: %w", err)
	}
	return nil
}

// Reconcile makes the requests of one group and follows them.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	g := &vmopv1.VirtualMachineGroupPublishRequest{}
	if err := r.Get(ctx, req.NamespacedName, g); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if g.DeletionTimestamp != nil {
		return ctrl.Result{}, nil
	}
	complete := vmopv1.VirtualMachineGroupPublishRequestConditionComplete
	if condition.IsTrue(g.Status.Conditions, complete) {
		return r.expire(ctx, g)
	}
	base := g.DeepCopy()
	if g.Status.StartTime.IsZero() {
		g.Status.StartTime = metav1.NewTime(r.Now())
	}
	g.Status.Source, g.Status.Target = cmp.Or(g.Spec.Source, g.Name), g.Spec.Target
	again, err := r.publish(ctx, g)
	if condition.IsTrue(g.Status.Conditions, complete) {
		g.Status.CompletionTime = condition.Get(g.Status.Conditions, complete).LastTransitionTime
	}
	if !equality.Semantic.DeepEqual(base.Status, g.Status) {
		if writeErr := r.Status().Patch(ctx, g, client.MergeFrom(base)); client.IgnoreNotFound(writeErr) != nil {
			err = errors.Join(err, fmt.Errorf("writing the status: %w", writeErr))
		}
	}
	if err == nil && condition.IsTrue(g.Status.Conditions, complete) {
		return r.expire(ctx, g)
	}
	return ctrl.Result{RequeueAfter: again}, err
}

// expire deletes a request whose time is over. The items that were made stay.
func (r *Reconciler) expire(ctx context.Context, g *vmopv1.VirtualMachineGroupPublishRequest) (ctrl.Result, error) {
	if g.Spec.TTLSecondsAfterFinished == nil {
		return ctrl.Result{}, nil
	}
	left := g.Status.CompletionTime.Add(time.Duration(*g.Spec.TTLSecondsAfterFinished) * time.Second).Sub(r.Now())
	if left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(r.Delete(ctx, g, client.Preconditions{UID: &g.UID}))
}

func (r *Reconciler) publish(ctx context.Context, g *vmopv1.VirtualMachineGroupPublishRequest) (time.Duration, error) {
	complete := vmopv1.VirtualMachineGroupPublishRequestConditionComplete
	if len(g.Status.Images) == 0 {
		names, why, err := r.machines(ctx, g)
		if err != nil {
			return 0, err
		}
		if why != "" {
			condition.False(&g.Status.Conditions, complete, reasonSource, "%s", why)
			return lookEvery, nil
		}
		for _, name := range names {
			g.Status.Images = append(g.Status.Images, vmopv1.VirtualMachineGroupPublishRequestImageStatus{Source: name, PublishRequestName: requestName(g, name)})
		}
	}
	var open []string
	for i := range g.Status.Images {
		image := &g.Status.Images[i]
		p, err := r.request(ctx, g, image)
		if err != nil {
			return 0, err
		}
		image.ImageName, image.Conditions = p.Status.ImageName, p.Status.Conditions
		if !p.Status.Ready {
			open = append(open, image.Source)
		}
	}
	if len(open) > 0 {
		condition.False(&g.Status.Conditions, complete, vmopv1.VirtualMachineGroupPublishRequestConditionReasonPending, "%d of %d are not published yet: %s; see status.images",
			len(open), len(g.Status.Images), strings.Join(open[:min(len(open), 10)], ", "))
		return 0, nil
	}
	condition.True(&g.Status.Conditions, complete)
	return 0, nil
}

// machines are the names of what is published, or why there are none.
func (r *Reconciler) machines(ctx context.Context, g *vmopv1.VirtualMachineGroupPublishRequest) ([]string, string, error) {
	all, why, err := r.members(ctx, g.Namespace, g.Status.Source, maxDepth)
	if err != nil || why != "" {
		return nil, why, err
	}
	slices.Sort(all)
	all = slices.Compact(all)
	if len(g.Spec.VirtualMachines) > 0 {
		for _, name := range g.Spec.VirtualMachines {
			if !slices.Contains(all, name) {
				return nil, fmt.Sprintf("virtual machine %q of spec.virtualMachines is not a member of group %s", name, g.Status.Source), nil
			}
		}
		all = slices.Compact(slices.Sorted(slices.Values(g.Spec.VirtualMachines)))
	}
	if len(all) == 0 {
		return nil, fmt.Sprintf("group %s has no virtual machines", g.Status.Source), nil
	}
	return all, "", nil
}

// members of a group and of the groups in it.
func (r *Reconciler) members(ctx context.Context, namespace, name string, depth int) ([]string, string, error) {
	group := &vmopv1.VirtualMachineGroup{}
	err := r.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, group)
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Sprintf("there is no VirtualMachineGroup %q in this namespace; correct spec.source", name), nil
	case err != nil:
		return nil, "", fmt.Errorf("reading group %s: %w", name, err)
	case !condition.IsTrue(group.Status.Conditions, vmopv1.ReadyConditionType):
		return nil, fmt.Sprintf("group %s is not ready; see its conditions", name), nil
	case depth == 0:
		return nil, fmt.Sprintf("group %s is too deep in other groups", name), nil
	}
	var out []string
	for _, order := range group.Spec.BootOrder {
		for _, m := range order.Members {
			if m.Kind != group.GetMemberKind() {
				out = append(out, m.Name)
				continue
			}
			more, why, err := r.members(ctx, namespace, m.Name, depth-1)
			if err != nil || why != "" {
				return nil, why, err
			}
			out = append(out, more...)
		}
	}
	return out, "", nil
}

// requestName is unique for a request and a machine and short enough.
func requestName(g *vmopv1.VirtualMachineGroupPublishRequest, machine string) string {
	const longest = 200
	name := g.Name + "-" + machine
	return fmt.Sprintf("%s-%x", strings.TrimRight(name[:min(len(name), longest)], ".-"), sha256.Sum256([]byte(string(g.UID)+"/"+machine)))[:min(len(name), longest)+9]
}

// request is the one of a machine, made if it is missing.
func (r *Reconciler) request(ctx context.Context, g *vmopv1.VirtualMachineGroupPublishRequest, image *vmopv1.VirtualMachineGroupPublishRequestImageStatus) (*vmopv1.VirtualMachinePublishRequest, error) {
	p := &vmopv1.VirtualMachinePublishRequest{}
	err := r.Get(ctx, client.ObjectKey{Namespace: g.Namespace, Name: image.PublishRequestName}, p)
	if err == nil {
		return p, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("reading VirtualMachinePublishRequest %s: %w", image.PublishRequestName, err)
	}
	p = &vmopv1.VirtualMachinePublishRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: g.Namespace, Name: image.PublishRequestName, Labels: map[string]string{vmopv1.VirtualMachinePublishRequestManagedByLabelKey: label(g.Name)}},
		Spec: vmopv1.VirtualMachinePublishRequestSpec{
			Source: vmopv1.VirtualMachinePublishRequestSource{Name: image.Source, APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachine"},
			Target: vmopv1.VirtualMachinePublishRequestTarget{Location: vmopv1.VirtualMachinePublishRequestTargetLocation{Name: g.Spec.Target}},
		},
	}
	if err := controllerutil.SetControllerReference(g, p, r.Scheme()); err != nil {
		return nil, fmt.Errorf("owning VirtualMachinePublishRequest %s: %w", p.Name, err)
	}
	if err := r.Create(ctx, p); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("making VirtualMachinePublishRequest %s: %w", p.Name, err)
	}
	return p, nil
}

// label is a name as a label, which is at most 63 characters long.
func label(name string) string {
	const longest = 63
	if len(name) <= longest {
		return name
	}
	return fmt.Sprintf("%s-%x", name[:longest-9], sha256.Sum256([]byte(name)))[:longest]
}
