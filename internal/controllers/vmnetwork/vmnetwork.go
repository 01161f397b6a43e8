// Package vmnetwork makes the default Network of each namespace, which is the pod network.
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
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
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
