package vmgroup

import (
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"atoll.dev/atoll/internal/controllers/condition"
)

const (
	on  = vmopv1.VirtualMachinePowerStateOn
	off = vmopv1.VirtualMachinePowerStateOff
)

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
	w := &world{T: t, now: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)}
	w.Reconciler = &Reconciler{Now: func() time.Time { return w.now }, Client: fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachineGroup{}, &vmopv1.VirtualMachine{}).Build()}
	return w
}

func group(name string, power vmopv1.VirtualMachinePowerState, orders ...vmopv1.VirtualMachineGroupBootOrderGroup) *vmopv1.VirtualMachineGroup {
	return &vmopv1.VirtualMachineGroup{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, UID: types.UID("group-" + name)},
		Spec:       vmopv1.VirtualMachineGroupSpec{PowerState: power, BootOrder: orders},
	}
}

// order is members that start after a delay; "g:x" is a group.
func order(delay time.Duration, names ...string) vmopv1.VirtualMachineGroupBootOrderGroup {
	o := vmopv1.VirtualMachineGroupBootOrderGroup{PowerOnDelay: &metav1.Duration{Duration: delay}}
	for _, n := range names {
		m := vmopv1.GroupMember{Name: strings.TrimPrefix(n, "g:")}
		if m.Name != n {
			m.Kind = kindGroup
		}
		o.Members = append(o.Members, m)
	}
	return o
}

func machine(name, group string) *vmopv1.VirtualMachine {
	return &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, UID: types.UID("vm-" + name)},
		Spec:       vmopv1.VirtualMachineSpec{GroupName: group, PowerState: off},
		Status:     vmopv1.VirtualMachineStatus{PowerState: off},
	}
}

func (w *world) run(name string) (*vmopv1.VirtualMachineGroup, ctrl.Result) {
	w.Helper()
	key := client.ObjectKey{Namespace: "team", Name: name}
	result, err := w.Reconcile(w.Context(), ctrl.Request{NamespacedName: key})
	if err != nil {
		w.Fatal(err)
	}
	g := &vmopv1.VirtualMachineGroup{}
	if err := w.Get(w.Context(), key, g); err != nil {
		w.Fatal(err)
	}
	return g, result
}

func (w *world) machine(name string) *vmopv1.VirtualMachine {
	w.Helper()
	vm := &vmopv1.VirtualMachine{}
	if err := w.Get(w.Context(), client.ObjectKey{Namespace: "team", Name: name}, vm); err != nil {
		w.Fatal(err)
	}
	return vm
}

// obey makes machines what their spec says.
func (w *world) obey(names ...string) {
	w.Helper()
	for _, name := range names {
		vm := w.machine(name)
		vm.Status.PowerState = vm.Spec.PowerState
		vm.Status.NodeName = map[bool]string{true: "host-1"}[vm.Spec.PowerState == on]
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
		if err := w.Status().Update(w.Context(), vm); err != nil {
			w.Fatal(err)
		}
	}
}

func (w *world) powers(names ...string) string {
	w.Helper()
	var out []string
	for _, name := range names {
		out = append(out, map[vmopv1.VirtualMachinePowerState]string{on: "on", off: "off"}[w.machine(name).Spec.PowerState])
	}
	return strings.Join(out, " ")
}

// reason of a member's condition, "True" when it is.
func reason(g *vmopv1.VirtualMachineGroup, name, kind string) string {
	for _, m := range g.Status.Members {
		if m.Name == name {
			if c := condition.Get(m.Conditions, kind); c != nil {
				return c.Reason
			}
		}
	}
	return ""
}

