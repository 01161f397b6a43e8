package vmnetwork

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	testingclock "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/fields"
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

// TestFieldsWithoutEffect: a Network that sets fields in vain says so, and no more when it does not.
func TestFieldsWithoutEffect(t *testing.T) {
	s := runtime.NewScheme()
	if err := netop.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	network := &netop.Network{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "lan"}, Spec: netop.NetworkSpec{Type: netop.NetworkTypePod, NTP: []string{"192.0.2.1"}}}
	network.Status.Conditions = []netop.NetworkCondition{{Type: "Other"}}
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(network).WithStatusSubresource(&netop.Network{}).Build()
	n := &networks{c, testingclock.NewFakePassiveClock(time.Unix(1000, 0))}
	conditions := func() []netop.NetworkCondition {
		t.Helper()
		if _, err := n.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(network)}); err != nil {
			t.Fatal(err)
		}
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(network), network); err != nil {
			t.Fatal(err)
		}
		return network.Status.Conditions
	}
	for range 2 {
		if got := conditions(); len(got) != 2 || got[1].Type != fields.Condition || got[1].Status != metav1.ConditionTrue || !strings.HasPrefix(got[1].Message, "spec.ntp (") {
			t.Errorf("with spec.ntp: %+v", got)
		}
	}
	network.Spec.NTP = nil
	if err := c.Update(t.Context(), network); err != nil {
		t.Fatal(err)
	}
	if got := conditions(); len(got) != 1 || got[0].Type != "Other" {
		t.Errorf("without: %+v", got)
	}
	if _, err := n.Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Name: "gone"}}); err != nil {
		t.Error(err)
	}
}
