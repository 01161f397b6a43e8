package contentlibrary

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

func newClient(t *testing.T, objects ...client.Object) client.Client {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{api.AddToScheme, corev1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	return fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithStatusSubresource(&api.ContentLibrary{}, &api.ClusterContentLibrary{}).Build()
}

// TestDefaultLibraries: every namespace that people use has one, and what they change of it stays.
func TestDefaultLibraries(t *testing.T) {
	namespace := func(name string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	}
	c := newClient(t, namespace("team"), namespace("kube-system"), namespace("library"))
	n := &namespaces{c}
	reconcile := func(name string) {
		t.Helper()
		if _, err := n.Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	get := func(namespace string) (l api.ContentLibrary, err error) {
		err = c.Get(t.Context(), types.NamespacedName{Namespace: namespace, Name: api.DefaultLibrary}, &l)
		return l, err
	}
	for _, name := range []string{"team", "kube-system", "gone"} {
		reconcile(name)
	}
	l, err := get("team")
	if err != nil || !l.Spec.Writable || !l.Spec.AllowImport || l.Labels[api.DefaultLibraryLabel] != "true" {
		t.Fatalf("%+v, %v", l, err)
	}
	var project api.ContentLibrary
	if err := c.Get(t.Context(), types.NamespacedName{Namespace: "team", Name: api.RegistryLibrary}, &project); err != nil || !project.Spec.Writable || project.Spec.AllowImport || project.Spec.Registry == nil {
		t.Errorf("%+v, %v", project.Spec, err)
	}
	reconcile("library") // whose project is everybody's
	if err := c.Get(t.Context(), types.NamespacedName{Namespace: "library", Name: api.RegistryLibrary}, &project); !apierrors.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := get("kube-system"); !apierrors.IsNotFound(err) {
		t.Error(err)
	}
	l.Spec.Writable = false
	if err := c.Update(t.Context(), &l); err != nil {
		t.Fatal(err)
	}
	reconcile("team")
	if l, err := get("team"); err != nil || l.Spec.Writable {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestCounts(t *testing.T) {
	item := func(name, library string, ready bool) *api.ContentLibraryItem {
		return &api.ContentLibraryItem{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name}, Spec: api.ContentLibraryItemSpec{Library: library}, Status: api.ContentLibraryItemStatus{Ready: ready},
		}
	}
	c := newClient(t, &api.ContentLibrary{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "a"}}, item("x", "a", true), item("y", "a", false), item("z", "b", true),
		&api.ClusterContentLibrary{ObjectMeta: metav1.ObjectMeta{Name: "a"}},
		&api.ClusterContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Spec: api.ContentLibraryItemSpec{Library: "a"}, Status: api.ContentLibraryItemStatus{Ready: true}})
	for range 2 {
		if _, err := (&counter{client: c}).Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Namespace: "team", Name: "a"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := (&counter{client: c, cluster: true}).Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Name: "a"}}); err != nil {
			t.Fatal(err)
		}
	}
	var l api.ContentLibrary
	if err := c.Get(t.Context(), types.NamespacedName{Namespace: "team", Name: "a"}, &l); err != nil || l.Status.Items != 2 || l.Status.ReadyItems != 1 || l.Status.Conditions[0].Status != metav1.ConditionTrue {
		t.Errorf("%+v, %v", l.Status, err)
	}
	project := &api.ContentLibrary{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "p"}, Spec: api.ContentLibrarySpec{Registry: &api.RegistryBacking{}}}
	if err := c.Create(t.Context(), project); err != nil {
		t.Fatal(err)
	}
	if _, err := (&counter{client: c}).Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(project)}); err != nil {
		t.Fatal(err)
	}
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(project), &l); err != nil || l.Status.Type != api.LibraryRegistry || len(l.Status.Conditions) != 0 {
		t.Errorf("%+v, %v", l.Status, err)
	}
	var cl api.ClusterContentLibrary
	if err := c.Get(t.Context(), types.NamespacedName{Name: "a"}, &cl); err != nil || cl.Status.Items != 1 || cl.Status.ReadyItems != 1 {
		t.Errorf("%+v, %v", cl.Status, err)
	}
	if got := libraryOf(t.Context(), item("x", "a", true)); got[0].Name != "a" || got[0].Namespace != "team" {
		t.Errorf("%v", got)
	}
}
