// Package contentlibrary is the controller of content libraries: it makes the libraries that each namespace has, one of
// its own and one of its project in the registry, and counts what libraries have.
//
// A library is a name that items refer to, with two switches; the content is with the items
// (internal/controllers/libraryitem). It is set up in the server's manager. Little can go wrong: an item that names a
// library that does not exist works, and is in no count.
package contentlibrary

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// Setup adds the controllers to a manager.
func Setup(mgr ctrl.Manager) error {
	c := mgr.GetClient()
	err := ctrl.NewControllerManagedBy(mgr).Named("defaultlibrary").For(&corev1.Namespace{}).Complete(&namespaces{c})
	if err != nil {
		return fmt.Errorf("content library controller: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("contentlibrary").For(&api.ContentLibrary{}).
		Watches(&api.ContentLibraryItem{}, handler.EnqueueRequestsFromMapFunc(libraryOf)).Complete(&counter{client: c})
	if err != nil {
		return fmt.Errorf("content library controller: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("clustercontentlibrary").For(&api.ClusterContentLibrary{}).
		Watches(&api.ClusterContentLibraryItem{}, handler.EnqueueRequestsFromMapFunc(libraryOf)).Complete(&counter{client: c, cluster: true})
	if err != nil {
		return fmt.Errorf("content library controller: %w", err)
	}
	return nil
}

// libraryOf is the library that an item names.
func libraryOf(_ context.Context, obj client.Object) []reconcile.Request {
	library := api.DefaultLibrary
	switch i := obj.(type) {
	case *api.ContentLibraryItem:
		library = i.Spec.Library
	case *api.ClusterContentLibraryItem:
		library = i.Spec.Library
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: obj.GetNamespace(), Name: library}}}
}

// namespaces makes default libraries.
type namespaces struct{ client client.Client }

// without are namespaces that nobody has virtual machines in.
func without() []string {
	return []string{metav1.NamespaceSystem, metav1.NamespacePublic, corev1.NamespaceNodeLease, "atoll-keys"}
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
	own := &api.ContentLibrary{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: api.DefaultLibrary, Labels: map[string]string{api.DefaultLibraryLabel: "true"}},
		Spec:       api.ContentLibrarySpec{Writable: true, AllowImport: true},
	}
	if err := n.make(ctx, own); err != nil || ns.Name == atoll.RegistryLibrary { // whose project is everybody's
		return ctrl.Result{}, err
	}
	return ctrl.Result{}, n.make(ctx, &api.ContentLibrary{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: api.RegistryLibrary},
		Spec:       api.ContentLibrarySpec{Writable: true, Registry: &api.RegistryBacking{}},
	})
}

// make makes a library unless there is one of that name.
func (n *namespaces) make(ctx context.Context, library *api.ContentLibrary) error {
	var there api.ContentLibrary
	err := n.client.Get(ctx, client.ObjectKeyFromObject(library), &there)
	if !apierrors.IsNotFound(err) {
		return err
	}
	err = n.client.Create(ctx, library)
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return nil
	}
	return err
}

// counter writes the status of libraries of one scope.
type counter struct {
	client  client.Client
	cluster bool
}

// Reconcile implements reconcile.Reconciler.
func (c *counter) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var library client.Object
	var spec *api.ContentLibrarySpec
	var status *api.ContentLibraryStatus
	if c.cluster {
		l := &api.ClusterContentLibrary{}
		library, spec, status = l, &l.Spec, &l.Status
	} else {
		l := &api.ContentLibrary{}
		library, spec, status = l, &l.Spec, &l.Status
	}
	if err := c.client.Get(ctx, req.NamespacedName, library); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	was := library.DeepCopyObject().(client.Object)
	items, err := c.items(ctx, req)
	if err != nil {
		return ctrl.Result{}, err
	}
	status.Name, status.Type = library.GetName(), api.LibraryLocal
	status.CreationTime = library.GetCreationTimestamp().UTC().Format(time.RFC3339)
	status.Items, status.ReadyItems = int32(len(items)), 0
	for _, ready := range items {
		if ready {
			status.ReadyItems++
		}
	}
	if spec.Registry != nil { // how it is says internal/controllers/projectlibrary
		status.Type = api.LibraryRegistry
	} else {
		meta.SetStatusCondition(&status.Conditions, metav1.Condition{
			Type: api.ReadyCondition, Status: metav1.ConditionTrue, Reason: "True", ObservedGeneration: library.GetGeneration(),
		})
	}
	if equality.Semantic.DeepEqual(was, library) {
		return ctrl.Result{}, nil
	}
	if err := c.client.Status().Patch(ctx, library, client.MergeFrom(was)); err != nil {
		return ctrl.Result{}, fmt.Errorf("writing the status of library %s: %w", req, err)
	}
	return ctrl.Result{}, nil
}

// items tells of each item of a library whether it is ready.
func (c *counter) items(ctx context.Context, req ctrl.Request) ([]bool, error) {
	var out []bool
	if c.cluster {
		var list api.ClusterContentLibraryItemList
		if err := c.client.List(ctx, &list); err != nil {
			return nil, fmt.Errorf("listing library items: %w", err)
		}
		for _, i := range list.Items {
			if i.Spec.Library == req.Name {
				out = append(out, i.Status.Ready)
			}
		}
		return out, nil
	}
	var list api.ContentLibraryItemList
	if err := c.client.List(ctx, &list, client.InNamespace(req.Namespace)); err != nil {
		return nil, fmt.Errorf("listing library items: %w", err)
	}
	for _, i := range list.Items {
		if i.Spec.Library == req.Name {
			out = append(out, i.Status.Ready)
		}
	}
	return out, nil
}
