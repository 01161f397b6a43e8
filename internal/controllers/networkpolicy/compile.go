package networkpolicy

import (
	"math"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// compiled is a policy with the selectors that its rules name.
type compiled struct {
	id      string
	source  *networkingv1.NetworkPolicy
	selects labels.Selector
	policy  *policyv1.Policy
	sets    map[string]*selector
}

func nameOf(id string) types.NamespacedName {
	namespace, name, _ := strings.Cut(id, "/")
	return types.NamespacedName{Namespace: namespace, Name: name}
}

// compiler translates one policy.
type compiler struct {
	namespace string
	dns       *dnsRule
	out       *compiled
}

// compile translates a policy. A selector that does not parse, which the API server does not let in, selects nothing.
func compile(p *networkingv1.NetworkPolicy, dns *dnsRule) *compiled {
	id := p.Namespace + "/" + p.Name
	c := &compiler{namespace: p.Namespace, dns: dns, out: &compiled{
		id: id, source: p, selects: selectorOf(&p.Spec.PodSelector), sets: map[string]*selector{},
		policy: &policyv1.Policy{ID: id, Tier: policyv1.TierOwner},
	}}
	if p.Labels[atoll.TierLabel] == atoll.TierAdministrator {
		c.out.policy.Tier = policyv1.TierAdministrator
	}
	in, out := directionsOf(p)
	if in {
		d := &policyv1.Direction{}
		for _, r := range p.Spec.Ingress {
			d.Rules = append(d.Rules, c.rule(r.From, r.Ports, false)...)
		}
		c.out.policy.Ingress = d
	}
	if out {
		d := &policyv1.Direction{}
		for _, r := range p.Spec.Egress {
			d.Rules = append(d.Rules, c.rule(r.To, r.Ports, true)...)
		}
		c.out.policy.Egress = d
	}
	return c.out
}

// directionsOf says what a policy is about. Without types it is ingress, and egress if there is a rule for it.
func directionsOf(p *networkingv1.NetworkPolicy) (ingress, egress bool) {
	if len(p.Spec.PolicyTypes) == 0 {
		return true, len(p.Spec.Egress) > 0
	}
	for _, t := range p.Spec.PolicyTypes {
		ingress = ingress || t == networkingv1.PolicyTypeIngress
		egress = egress || t == networkingv1.PolicyTypeEgress
	}
	return ingress, egress
}

func selectorOf(s *metav1.LabelSelector) labels.Selector {
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return out
}

// rule translates one rule. Egress to the cluster's DNS becomes a rule of its own, since it is no pod.
func (c *compiler) rule(from []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, egress bool) []policyv1.Rule {
	r := policyv1.Rule{AnyPeer: len(from) == 0}
	var selectors []*selector
	dns := false
	for _, peer := range from {
		if peer.IPBlock != nil {
			if b, ok := blockOf(peer.IPBlock); ok {
				r.Blocks = append(r.Blocks, b)
			}
			continue
		}
		s := c.peer(peer)
		selectors = append(selectors, s)
		r.Peers = append(r.Peers, c.add(s))
		dns = dns || egress && c.dns.matches(s)
	}
	c.ports(&r, ports, selectors, egress)
	out := []policyv1.Rule{r}
	if dns {
		if also := c.dns.through(r, ports); also != nil {
			out = append(out, *also)
		}
	}
	return out
}

// add notes a selector that is used and returns its id.
func (c *compiler) add(s *selector) string {
	id := s.id()
	c.out.sets[id] = s
	return id
}

func (c *compiler) peer(p networkingv1.NetworkPolicyPeer) *selector {
	s := &selector{pods: labels.Everything()}
	if p.PodSelector != nil {
		s.pods = selectorOf(p.PodSelector)
	}
	if p.NamespaceSelector != nil {
		s.namespaces = selectorOf(p.NamespaceSelector)
	} else {
		s.namespace = c.namespace
	}
	return s
}

func blockOf(b *networkingv1.IPBlock) (policyv1.Block, bool) {
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		return policyv1.Block{}, false
	}
	out := policyv1.Block{CIDR: cidr.Masked()}
	for _, e := range b.Except {
		except, err := netip.ParsePrefix(e)
		if err != nil {
			return policyv1.Block{}, false // an exception that is not understood must not be dropped
		}
		out.Except = append(out.Except, except.Masked())
	}
	return out, true
}

