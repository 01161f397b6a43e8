package fields

import (
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
)

// Condition names, where it is True, the fields of an object that are set and have no effect.
const Condition = "atoll.dev/FieldsWithoutEffect"

// Reason is that of Condition.
const Reason = "FieldsIgnored"

// Network is the table of Network.spec.
func Network() []Field {
	return []Field{
		{Path: "spec.type", Effect: Honoured, Note: "pod, bridge, or vsphere-distributed, which is bridge with spec.bridge and else pod"},
		{Path: "spec.bridge.name", Effect: Honoured, Note: "our own field: a bridge that the host's administrator makes"},
		{Path: "spec.bridge.vlan", Effect: Honoured, Note: "our own field"},
		{Path: "spec.dns", Effect: Honoured, Note: "of interfaces that name no servers"},
		{Path: "spec.dnsSearchDomains", Effect: Honoured, Note: "likewise"},
		{Path: "spec.ntp", Effect: None, Note: "guests have the clock of their host"},
		{Path: "spec.providerRef", Effect: None, Note: "the network is what spec.bridge says"},
		{Path: "spec.ipPools", Effect: None, Note: "addresses are those of the pod network, of spec.network.interfaces of a machine or of DHCP"},
	}
}

// NetworkInterface is the table of NetworkInterface.spec.
func NetworkInterface() []Field {
	return []Field{
		{Path: "spec.networkName", Effect: Mapped, Note: "reported: the controller of VirtualMachines makes the object, by spec.network.interfaces of the machine"},
		{Path: "spec.type", Effect: Mapped, Note: "reported: the guest sees a virtio device"},
		{Path: "spec.externalID", Effect: None, Note: "no other system is asked about it"},
	}
}

// OfNetwork are the fields that a Network sets in vain, each with the reason.
func OfNetwork(spec *netop.NetworkSpec) []string {
	return inVain(Network(), map[string]bool{
		"spec.ntp": len(spec.NTP) > 0, "spec.providerRef": spec.ProviderRef != nil, "spec.ipPools": len(spec.IPPools) > 0,
	})
}

// OfNetworkInterface are those of a NetworkInterface.
func OfNetworkInterface(spec *netop.NetworkInterfaceSpec) []string {
	return inVain(NetworkInterface(), map[string]bool{"spec.externalID": spec.ExternalID != ""})
}

func inVain(table []Field, set map[string]bool) []string {
	var out []string
	for _, f := range table {
		if f.Effect == None && set[f.Path] {
			out = append(out, fmt.Sprintf("%s (%s)", f.Path, f.Note))
		}
	}
	return out
}

// WithCondition are the conditions of a Network or NetworkInterface with, or without, the one that names fields. The time
// changes only when fields do.
func WithCondition(list []netop.NetworkCondition, vain []string, now time.Time) []netop.NetworkCondition {
	text := strings.Join(vain, ", ")
	at := slices.IndexFunc(list, func(c netop.NetworkCondition) bool { return c.Type == Condition })
	switch {
	case at >= 0 && len(vain) > 0 && list[at].Message == text:
		return list
	case at < 0 && len(vain) == 0:
		return list
	}
	out := slices.DeleteFunc(slices.Clone(list), func(c netop.NetworkCondition) bool { return c.Type == Condition })
	if len(vain) == 0 {
		return out
	}
	return append(out, netop.NetworkCondition{
		Type: Condition, Status: metav1.ConditionTrue, Reason: Reason, Message: text, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
	})
}
