package networkpolicy

import (
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// Wire is a pod's interface on this host.
type Wire struct {
	Pod types.NamespacedName
	// UID of the pod; "" when that is not known.
	UID       types.UID
	Interface string
	MAC       string
	Address   netip.Addr
}

// index is everything that policies are made of, and what follows from it. It is not safe for concurrent use.
type index struct {
	node string
	dns  DNS

	pods       map[types.NamespacedName]*pod
	namespaces map[string]labels.Set
	policies   map[types.NamespacedName]*compiled
	selectors  map[string]*selector
	wires      []Wire
	// inNamespace are the pods and policies of each namespace.
	inNamespace map[string]*members
}

type members struct {
	pods     map[types.NamespacedName]*pod
	policies map[types.NamespacedName]*compiled
}

// pod is what counts of a pod.
type pod struct {
	name   types.NamespacedName
	uid    types.UID
	labels labels.Set
	ports  []namedPort
	// addresses: of a pod of this host those of its wires, of others what its status says.
	addresses []netip.Addr
	status    []netip.Addr
	local     bool
	ended     bool // or with the host's network: neither selected nor named
	// policies that select it, sorted.
	policies []string
}

type namedPort struct {
	name     string
	protocol policyv1.Protocol
	port     uint16
}

func newIndex(node string, dns DNS) *index {
	return &index{
		node: node, dns: dns,
		pods: map[types.NamespacedName]*pod{}, namespaces: map[string]labels.Set{},
		policies: map[types.NamespacedName]*compiled{}, selectors: map[string]*selector{},
		inNamespace: map[string]*members{},
	}
}

func (x *index) membersOf(namespace string) *members {
	m := x.inNamespace[namespace]
	if m == nil {
		m = &members{pods: map[types.NamespacedName]*pod{}, policies: map[types.NamespacedName]*compiled{}}
		x.inNamespace[namespace] = m
	}
	return m
}

func (x *index) tidy(namespace string) {
	if m := x.inNamespace[namespace]; m != nil && len(m.pods) == 0 && len(m.policies) == 0 {
		delete(x.inNamespace, namespace)
	}
}

// setPod takes in a pod as it is now.
func (x *index) setPod(p *corev1.Pod) {
	name := types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
	if old := x.pods[name]; old != nil && old.uid != p.UID {
		x.deletePod(name, "")
	}
	now := &pod{
		name: name, uid: p.UID, labels: p.Labels, local: p.Spec.NodeName == x.node, ports: portsOf(p),
		ended: p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil && a.Unmap().Is4() {
			now.status = append(now.status, a.Unmap())
		}
	}
	now.addresses = x.addressesOf(now)
	old := x.pods[name]
	if old != nil && old.local == now.local && old.ended == now.ended && maps.Equal(old.labels, now.labels) && slices.Equal(old.ports, now.ports) && slices.Equal(old.addresses, now.addresses) {
		old.status = now.status
		return
	}
	x.pods[name] = now
	x.membersOf(name.Namespace).pods[name] = now
	x.place(old, now)
}

// place puts a pod into the sets that it belongs to and out of the others, and finds its policies.
func (x *index) place(old, now *pod) {
	for _, s := range x.selectors {
		s.replace(old, now, x.namespaces[now.name.Namespace])
	}
	x.choose(now)
}

// deletePod takes out a pod; with a uid only if it is that one.
func (x *index) deletePod(name types.NamespacedName, uid types.UID) {
	p := x.pods[name]
	if p == nil || uid != "" && p.uid != uid {
		return
	}
	for _, s := range x.selectors {
		s.remove(p)
	}
	delete(x.pods, name)
	delete(x.membersOf(name.Namespace).pods, name)
	x.tidy(name.Namespace)
}

// choose finds the policies that select a pod.
func (x *index) choose(p *pod) {
	p.policies = nil
	if p.ended {
		return
	}
	for _, c := range x.membersOf(p.name.Namespace).policies {
		if c.selects.Matches(p.labels) {
			p.policies = append(p.policies, c.id)
		}
	}
	slices.Sort(p.policies)
}

// addressesOf is where traffic of a pod comes from.
func (x *index) addressesOf(p *pod) []netip.Addr {
	if p.ended {
		return nil
	}
	if !p.local {
		return p.status
	}
	var out []netip.Addr
	for _, w := range x.wires {
		if w.Pod == p.name && (w.UID == "" || w.UID == p.uid) {
			out = append(out, w.Address)
		}
	}
	return out
}

// setWires takes in which interfaces there are.
func (x *index) setWires(wires []Wire) {
	if slices.Equal(x.wires, wires) {
		return
	}
	touched := map[types.NamespacedName]bool{}
	for _, w := range x.wires {
		touched[w.Pod] = true
	}
	for _, w := range wires {
		touched[w.Pod] = true
	}
	x.wires = slices.Clone(wires)
	byPod := map[types.NamespacedName][]Wire{}
	for _, w := range wires {
		byPod[w.Pod] = append(byPod[w.Pod], w)
	}
	for name := range touched {
		p := x.pods[name]
		if p == nil || !p.local {
			continue
		}
		var addresses []netip.Addr
		for _, w := range byPod[name] {
			if !p.ended && (w.UID == "" || w.UID == p.uid) {
				addresses = append(addresses, w.Address)
			}
		}
		if slices.Equal(addresses, p.addresses) {
			continue
		}
		now := *p
		now.addresses = addresses
		x.pods[name] = &now
		x.membersOf(name.Namespace).pods[name] = &now
		x.place(p, &now)
	}
}

// setNamespace takes in the labels of a namespace.
func (x *index) setNamespace(name string, set labels.Set) {
	if set == nil {
		set = labels.Set{} // nil is a namespace that is not known
	}
	if old, there := x.namespaces[name]; there && maps.Equal(old, set) {
		return
	}
	x.namespaces[name] = set
	for _, p := range x.membersOf(name).pods {
		for _, s := range x.selectors {
			if s.namespaces != nil {
				s.replace(p, p, set)
			}
		}
	}
	x.tidy(name)
	if name == dnsNamespace {
		x.recompile()
	}
}

func (x *index) deleteNamespace(name string) {
	delete(x.namespaces, name)
	for _, p := range x.membersOf(name).pods {
		for _, s := range x.selectors {
			if s.namespaces != nil {
				s.remove(p)
			}
		}
	}
	x.tidy(name)
	if name == dnsNamespace {
		x.recompile()
	}
}

// setPolicy takes in a policy as it is now.
func (x *index) setPolicy(p *networkingv1.NetworkPolicy) {
	name := types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
	c := compile(p, x.dns.rule(x.namespaces[dnsNamespace]))
	old := x.policies[name]
	x.policies[name] = c
	x.membersOf(name.Namespace).policies[name] = c
	for id, want := range c.sets {
		s := x.selectors[id]
		if s == nil {
			s = want.empty()
			x.selectors[id] = s
			x.gather(s)
		}
		s.users++
	}
	if old != nil {
		x.release(old)
	}
	if old == nil || old.selects.String() != c.selects.String() {
		x.reselect(name.Namespace)
	}
}

// gather puts all pods into a new selector's set.
func (x *index) gather(s *selector) {
	if s.namespace != "" {
		for _, p := range x.membersOf(s.namespace).pods {
			s.replace(nil, p, nil)
		}
		x.tidy(s.namespace)
		return
	}
	for _, p := range x.pods {
		s.replace(nil, p, x.namespaces[p.name.Namespace])
	}
}

func (x *index) release(c *compiled) {
	for id := range c.sets {
		if s := x.selectors[id]; s != nil {
			if s.users--; s.users == 0 {
				delete(x.selectors, id)
			}
		}
	}
}

func (x *index) deletePolicy(name types.NamespacedName) {
	c := x.policies[name]
	if c == nil {
		return
	}
	x.release(c)
	delete(x.policies, name)
	delete(x.membersOf(name.Namespace).policies, name)
	x.reselect(name.Namespace)
	x.tidy(name.Namespace)
}

func (x *index) reselect(namespace string) {
	for _, p := range x.membersOf(namespace).pods {
		x.choose(p)
	}
}

// recompile translates all policies anew: whether they reach DNS depends on the labels of its namespace.
func (x *index) recompile() {
	for _, c := range x.policies {
		x.setPolicy(c.source)
	}
}

// build is the state for this host. What has not changed since the last one is the same pointer.
func (x *index) build() *policyv1.State {
	out := &policyv1.State{Pods: map[netip.Addr]*policyv1.Pod{}, Sets: map[string]*policyv1.Set{}, Policies: map[string]*policyv1.Policy{}}
	for _, w := range x.wires {
		p := x.pods[w.Pod]
		if p == nil || !p.local || p.ended || w.UID != "" && w.UID != p.uid {
			continue
		}
		id := w.Pod.String()
		out.Pods[w.Address] = &policyv1.Pod{Name: id, Interface: w.Interface, MAC: w.MAC, Address: w.Address, Policies: p.policies}
		for _, policy := range p.policies {
			if out.Policies[policy] != nil {
				continue
			}
			c := x.policies[nameOf(policy)]
			out.Policies[policy] = c.policy
			for set := range c.sets {
				out.Sets[set] = x.selectors[set].build()
			}
		}
	}
	return out
}

// owner is the pod with an address, "" when there is none.
func (x *index) owner(a netip.Addr) string {
	for _, p := range x.pods {
		if slices.Contains(p.addresses, a) {
			return p.name.String()
		}
	}
	return ""
}
