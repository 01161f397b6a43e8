package vmgrouppublish

import (
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"atoll.dev/atoll/internal/controllers/condition"
)

const complete = vmopv1.VirtualMachineGroupPublishRequestConditionComplete

type world struct {
	*testing.T
	*Reconciler
	now time.Time
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := vmopv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, now: time.Now()}
	w.Reconciler = &Reconciler{Now: func() time.Time { return w.now }, Client: fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachineGroupPublishRequest{}, &vmopv1.VirtualMachinePublishRequest{}).Build()}
	return w
}

// group with members; "g:x" is a group.
func group(name string, members ...string) *vmopv1.VirtualMachineGroup {
	g := &vmopv1.VirtualMachineGroup{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name}}
	var order vmopv1.VirtualMachineGroupBootOrderGroup
	for _, m := range members {
		member := vmopv1.GroupMember{Name: strings.TrimPrefix(m, "g:")}
		if member.Name != m {
			member.Kind = "VirtualMachineGroup"
		}
		order.Members = append(order.Members, member)
	}
	g.Spec.BootOrder = []vmopv1.VirtualMachineGroupBootOrderGroup{order}
	condition.True(&g.Status.Conditions, vmopv1.ReadyConditionType)
	return g
}

func request(machines ...string) *vmopv1.VirtualMachineGroupPublishRequest {
	return &vmopv1.VirtualMachineGroupPublishRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "app", UID: "uid"},
		Spec:       vmopv1.VirtualMachineGroupPublishRequestSpec{Target: "images", VirtualMachines: machines, TTLSecondsAfterFinished: new(int64(60))},
	}
}

func (w *world) run() *vmopv1.VirtualMachineGroupPublishRequest {
	w.Helper()
	key := client.ObjectKey{Namespace: "team", Name: "app"}
	if _, err := w.Reconcile(w.Context(), ctrl.Request{NamespacedName: key}); err != nil {
		w.Fatal(err)
	}
	g := &vmopv1.VirtualMachineGroupPublishRequest{}
	if err := w.Get(w.Context(), key, g); apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		w.Fatal(err)
	}
	return g
}

func TestPublish(t *testing.T) {
	w := newWorld(t, group("app", "db", "g:web"), group("web", "front", "db"), request())
	g := w.run()
	if len(g.Status.Images) != 2 || g.Status.Images[0].Source != "db" || g.Status.Images[1].Source != "front" || g.Status.Source != "app" || g.Status.Target != "images" {
		t.Fatalf("%+v", g.Status)
	}
	if c := condition.Get(g.Status.Conditions, complete); c.Reason != vmopv1.VirtualMachineGroupPublishRequestConditionReasonPending {
		t.Errorf("%+v", c)
	}
	for _, i := range g.Status.Images {
		p := &vmopv1.VirtualMachinePublishRequest{}
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: "team", Name: i.PublishRequestName}, p); err != nil {
			t.Fatal(err)
		}
		if p.Spec.Source.Name != i.Source || p.Spec.Target.Location.Name != "images" || !metav1.IsControlledBy(p, g) || p.Labels[vmopv1.VirtualMachinePublishRequestManagedByLabelKey] != "app" {
			t.Errorf("%+v", p)
		}
		p.Status.Ready, p.Status.ImageName = true, "vmi-"+i.Source
		if err := w.Status().Update(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	if g = w.run(); !condition.IsTrue(g.Status.Conditions, complete) || g.Status.Images[1].ImageName != "vmi-front" || g.Status.CompletionTime.IsZero() {
		t.Fatalf("%+v", g.Status)
	}
	w.now = g.Status.CompletionTime.Add(time.Minute)
	if w.run() != nil {
		t.Error("the request stays")
	}
}

func TestNothingToPublish(t *testing.T) {
	unready := group("app", "db")
	unready.Status.Conditions = nil
	for say, objects := range map[string][]client.Object{
		"no VirtualMachineGroup": {request()}, "is not ready": {unready, request()}, "has no virtual machines": {group("app"), request()},
		`"other" of spec.virtualMachines is not a member`: {group("app", "db"), request("db", "other")}, "too deep": {group("app", "g:app"), request()},
	} {
		g := newWorld(t, objects...).run()
		if c := condition.Get(g.Status.Conditions, complete); c == nil || c.Status != metav1.ConditionFalse || !strings.Contains(c.Message, say) || len(g.Status.Images) > 0 {
			t.Errorf("%s: %+v", say, c)
		}
	}
	if g := newWorld(t, group("app", "db", "front"), request("front")).run(); len(g.Status.Images) != 1 || g.Status.Images[0].Source != "front" {
		t.Errorf("%+v", g.Status)
	}
}

func TestNames(t *testing.T) {
	g := request()
	g.Name = strings.Repeat("x", 250)
	a, b := requestName(g, "one"), requestName(g, "two")
	if a == b || len(a) > 253 || len(label(g.Name)) > 63 {
		t.Errorf("%s, %s", a, b)
	}
}
