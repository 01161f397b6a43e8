package namespacebounds

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/testkit/golden"
)

func asks(uid, cpu, memory string) func(*core.Pod) {
	return func(p *core.Pod) {
		p.UID = types.UID(uid)
		p.Spec.Containers[0].Resources.Requests = core.ResourceList{core.ResourceCPU: resource.MustParse(cpu), core.ResourceMemory: resource.MustParse(memory)}
	}
}

// running is a pod in the cache.
func running(ns, uid, cpu, memory string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: uid, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{Requests: list4(cpu, memory)}}}},
	}
}

// TestReservations: two hosts have 8 CPUs and 16Gi together, and shop has reserved 4 and 8Gi.
func TestReservations(t *testing.T) {
	reserved := spec{Resources: atoll.NamespaceResources{
		CPUReservation: new(resource.MustParse("4")), MemoryReservation: new(resource.MustParse("8Gi")),
	}}
	var out strings.Builder
	w := newWorld(t, reserved)
	now := time.Now()
	w.source.ledger.now = func() time.Time { return now }
	step := func(name string, r ask) {
		fmt.Fprintf(&out, "%s: %s\n", name, text(w.send(r)))
	}
	create := func(ns, uid, cpu, memory string) ask {
		return podAsk(admission.Create, "", newPod(ns, asks(uid, cpu, memory)), nil)
	}
	dry := create(plainNS, "d", "4", "1Gi")
	dry.dry = true
	step("others may have what is left", dry)
	step("and a dry run takes nothing", create(plainNS, "a", "3", "6Gi"))
	step("what is left is less now", create(plainNS, "b", "2", "1Gi"))
	step("of memory too", create(plainNS, "b", "500m", "3Gi"))
	step("the owner has what is reserved", create(shopNS, "s", "4", "8Gi"))
	step("the system is not bound", create("kube-system", "k", "4", "8Gi"))
	now = now.Add(2 * assumedFor)
	step("what has not come is forgotten", create(plainNS, "b", "4", "4Gi"))
	w.source.ledger.pod(running(plainNS, "b", "4", "4Gi"))
	w.source.ledger.pod(running(shopNS, "s", "3", "1Gi"))
	step("what is used of a reservation is not kept twice", create(plainNS, "c", "500m", "4Gi"))
	now = now.Add(2 * assumedFor)
	small, large := newPod(plainNS, asks("b", "4", "4Gi")), newPod(plainNS, asks("b", "5", "4Gi"))
	small.Spec.NodeName, large.Spec.NodeName = "host-1", "host-1"
	step("a pod grows", podAsk(admission.Update, "resize", large, small))
	step("a pod shrinks", podAsk(admission.Update, "resize", small, large))
	done := running(plainNS, "b", "4", "4Gi")
	done.Status.Phase = corev1.PodSucceeded
	w.source.ledger.pod(done)
	step("what has ended is free", create(plainNS, "e", "4", "8Gi"))
	w.source.ledger.podGone(running(plainNS, "e", "0", "0"))
	w.source.ledger.pod(running(plainNS, "giant", "100", "900Gi"))
	step("what no host can run takes nothing", create(plainNS, "e2", "4", "8Gi"))
	w.source.ledger.podGone(running(plainNS, "e2", "0", "0"))
	wide := newPod(plainNS, asks("wide", "5", "1Gi"))
	w.source.ledger.pod(running(plainNS, "wide", "5", "1Gi"))
	step("unless it becomes smaller", podAsk(admission.Update, "resize", newPod(plainNS, asks("wide", "4", "1Gi")), wide))
	step("and counts from then on", create(plainNS, "e2", "4", "1Gi"))
	w.source.ledger.podGone(running(plainNS, "wide", "0", "0"))
	w.source.ledger.node(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "large"}, Status: corev1.NodeStatus{Allocatable: list4("100", "901Gi")}})
	step("until a host can", create(plainNS, "e3", "5", "1Gi"))
	w.source.ledger.podGone(running(plainNS, "giant", "100", "900Gi"))
	w.source.ledger.nodeGone(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "large"}})
	w.source.ledger.nodeGone(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "host-2"}})
	step("a host is gone", create(plainNS, "f", "500m", "1Gi"))
	step("a pod that requests nothing", create(plainNS, "g", "0", "0"))
	step("the owner, with less than is reserved", create(shopNS, "t", "1", "7Gi"))
	step("the owner, beyond it, waits for room", create(shopNS, "t", "4", "1Gi"))
	w.source.ledger.reserveGone(&atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: shopNS}})
	step("nothing is reserved any more", create(plainNS, "f", "4", "1Gi"))
	golden.Compare(t, "reservations.golden", out.String())
	if used := w.source.ledger.used[plainNS]; used != (amount{}) {
		t.Errorf("used %v", used)
	}
}

// TestSums: what comes and goes leaves nothing.
func TestSums(t *testing.T) {
	l := newLedger()
	for range 3 {
		l.node(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Status: corev1.NodeStatus{Allocatable: list4("4", "8Gi")}})
		l.pod(running("a", "1", "1", "1Gi"))
		l.pod(running("a", "2", "1", "1Gi"))
		l.pod(running("b", "3", "1500m", "1Gi"))
	}
	if l.all != (amount{3500, 3 << 30}) || l.used["a"] != (amount{2000, 2 << 30}) || l.total != (amount{4000, 8 << 30}) {
		t.Fatalf("%+v", l)
	}
	for _, uid := range []string{"1", "2", "3", "3"} {
		l.podGone(running("a", uid, "1", "1Gi"))
	}
	l.nodeGone(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}})
	if l.all != (amount{}) || len(l.used)+len(l.pods)+len(l.nodes) != 0 || l.total != (amount{}) {
		t.Fatalf("%+v", l)
	}
}