func TestBootOrder(t *testing.T) {
	w := newWorld(t, group("app", on, order(0, "db"), order(10*time.Second, "web-1", "web-2"), order(5*time.Second, "cache")),
		machine("db", "app"), machine("web-1", "app"), machine("web-2", "app"), machine("cache", "app"))
	all := []string{"db", "web-1", "web-2", "cache"}
	synced := vmopv1.VirtualMachineGroupMemberConditionPowerStateSynced
	g, result := w.run("app")
	if got := w.powers(all...); got != "on off off off" || result.RequeueAfter != 10*time.Second {
		t.Fatalf("%s, %v", got, result.RequeueAfter)
	}
	if reason(g, "db", synced) != reasonNotSynced || reason(g, "web-1", synced) != reasonPending || condition.IsTrue(g.Status.Conditions, vmopv1.ReadyConditionType) {
		t.Errorf("%+v", g.Status)
	}
	w.now = w.now.Add(10 * time.Second)
	if _, result = w.run("app"); w.powers(all...) != "on on on off" || result.RequeueAfter != 5*time.Second {
		t.Fatalf("%s, %v", w.powers(all...), result.RequeueAfter)
	}
	w.now = w.now.Add(time.Minute)
	w.run("app")
	w.obey(all...)
	g, result = w.run("app")
	if !condition.IsTrue(g.Status.Conditions, vmopv1.ReadyConditionType) || result.RequeueAfter != 0 || reason(g, "db", synced) != "True" {
		t.Errorf("%+v", g.Status)
	}
	if m := g.Status.Members[0]; m.Name != "db" || m.UID != "vm-db" || *m.PowerState != on || m.Placement.Node != "host-1" {
		t.Errorf("%+v", m)
	}
	if g.Status.LastUpdatedPowerStateTime == nil || !g.Status.LastUpdatedPowerStateTime.Time.Equal(w.now.Add(-70*time.Second)) {
		t.Errorf("last update %v", g.Status.LastUpdatedPowerStateTime)
	}
	// Off is at once, and all.
	g.Spec.PowerState, g.Spec.PowerOffMode = off, vmopv1.VirtualMachinePowerOpModeHard
	if err := w.Update(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if _, result = w.run("app"); w.powers(all...) != "off off off off" || result.RequeueAfter != 0 || w.machine("db").Spec.PowerOffMode != vmopv1.VirtualMachinePowerOpModeHard {
		t.Errorf("%s, %v", w.powers(all...), result.RequeueAfter)
	}
}

// TestOwnPowerState: a member may be changed by itself, until the group is told to again.
func TestOwnPowerState(t *testing.T) {
	w := newWorld(t, group("app", on, order(0, "a", "b")), machine("a", "app"))
	w.run("app")
	w.obey("a")
	vm := w.machine("a")
	vm.Spec.PowerState = off
	if err := w.Update(t.Context(), vm); err != nil {
		t.Fatal(err)
	}
	w.obey("a")
	g, _ := w.run("app")
	if w.powers("a") != "off" || reason(g, "a", vmopv1.VirtualMachineGroupMemberConditionPowerStateSynced) != reasonNotSynced {
		t.Errorf("%s, %+v", w.powers("a"), g.Status)
	}
	// A new member gets the group's, the other one not.
	if err := w.Create(t.Context(), machine("b", "app")); err != nil {
		t.Fatal(err)
	}
	if w.run("app"); w.powers("a", "b") != "off on" {
		t.Errorf("%s", w.powers("a", "b"))
	}
	g, _ = w.run("app")
	g.Spec.NextForcePowerStateSyncTime = "Now"
	if err := w.Update(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if w.run("app"); w.powers("a", "b") != "on on" {
		t.Errorf("%s", w.powers("a", "b"))
	}
}

func TestNoPowerState(t *testing.T) {
	w := newWorld(t, group("app", "", order(0, "a")), machine("a", "app"))
	w.obey("a")
	g, _ := w.run("app")
	if w.powers("a") != "off" || !condition.IsTrue(g.Status.Conditions, vmopv1.ReadyConditionType) {
		t.Errorf("%s, %+v", w.powers("a"), g.Status)
	}
}

func TestLinks(t *testing.T) {
	linked := vmopv1.VirtualMachineGroupMemberConditionGroupLinked
	w := newWorld(t, group("app", on, order(0, "in", "stranger", "missing")), machine("in", "app"), machine("stranger", ""))
	g, _ := w.run("app")
	if reason(g, "in", linked) != "True" || reason(g, "stranger", linked) != reasonNotMember || reason(g, "missing", linked) != reasonNotFound {
		t.Fatalf("%+v", g.Status)
	}
	if !owns(g, w.machine("in")) || owns(g, w.machine("stranger")) || w.powers("in", "stranger") != "on off" {
		t.Errorf("%+v", w.machine("in").OwnerReferences)
	}
	if c := condition.Get(g.Status.Conditions, vmopv1.ReadyConditionType); c.Reason != reasonMembersNotReady || !strings.Contains(c.Message, "missing") {
		t.Errorf("%+v", c)
	}
	vm := w.machine("in")
	vm.Spec.GroupName = ""
	if err := w.Update(t.Context(), vm); err != nil {
		t.Fatal(err)
	}
	if g, _ = w.run("app"); len(w.machine("in").OwnerReferences) != 0 || reason(g, "in", linked) != reasonNotMember {
		t.Errorf("%+v", w.machine("in").OwnerReferences)
	}
}

func TestGroupsInGroups(t *testing.T) {
	inner := group("inner", "", order(0, "a"))
	inner.Spec.GroupName = "outer"
	w := newWorld(t, group("outer", on, order(0, "g:inner", "b")), inner, machine("a", "inner"), machine("b", "outer"))
	g, _ := w.run("outer")
	in, _ := w.run("inner")
	if in.Spec.PowerState != on || w.powers("a", "b") != "on on" || !owns(g, in) {
		t.Fatalf("%+v, %s", in.Spec, w.powers("a", "b"))
	}
	w.obey("a", "b")
	w.run("inner")
	if g, _ = w.run("outer"); !condition.IsTrue(g.Status.Conditions, vmopv1.ReadyConditionType) || reason(g, "inner", vmopv1.ReadyConditionType) != "True" {
		t.Errorf("%+v", g.Status)
	}
}

func TestCircle(t *testing.T) {
	a, b := group("a", on, order(0, "g:b")), group("b", on, order(0, "g:a"))
	a.Spec.GroupName, b.Spec.GroupName = "b", "a"
	w := newWorld(t, a, b)
	g, _ := w.run("a")
	if reason(g, "b", vmopv1.VirtualMachineGroupMemberConditionGroupLinked) != reasonError {
		t.Errorf("%+v", g.Status)
	}
	got := &vmopv1.VirtualMachineGroup{}
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(b), got); err != nil || len(got.OwnerReferences) != 0 {
		t.Errorf("%+v, %v", got.OwnerReferences, err)
	}
}
