// Package policyv1 is what NetworkPolicies come down to on one host: its pods with their interfaces, sets of
// addresses, and rules that name the sets. It knows neither selectors nor nftables.
//
// internal/controllers/networkpolicy writes it, internal/network/policy enforces it, and the agent passes it on.
// What is handed over is never changed afterwards: an equal pointer means that nothing has changed behind it. The
// functions here only look; nothing can go wrong in them.
package policyv1

import (
	"net/netip"
	"strings"
	"time"
)

// Tier is one of two groups of policies. Traffic must be allowed by both.
type Tier string

// The tiers.
const (
	TierAdministrator Tier = "administrator"
	TierOwner         Tier = "owner"
)

// Protocol is a transport protocol.
type Protocol string

// The protocols.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// State is everything that one host enforces.
type State struct {
	// Pods of this host, by address. Others than these get no traffic at all.
	Pods map[netip.Addr]*Pod
	// Sets by id, all that policies name.
	Sets map[string]*Set
	// Policies by id, all that pods name.
	Policies map[string]*Policy
}

// Pod is one pod of this host.
type Pod struct {
	// Name is NAMESPACE/NAME.
	Name string
	// Interface is the host's end of the pod's wire, MAC the address of the pod's end.
	Interface string
	MAC       string
	Address   netip.Addr
	// Policies are the ids of those that select it, sorted.
	Policies []string
}

// Set is addresses, or endpoints for ports that have names. Both are sorted and without duplicates.
type Set struct {
	Addresses []netip.Addr
	Endpoints []Endpoint
}

// Endpoint is one port of one pod.
type Endpoint struct {
	Address  netip.Addr
	Protocol Protocol
	Port     uint16
}

// Policy is one NetworkPolicy.
type Policy struct {
	// ID is NAMESPACE/NAME.
	ID   string
	Tier Tier
	// Ingress and Egress are nil when the policy says nothing about that direction. Without rules nothing is allowed.
	Ingress, Egress *Direction
}

// Direction is what is allowed in one direction.
type Direction struct {
	Rules []Rule
}

// Rule allows traffic with any of its peers through any of its ports.
type Rule struct {
	// AnyPeer allows all addresses; the two lists are empty then. Peers are ids of sets of addresses.
	AnyPeer bool
	Peers   []string
	Blocks  []Block
	// AnyPort allows all protocols and ports; the two lists are empty then. Named are ids of sets of endpoints, which
	// the destination is looked up in.
	AnyPort bool
	Ports   []PortRange
	Named   []string
}

// Block is a network without some of its parts.
type Block struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// PortRange is ports from First to Last.
type PortRange struct {
	Protocol    Protocol
	First, Last uint16
}

// NamespaceOf is the namespace of a pod's name or a policy's id.
func NamespaceOf(id string) string {
	namespace, _, _ := strings.Cut(id, "/")
	return namespace
}

// Status is how policies are enforced on a host, as `atoll status` and `atoll network` read it.
type Status struct {
	Pods     int `json:"pods"`
	Policies int `json:"policies"`
	// Error says why they are not enforced as they should be.
	Error string `json:"error,omitempty"`
	// Limits says what the kernel of the host cannot do.
	Limits []string `json:"limits,omitempty"`
	// Counters says what counters of the table count, by their names: "allowed DIRECTION POLICY" or "denied DIRECTION
	// TIER NAMESPACE".
	Counters map[string]string `json:"counters,omitempty"`
	// PodDelay50 and PodDelay95 are how long after they had an address pods had their rules.
	PodDelay50 time.Duration `json:"podDelay50"`
	PodDelay95 time.Duration `json:"podDelay95"`
}
