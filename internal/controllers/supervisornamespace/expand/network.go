package expand

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Network is the address plan of the cluster.
type Network struct {
	PodCIDR     netip.Prefix
	ServiceCIDR netip.Prefix
	// DNS are the addresses that the cluster's DNS answers at, on DNSPort behind them and on 53.
	DNS     []netip.Addr
	DNSPort int
}

// IsolationName is the name of the NetworkPolicy.
const IsolationName = "atoll-isolation"

// isolation is the policy of the tier administrator, nil where nothing is bounded. A direction that is not bounded is
// not in it.
func isolation(in Input) *networkingv1.NetworkPolicy {
	n := in.Spec.Network
	spec := networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{}}
	if n.Isolation != atoll.IsolationOpen || n.IngressCIDRs != nil {
		spec.PolicyTypes = append(spec.PolicyTypes, networkingv1.PolicyTypeIngress)
		if peers := in.peers(n.IngressCIDRs, n.FromNamespaces); len(peers) > 0 {
			spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: peers}}
		}
	}
	if n.Isolation != atoll.IsolationOpen || n.EgressCIDRs != nil {
		spec.PolicyTypes = append(spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		spec.Egress = []networkingv1.NetworkPolicyEgressRule{in.dns()}
		if peers := in.peers(n.EgressCIDRs, n.ToNamespaces); len(peers) > 0 {
			spec.Egress = append(spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers})
		}
	}
	if len(spec.PolicyTypes) == 0 {
		return nil
	}
	p := &networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: networkingv1.SchemeGroupVersion.String(), Kind: "NetworkPolicy"},
		ObjectMeta: in.meta(IsolationName),
		Spec:       spec,
	}
	p.Labels[atoll.TierLabel] = atoll.TierAdministrator
	return p
}

// peers are who may be talked with in one direction.
func (in Input) peers(cidrs, namespaces []string) []networkingv1.NetworkPolicyPeer {
	var out []networkingv1.NetworkPolicyPeer
	switch in.Spec.Network.Isolation {
	case atoll.IsolationOpen:
		out = append(out, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{}})
	case atoll.IsolationIsolated:
		out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{}})
		if cidrs == nil {
			out = append(out, in.block(netip.PrefixFrom(netip.IPv4Unspecified(), 0)))
		}
	}
	if len(namespaces) > 0 && in.Spec.Network.Isolation != atoll.IsolationOpen {
		out = append(out, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{
			MatchExpressions: []metav1.LabelSelectorRequirement{{
				Key: corev1.LabelMetadataName, Operator: metav1.LabelSelectorOpIn, Values: slices.Sorted(slices.Values(namespaces)),
			}},
		}})
	}
	for _, c := range cidrs {
		if prefix, err := netip.ParsePrefix(c); err == nil {
			out = append(out, in.block(prefix.Masked()))
		}
	}
	return out
}

// block is a range of addresses without those of pods and Services, which are inside of the cluster.
func (in Input) block(prefix netip.Prefix) networkingv1.NetworkPolicyPeer {
	block := &networkingv1.IPBlock{CIDR: prefix.String()}
	for _, inside := range []netip.Prefix{in.Network.PodCIDR, in.Network.ServiceCIDR} {
		if inside.IsValid() && prefix.Contains(inside.Addr()) && prefix.Bits() < inside.Bits() {
			block.Except = append(block.Except, inside.Masked().String())
		}
	}
	return networkingv1.NetworkPolicyPeer{IPBlock: block}
}

// dns lets names be looked up.
func (in Input) dns() networkingv1.NetworkPolicyEgressRule {
	rule := networkingv1.NetworkPolicyEgressRule{}
	for _, addr := range in.Network.DNS {
		rule.To = append(rule.To, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: netip.PrefixFrom(addr, addr.BitLen()).String()}})
	}
	ports := []int{53}
	if in.Network.DNSPort != 53 && in.Network.DNSPort != 0 {
		ports = append(ports, in.Network.DNSPort)
	}
	for _, port := range ports {
		for _, protocol := range []corev1.Protocol{corev1.ProtocolUDP, corev1.ProtocolTCP} {
			rule.Ports = append(rule.Ports, networkingv1.NetworkPolicyPort{Protocol: new(protocol), Port: new(intstr.FromInt32(int32(port)))})
		}
	}
	return rule
}
