package vmnetwork

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
)

// TestDefaultNetworks: every namespace that people use has one, unless they have marked another.
func TestDefaultNetworks(t *testing.T) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{netop.AddToScheme, corev1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	namespace := func(name string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	}
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(
		namespace("team"), namespace("kube-system"), namespace("own"),
		&netop.Network{ObjectMeta: metav1.ObjectMeta{Namespace: "own", Name: "lan", Labels: map[string]string{DefaultLabel: "true"}}},
	).Build()
	n := &namespaces{c}
	for _, name := range []string{"team", "team", "kube-system", "own", "gone"} {
		if _, err := n.Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Name: name}}); err != nil {
			t.Fatal(name, err)
		}
	}
	for name, want := range map[string]bool{"team": true, "kube-system": false, "own": false} {
		var network netop.Network
		err := c.Get(t.Context(), types.NamespacedName{Namespace: name, Name: Default}, &network)
		if want && (err != nil || network.Labels[DefaultLabel] != "true" || network.Spec.Type != netop.NetworkTypeVSphereDistributed) || !want && !apierrors.IsNotFound(err) {
			t.Errorf("%s: %+v, %v", name, network, err)
		}
	}
}
