// Package vmnetwork makes the default Network of each namespace, which is the pod network, and says of a Network which
// of its fields have no effect.
//
// Virtual machines need none: an interface that names no Network is on the pod network. Clients of VMware's API, such as
// the Cluster API provider for vSphere, look for the Network with a label, and name it in the machines that they make.
//
// It is set up in the server's manager. A Network that people have marked as the default is left as the only one. Little
// can go wrong: a Network of the default's name that is another is left alone.
package vmnetwork

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/fields"
)

// Default is the name of the default Network.
const Default = "primary"

// DefaultLabel marks the default Network of a namespace for Cluster API.
const DefaultLabel = "capv.vmware.com/is-default-network"

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("defaultnetwork").For(&corev1.Namespace{}).Complete(&namespaces{mgr.GetClient()})
	if err != nil {
		return fmt.Errorf("controller of default networks: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("network").For(&netop.Network{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Complete(&networks{mgr.GetClient(), clock.RealClock{}})
	if err != nil {
		return fmt.Errorf("controller of networks: %w", err)
	}
	return nil
}

// namespaces makes default networks.
type namespaces struct{ client client.Client }

// without are namespaces that nobody has virtual machines in.
func without() []string {
	return []string{metav1.NamespaceSystem, metav1.NamespacePublic, corev1.NamespaceNodeLease, "atoll-keys", "atoll-system"}
}

// Reconcile implements reconcile.Reconciler.
func (n *namespaces) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var ns corev1.Namespace
	if err := n.client.Get(ctx, req.NamespacedName, &ns); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if ns.DeletionTimestamp != nil || slices.Contains(without(), ns.Name) {
		return ctrl.Result{}, nil
	}
	var marked netop.NetworkList
	err := n.client.List(ctx, &marked, client.InNamespace(ns.Name), client.MatchingLabels{DefaultLabel: "true"})
	if err != nil || len(marked.Items) > 0 {
		return ctrl.Result{}, err
	}
	err = n.client.Create(ctx, &netop.Network{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: Default, Labels: map[string]string{DefaultLabel: "true"}},
		Spec:       netop.NetworkSpec{Type: netop.NetworkTypeVSphereDistributed},
	})
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return ctrl.Result{}, nil
	}
	return ctrl.Result{}, err
}

// networks writes the conditions of Networks.
type networks struct {
	client client.Client
	clock  clock.PassiveClock
}

// Reconcile implements reconcile.Reconciler.
func (n *networks) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	network := &netop.Network{}
	if err := n.client.Get(ctx, req.NamespacedName, network); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	before := network.DeepCopy()
	network.Status.Conditions = fields.WithCondition(network.Status.Conditions, fields.OfNetwork(&network.Spec), n.clock.Now())
	if equality.Semantic.DeepEqual(before.Status, network.Status) {
		return ctrl.Result{}, nil
	}
	if err := n.client.Status().Patch(ctx, network, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("writing the status of Network %s: %w", network.Name, err)
	}
	return ctrl.Result{}, nil
}
