package networkpolicy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// addresses are the first peers of policy shop/p.
func addresses(s *policyv1.State) string {
	id := s.Policies["shop/p"].Ingress.Rules[0].Peers[0]
	return fmt.Sprint(s.Sets[id].Addresses)
}

func TestPodsThatCount(t *testing.T) {
	x := cluster()
	x.setPolicy(aPolicy(t, "shop", "p", `{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`))
	s := x.build()
	if got := addresses(s); got != "[10.244.0.2 10.244.0.3]" || len(s.Pods) != 3 {
		t.Fatalf("%s, %d pods", got, len(s.Pods))
	}
	db := netip.MustParseAddr("10.244.0.2")
	if got := s.Pods[db].Policies; !slices.Equal(got, []string{"shop/p"}) {
		t.Errorf("policies of the pod: %v", got)
	}

	deleted := aPod("shop", "db", node, "app=db", "10.9.9.9")
	now := metav1.Now()
	deleted.DeletionTimestamp = &now
	x.setPod(deleted)
	if s := x.build(); addresses(s) != "[10.244.0.2 10.244.0.3]" || s.Pods[db] == nil {
		t.Error("a pod that is being deleted counts until it has ended")
	}
	for _, phase := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		ended := aPod("shop", "db", node, "app=db", "10.9.9.9")
		ended.Status.Phase = phase
		x.setPod(ended)
		if s := x.build(); addresses(s) != "[10.244.0.3]" || s.Pods[db] != nil {
			t.Errorf("a pod that is %s counts", phase)
		}
	}
	onHost := aPod("shop", "agent", "n2", "app=agent", "192.0.2.9")
	onHost.Spec.HostNetwork = true
	x.setPod(onHost)
	if got := addresses(x.build()); got != "[10.244.0.3]" {
		t.Errorf("a pod with the host's network counts: %s", got)
	}
}

func TestAnAddressBelongsToOnePod(t *testing.T) {
	x := cluster()
	again := aPod("shop", "db", node, "app=other", "")
	again.UID = "another"
	x.setPod(again)
	x.setPolicy(aPolicy(t, "shop", "p", `{podSelector: {matchLabels: {app: other}}, ingress: [{from: [{podSelector: {matchLabels: {app: other}}}]}]}`))
	s := x.build()
	if s.Pods[netip.MustParseAddr("10.244.0.2")] != nil || len(s.Policies) != 0 {
		t.Error("the interface of a pod is taken for that of its successor")
	}
	wires := slices.Clone(x.wires)
	wires = append(wires, Wire{Pod: types.NamespacedName{Namespace: "shop", Name: "db"}, UID: "another", Interface: "atl9", Address: netip.MustParseAddr("10.244.0.9")})
	x.setWires(wires)
	s = x.build()
	if got := addresses(s); got != "[10.244.0.9]" || s.Pods[netip.MustParseAddr("10.244.0.9")] == nil {
		t.Errorf("peers: %s", got)
	}
	if got := x.owner(netip.MustParseAddr("10.244.0.9")); got != "shop/db" {
		t.Errorf("owner: %q", got)
	}
}

func TestTier(t *testing.T) {
	x := cluster()
	p := aPolicy(t, "shop", "p", `podSelector: {}`)
	p.Labels = map[string]string{atoll.TierLabel: atoll.TierAdministrator}
	x.setPolicy(p)
	if got := x.build().Policies["shop/p"].Tier; got != policyv1.TierAdministrator {
		t.Errorf("tier %s", got)
	}
}

func TestOnlyWhatThisHostNeeds(t *testing.T) {
	x := cluster()
	x.setPod(aPod("far", "pod", "n2", "app=x", "10.244.4.1"))
	x.setNamespace("far", nil)
	x.setPolicy(aPolicy(t, "far", "p", `{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`))
	if s := x.build(); len(s.Policies) != 0 || len(s.Sets) != 0 {
		t.Errorf("%v", s)
	}
}

func TestWhatDoesNotChangeIsTheSame(t *testing.T) {
	x := cluster()
	x.setPolicy(aPolicy(t, "shop", "p", `{podSelector: {}, ingress: [{from: [{podSelector: {}}, {namespaceSelector: {matchLabels: {team: b}}}]}]}`))
	before := x.build()
	x.setPod(aPod("shop", "db", node, "app=db", "10.9.9.9", corev1.ContainerPort{Name: "pg", ContainerPort: 5432}))
	x.setPod(aPod("lab", "new", "n2", "app=new", "10.244.4.77"))
	after := x.build()
	same := 0
	for id, set := range after.Sets {
		if before.Sets[id] == set {
			same++
		}
	}
	if same != 1 || len(after.Sets) != 2 || before.Policies["shop/p"] != after.Policies["shop/p"] {
		t.Errorf("%d of %d sets are the same", same, len(after.Sets))
	}
}

