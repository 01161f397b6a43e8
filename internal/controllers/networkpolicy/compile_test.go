package networkpolicy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

const node = "n1"

func dns() DNS { return DNS{Address: netip.MustParseAddr("10.244.0.1"), Port: 53} }

// cluster is three namespaces with pods on this node and another.
func cluster() *index {
	x := newIndex(node, dns())
	for ns, team := range map[string]string{"shop": "a", "lab": "b", "kube-system": ""} {
		set := map[string]string{"kubernetes.io/metadata.name": ns}
		if team != "" {
			set["team"] = team
		}
		x.setNamespace(ns, set)
	}
	x.setWires([]Wire{
		{Pod: types.NamespacedName{Namespace: "shop", Name: "db"}, UID: "shop-db", Interface: "atl1", MAC: "0a:58:0a:f4:00:02", Address: netip.MustParseAddr("10.244.0.2")},
		{Pod: types.NamespacedName{Namespace: "shop", Name: "web"}, UID: "shop-web", Interface: "atl2", MAC: "0a:58:0a:f4:00:03", Address: netip.MustParseAddr("10.244.0.3")},
		{Pod: types.NamespacedName{Namespace: "lab", Name: "web"}, Interface: "atl3", MAC: "0a:58:0a:f4:00:04", Address: netip.MustParseAddr("10.244.0.4")},
	})
	x.setPod(aPod("shop", "db", node, "app=db", "10.9.9.9", corev1.ContainerPort{Name: "pg", ContainerPort: 5432}))
	x.setPod(aPod("shop", "web", node, "app=web", ""))
	x.setPod(aPod("lab", "web", node, "app=web", ""))
	x.setPod(aPod("lab", "db", "n2", "app=db", "10.244.4.9", corev1.ContainerPort{Name: "pg", ContainerPort: 5433}, corev1.ContainerPort{Name: "pg", ContainerPort: 9, Protocol: corev1.ProtocolUDP}))
	return x
}

func aPod(ns, name, node, label, ip string, ports ...corev1.ContainerPort) *corev1.Pod {
	key, value, _ := strings.Cut(label, "=")
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(ns + "-" + name), Labels: map[string]string{key: value}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Ports: ports}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	if ip != "" {
		p.Status.PodIPs = []corev1.PodIP{{IP: ip}}
	}
	return p
}

func aPolicy(t testing.TB, ns, name, spec string) *networkingv1.NetworkPolicy {
	t.Helper()
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatalf("%s: %v", spec, err)
	}
	return p
}

// describe is a policy in words, with the content of sets.
func describe(s *policyv1.State, p *policyv1.Policy) string {
	var out []string
	for name, d := range map[string]*policyv1.Direction{"in": p.Ingress, "out": p.Egress} {
		if d == nil {
			continue
		}
		text := name + ":"
		for _, r := range d.Rules {
			text += " ["
			if r.AnyPeer {
				text += "any"
			}
			for _, id := range r.Peers {
				text += fmt.Sprint(s.Sets[id].Addresses)
			}
			for _, b := range r.Blocks {
				text += fmt.Sprint(b.CIDR, "-", b.Except)
			}
			text += " on "
			if r.AnyPort {
				text += "any"
			}
			for _, port := range r.Ports {
				text += fmt.Sprint(port)
			}
			for _, id := range r.Named {
				text += fmt.Sprint(s.Sets[id].Endpoints)
			}
			text += "]"
		}
		out = append(out, text)
	}
	slices.Sort(out)
	return strings.Join(out, "; ")
}

func TestTranslation(t *testing.T) {
	for _, tc := range []struct{ name, spec, want string }{
		{"deny ingress by default", `podSelector: {}`, "in:"},
		{"deny egress", `{podSelector: {}, policyTypes: [Egress]}`, "out:"},
		{"deny both", `{podSelector: {}, policyTypes: [Ingress, Egress]}`, "in:; out:"},
		{"types follow rules", `{podSelector: {}, egress: [{}]}`, "in:; out: [any on any]"},
		{"an empty rule is everything", `{podSelector: {}, ingress: [{}]}`, "in: [any on any]"},
		{"rules of a direction without type", `{podSelector: {}, policyTypes: [Ingress], egress: [{}]}`, "in:"},
		{"pods of the namespace", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`, "in: [[10.244.0.3] on any]"},
		{"all pods of the namespace", `{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`, "in: [[10.244.0.2 10.244.0.3] on any]"},
		{"other namespaces", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]}`, "in: [[10.244.0.4 10.244.4.9] on any]"},
		{"namespace and pod", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: db}}}]}]}`, "in: [[10.244.0.2 10.244.4.9] on any]"},
		{"namespace or pod", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}, {podSelector: {matchLabels: {app: db}}}]}]}`, "in: [[10.244.0.4 10.244.4.9][10.244.0.2] on any]"},
		{"expressions", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: DoesNotExist}]}}, {podSelector: {matchExpressions: [{key: app, operator: In, values: [db, x]}]}}]}]}`, "in: [[][10.244.0.2] on any]"},
		{"blocks", `{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.1.2.3/8, except: [10.2.0.0/16]}}, {ipBlock: {cidr: "fd00::/8"}}]}]}`, "in: [10.0.0.0/8-[10.2.0.0/16]fd00::/8-[] on any]"},
		{"ports", `{podSelector: {}, ingress: [{ports: [{port: 80}, {port: 8000, endPort: 9000, protocol: UDP}, {protocol: SCTP}, {port: 7, protocol: SCTP}]}]}`, "in: [any on {tcp 80 80}{udp 8000 9000}{sctp 0 65535}{sctp 7 7}]"},
		{"named port of the selected", `{podSelector: {matchLabels: {app: db}}, ingress: [{ports: [{port: pg}]}]}`, "in: [any on [{10.244.0.2 tcp 5432}]]"},
		{"named port of another protocol", `{podSelector: {matchLabels: {app: db}}, ingress: [{ports: [{port: pg, protocol: UDP}]}]}`, "in: [any on []]"},
		{"named port of peers", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: b}}}], ports: [{port: pg}]}]}`, "out: [[10.244.0.4 10.244.4.9] on [{10.244.4.9 tcp 5433}]]"},
		{"named port of anybody", `{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: pg}]}]}`, "out: [any on [{10.244.0.2 tcp 5432} {10.244.4.9 tcp 5433}]]"},
		{"DNS as everywhere", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: 53, protocol: UDP}, {port: 53}]}]}`, "out: [[] on {udp 53 53}{tcp 53 53}] [10.244.0.1/32-[] on {tcp 53 53}{udp 53 53}]"},
		{"DNS by the names of its ports", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: dns, protocol: UDP}]}]}`, "out: [[10.244.0.2 10.244.0.3 10.244.0.4 10.244.4.9] on []] [10.244.0.1/32-[] on {udp 53 53}]"},
		{"another port of DNS", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: 6443}]}]}`, "out: [[] on {tcp 6443 6443}]"},
		{"all namespaces are DNS, too", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}]}]}`, "out: [[10.244.0.2 10.244.0.3 10.244.0.4 10.244.4.9] on any] [10.244.0.1/32-[] on {tcp 53 53}{udp 53 53}]"},
		{"DNS does not come in", `{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}}]}]}`, "in: [[] on any]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x := cluster()
			x.setPolicy(aPolicy(t, "shop", "p", tc.spec))
			s := x.build()
			p := s.Policies["shop/p"]
			if p == nil {
				t.Fatal("the policy selects nothing")
			}
			if got := describe(s, p); got != tc.want {
				t.Errorf("%s\nwant %s", got, tc.want)
			}
		})
	}
}