// ports translates ports. Names are looked up in the pods that are selected for ingress, in the peers for egress.
func (c *compiler) ports(r *policyv1.Rule, ports []networkingv1.NetworkPolicyPort, peers []*selector, egress bool) {
	if len(ports) == 0 {
		r.AnyPort = true
		return
	}
	for _, p := range ports {
		protocol := protocolOf(p.Protocol)
		switch {
		case p.Port == nil:
			r.Ports = append(r.Ports, policyv1.PortRange{Protocol: protocol, Last: math.MaxUint16})
		case p.Port.Type == intstr.Int:
			first := uint16(p.Port.IntVal)
			last := first
			if p.EndPort != nil {
				last = uint16(*p.EndPort)
			}
			r.Ports = append(r.Ports, policyv1.PortRange{Protocol: protocol, First: first, Last: last})
		default:
			port := &namedPort{name: p.Port.StrVal, protocol: protocol}
			where := peers
			if !egress {
				where = []*selector{{namespace: c.namespace, pods: c.out.selects}}
			} else if r.AnyPeer {
				where = []*selector{{pods: labels.Everything()}}
			}
			for _, s := range where {
				r.Named = append(r.Named, c.add(&selector{namespace: s.namespace, namespaces: s.namespaces, pods: s.pods, port: port}))
			}
		}
	}
}

func protocolOf(p *corev1.Protocol) policyv1.Protocol {
	if p == nil {
		return policyv1.TCP
	}
	return policyv1.Protocol(strings.ToLower(string(*p)))
}

// portsOf is the named ports of a pod: those of its containers and of init containers that go on running.
func portsOf(p *corev1.Pod) []namedPort {
	var out []namedPort
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			out = append(out, named(c.Ports)...)
		}
	}
	for _, c := range p.Spec.Containers {
		out = append(out, named(c.Ports)...)
	}
	return out
}

func named(ports []corev1.ContainerPort) []namedPort {
	var out []namedPort
	for _, p := range ports {
		if p.Name == "" {
			continue
		}
		protocol := p.Protocol
		if protocol == "" {
			protocol = corev1.ProtocolTCP
		}
		out = append(out, namedPort{name: p.Name, protocol: protocolOf(&protocol), port: uint16(p.ContainerPort)})
	}
	return out
}

// DNS is where the cluster's DNS serves pods of this host.
type DNS struct {
	Address netip.Addr
	Port    uint16
}

// dnsNamespace and dnsLabels are what other clusters' DNS pods are selected by.
const dnsNamespace = "kube-system"

func dnsLabels() labels.Set { return labels.Set{"k8s-app": "kube-dns"} }

// dnsRule tells which selectors mean DNS. nil means none does.
type dnsRule struct {
	DNS
	namespace labels.Set
}

func (d DNS) rule(namespace labels.Set) *dnsRule {
	if !d.Address.IsValid() {
		return nil
	}
	return &dnsRule{DNS: d, namespace: namespace}
}

func (d *dnsRule) matches(s *selector) bool {
	if d == nil {
		return false
	}
	return s.matches(&pod{name: types.NamespacedName{Namespace: dnsNamespace}, labels: dnsLabels()}, d.namespace)
}

// through is the part of a rule that leads to DNS, nil if its ports do not.
func (d *dnsRule) through(r policyv1.Rule, ports []networkingv1.NetworkPolicyPort) *policyv1.Rule {
	out := &policyv1.Rule{Blocks: []policyv1.Block{{CIDR: netip.PrefixFrom(d.Address, d.Address.BitLen())}}}
	for _, protocol := range []policyv1.Protocol{policyv1.TCP, policyv1.UDP} {
		name := map[policyv1.Protocol]string{policyv1.UDP: "dns", policyv1.TCP: "dns-tcp"}[protocol]
		open := r.AnyPort
		for _, p := range r.Ports {
			// 53 is the Service's port, which people write.
			hit := func(port uint16) bool { return p.First <= port && port <= p.Last }
			open = open || p.Protocol == protocol && (hit(d.Port) || hit(53))
		}
		for _, p := range ports {
			open = open || p.Port != nil && p.Port.Type == intstr.String && p.Port.StrVal == name && protocolOf(p.Protocol) == protocol
		}
		if open {
			out.Ports = append(out.Ports, policyv1.PortRange{Protocol: protocol, First: d.Port, Last: d.Port})
		}
	}
	if len(out.Ports) == 0 {
		return nil
	}
	return out
}