// TestStepByStep compares an index that has seen many changes with one that sees the result only.
func TestStepByStep(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	specs := []string{
		`{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}`,
		`{podSelector: {matchLabels: {app: b}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: x}}}], ports: [{port: http}]}]}`,
		`{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {app: a}}}], ports: [{port: http}, {port: 53, protocol: UDP}]}]}`,
		`{podSelector: {matchLabels: {app: a}}, egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}}]}]}`,
	}
	x := newIndex(node, dns())
	pods, namespaces, policies := map[string]*corev1.Pod{}, map[string]map[string]string{}, map[string]int{}
	var wires []Wire
	pick := func(n int, prefix string) string { return fmt.Sprintf("%s%d", prefix, random.IntN(n)) }
	for step := range 3000 {
		ns := pick(3, "ns")
		switch random.IntN(8) {
		case 0, 1, 2:
			name := pick(6, "p")
			p := aPod(ns, name, []string{node, "n2"}[random.IntN(2)], "app="+[]string{"a", "b"}[random.IntN(2)], fmt.Sprintf("10.244.4.%d", random.IntN(9)), corev1.ContainerPort{Name: "http", ContainerPort: int32(random.IntN(3) + 1)})
			p.UID = types.UID(pick(2, "u"))
			if random.IntN(6) == 0 {
				p.Status.Phase = corev1.PodSucceeded
			}
			pods[ns+"/"+name] = p
			x.setPod(p)
		case 3:
			name := pick(6, "p")
			if p := pods[ns+"/"+name]; p != nil {
				delete(pods, ns+"/"+name)
				x.deletePod(types.NamespacedName{Namespace: ns, Name: name}, p.UID)
			}
		case 4:
			if random.IntN(8) == 0 {
				ns = dnsNamespace
			}
			if random.IntN(4) == 0 {
				delete(namespaces, ns)
				x.deleteNamespace(ns)
				break
			}
			set := map[string]string{"kubernetes.io/metadata.name": ns}
			if random.IntN(2) == 0 {
				set["team"] = "x"
			}
			namespaces[ns] = set
			x.setNamespace(ns, set)
		case 5, 6:
			name := pick(4, "q")
			if random.IntN(3) == 0 {
				delete(policies, ns+"/"+name)
				x.deletePolicy(types.NamespacedName{Namespace: ns, Name: name})
				break
			}
			policies[ns+"/"+name] = random.IntN(len(specs))
			x.setPolicy(aPolicy(t, ns, name, specs[policies[ns+"/"+name]]))
		case 7:
			wires = nil
			for i := range random.IntN(9) {
				wires = append(wires, Wire{Pod: types.NamespacedName{Namespace: ns, Name: pick(6, "p")}, UID: types.UID([]string{"", "u0", "u1"}[random.IntN(3)]), Interface: fmt.Sprint("atl", i), Address: netip.AddrFrom4([4]byte{10, 244, 0, byte(i + 2)})})
			}
			x.setWires(wires)
		}
		if step%20 != 0 {
			continue
		}
		fresh := newIndex(node, dns())
		fresh.setWires(wires)
		for ns, set := range namespaces {
			fresh.setNamespace(ns, set)
		}
		for id, spec := range policies {
			n := nameOf(id)
			fresh.setPolicy(aPolicy(t, n.Namespace, n.Name, specs[spec]))
		}
		for _, p := range pods {
			fresh.setPod(p)
		}
		if a, b := x.build(), fresh.build(); !reflect.DeepEqual(a, b) {
			t.Fatalf("after %d steps:\n%s\nwant\n%s", step, text(a), text(b))
		}
		if len(x.selectors) != len(fresh.selectors) {
			t.Fatalf("%d selectors, want %d", len(x.selectors), len(fresh.selectors))
		}
	}
}

func text(s *policyv1.State) string {
	out := ""
	for a, p := range s.Pods {
		out += fmt.Sprintln(a, *p)
	}
	for id, p := range s.Policies {
		out += fmt.Sprintln(id, describe(s, p))
	}
	for id, set := range s.Sets {
		out += fmt.Sprintln(id, *set)
	}
	return out
}
