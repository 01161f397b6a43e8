package virtualmachineclass

import (
	"context"
	"fmt"
	"slices"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// InUse lists the instances that VirtualMachines of a namespace have.
type InUse func(ctx context.Context, c client.Reader, namespace string) (map[string]bool, error)

// Setup returns a function that adds both controllers to a manager.
func Setup(inUse InUse) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		p := &Provider{Client: mgr.GetClient(), Pace: rate.NewLimiter(rate.Every(pace), burst)}
		err := ctrl.NewControllerManagedBy(mgr).
			Named("virtualmachineclass-defaults").
			For(&corev1.Namespace{}).
			Watches(&vmopv1.VirtualMachineClass{}, handler.EnqueueRequestsFromMapFunc(ofDefault)).
			Complete(p)
		if err != nil {
			return fmt.Errorf("setting up default VirtualMachineClasses: %w", err)
		}
		i := &Instances{Client: mgr.GetClient(), InUse: inUse}
		err = ctrl.NewControllerManagedBy(mgr).
			Named("virtualmachineclassinstance").
			For(&vmopv1.VirtualMachineClass{}).
			Watches(&vmopv1.VirtualMachineClassInstance{}, handler.EnqueueRequestsFromMapFunc(ofInstance)).
			Complete(i)
		if err != nil {
			return fmt.Errorf("setting up the controller of VirtualMachineClassInstances: %w", err)
		}
		return nil
	}
}

// ofDefault has a namespace looked at whose default class has changed, or is gone.
func ofDefault(_ context.Context, obj client.Object) []reconcile.Request {
	if obj.GetLabels()[DefaultLabel] == "" {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Name: obj.GetNamespace()}}}
}

// ofInstance has the class of an instance looked at.
func ofInstance(_ context.Context, obj client.Object) []reconcile.Request {
	class := obj.GetAnnotations()[classAnnotation]
	if class == "" {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: obj.GetNamespace(), Name: class}}}
}

// The default classes of a few new namespaces are made at once, those of many one namespace after the other: they are
// the greater part of what the API server has to do for a namespace, and need not be there first.
const (
	burst = 16
	pace  = time.Second
)

// Provider makes default classes.
type Provider struct {
	client.Client
	// Pace bounds how fast namespaces get them.
	Pace *rate.Limiter
}

// Reconcile makes those that a namespace lacks.
func (p *Provider) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	ns := &corev1.Namespace{}
	if err := p.Get(ctx, req.NamespacedName, ns); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if ns.DeletionTimestamp != nil || System(ns.Name) || ns.Labels[ProvideLabel] == ProvideNone {
		return ctrl.Result{}, nil
	}
	var have vmopv1.VirtualMachineClassList
	if err := p.List(ctx, &have, client.InNamespace(ns.Name)); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing VirtualMachineClasses: %w", err)
	}
	known := map[string]bool{}
	for _, c := range have.Items {
		known[c.Name] = true
	}
	missing := slices.DeleteFunc(Defaults(ns.Name), func(c *vmopv1.VirtualMachineClass) bool { return known[c.Name] })
	if len(missing) == 0 {
		return ctrl.Result{}, nil
	}
	if turn := p.Pace.Reserve(); turn.Delay() > 0 {
		wait := turn.Delay()
		turn.Cancel()
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	for _, c := range missing {
		if err := p.Create(ctx, c); err != nil && !apierrors.IsAlreadyExists(err) {
			if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
				return ctrl.Result{}, nil
			}
			return ctrl.Result{}, fmt.Errorf("making VirtualMachineClass %s: %w", c.Name, err)
		}
	}
	return ctrl.Result{}, nil
}

// Instances keeps the instances of a class.
type Instances struct {
	client.Client
	InUse InUse
}

// Reconcile makes the active instance, and deletes others that nobody has.
func (i *Instances) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	class := &vmopv1.VirtualMachineClass{}
	current := ""
	switch err := i.Get(ctx, req.NamespacedName, class); {
	case apierrors.IsNotFound(err):
	case err != nil:
		return ctrl.Result{}, err
	case class.DeletionTimestamp == nil:
		current = InstanceName(class)
		if err := i.activate(ctx, class); err != nil {
			return ctrl.Result{}, err
		}
	}
	var all vmopv1.VirtualMachineClassInstanceList
	if err := i.List(ctx, &all, client.InNamespace(req.Namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing VirtualMachineClassInstances: %w", err)
	}
	var used map[string]bool
	for n := range all.Items {
		other := &all.Items[n]
		if ClassOf(other) != req.Name || other.Name == current {
			continue
		}
		if used == nil {
			var err error
			if used, err = i.InUse(ctx, i.Client, req.Namespace); err != nil {
				return ctrl.Result{}, err
			}
		}
		if err := i.retire(ctx, other, used[other.Name]); err != nil {
			return ctrl.Result{}, err
		}
	}
	return ctrl.Result{}, nil
}

// Ensure returns the instance of a class as it is now. It makes it if the controller of instances has not yet.
func Ensure(ctx context.Context, c client.Client, class *vmopv1.VirtualMachineClass) (*vmopv1.VirtualMachineClassInstance, error) {
	have := &vmopv1.VirtualMachineClassInstance{}
	err := c.Get(ctx, client.ObjectKey{Namespace: class.Namespace, Name: InstanceName(class)}, have)
	switch {
	case err == nil:
		return have, nil
	case !apierrors.IsNotFound(err):
		return nil, fmt.Errorf("reading VirtualMachineClassInstance %s: %w", InstanceName(class), err)
	}
	instance := NewInstance(class)
	if err := c.Create(ctx, instance.DeepCopy()); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("making VirtualMachineClassInstance %s: %w", instance.Name, err)
	}
	return instance, nil
}

// activate makes the instance of a class, or marks it.
func (i *Instances) activate(ctx context.Context, class *vmopv1.VirtualMachineClass) error {
	have, err := Ensure(ctx, i.Client, class)
	if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return nil
	}
	if err != nil || have.Labels[vmopv1.VMClassInstanceActiveLabelKey] == active {
		return err
	}
	before := have.DeepCopy()
	if have.Labels == nil {
		have.Labels = map[string]string{}
	}
	have.Labels[vmopv1.VMClassInstanceActiveLabelKey] = active
	return client.IgnoreNotFound(i.Patch(ctx, have, client.MergeFrom(before)))
}

// retire deletes an instance that is not the class's any more, or marks it while a machine has it.
func (i *Instances) retire(ctx context.Context, other *vmopv1.VirtualMachineClassInstance, used bool) error {
	if !used {
		return client.IgnoreNotFound(i.Delete(ctx, other))
	}
	if _, marked := other.Labels[vmopv1.VMClassInstanceActiveLabelKey]; !marked {
		return nil
	}
	before := other.DeepCopy()
	delete(other.Labels, vmopv1.VMClassInstanceActiveLabelKey)
	return client.IgnoreNotFound(i.Patch(ctx, other, client.MergeFrom(before)))
}
