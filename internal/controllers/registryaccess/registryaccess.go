// Package registryaccess lets the service accounts of a namespace pull from its registry project: it makes one
// RoleBinding in each namespace. Those of SupervisorNamespaces have it from their own controller.
//
// A binding that exists is left as it is, so that an administrator can take the right away by emptying its subjects. It
// is set up in the server's manager. Little can go wrong: without the binding pods of the namespace cannot pull its
// images by their service account, and the registry says so.
package registryaccess

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

const (
	// Binding is the name of the RoleBinding.
	Binding = "atoll-registry-pull"
	// Role is the name of the ClusterRole that it gives.
	Role = "atoll:registry-puller"
)

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	r := &reconciler{read: mgr.GetAPIReader(), client: mgr.GetClient()}
	if err := ctrl.NewControllerManagedBy(mgr).Named("registryaccess").For(&corev1.Namespace{}).Complete(r); err != nil {
		return fmt.Errorf("registry access controller: %w", err)
	}
	return nil
}

type reconciler struct {
	read   client.Reader // RoleBindings are not cached
	client client.Client
}

// Reconcile implements reconcile.Reconciler.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var ns corev1.Namespace
	if err := r.client.Get(ctx, req.NamespacedName, &ns); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if _, bounded := ns.Labels[atoll.SupervisorNamespaceLabel]; bounded || ns.DeletionTimestamp != nil {
		return ctrl.Result{}, nil
	}
	var there rbacv1.RoleBinding
	err := r.read.Get(ctx, types.NamespacedName{Namespace: ns.Name, Name: Binding}, &there)
	if !apierrors.IsNotFound(err) {
		return ctrl.Result{}, err
	}
	err = r.client.Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: Binding},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: Role},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: "system:serviceaccounts:" + ns.Name}},
	})
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return ctrl.Result{}, nil
	}
	if err != nil {
		return ctrl.Result{}, fmt.Errorf("letting the service accounts of %s pull: %w", ns.Name, err)
	}
	return ctrl.Result{}, nil
}
