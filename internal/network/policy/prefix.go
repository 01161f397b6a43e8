package policy

import (
	"fmt"
	"strings"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/network/gateway"
)

// wirePrefix is what the host's ends of pods are called.
const wirePrefix = gateway.Prefix

// LogGroup is the netlink group that packets which were denied are sent to.
const LogGroup = 4106

// A namespace logs no more than logRate packets a second of one direction and tier, after a burst; of each packet as
// much as holds the headers.
const (
	logRate  = 20
	logBurst = 100
	logBytes = 96
)

// Prefix is what the kernel says with a packet that was denied.
type Prefix struct {
	// Ingress: the policies of the receiver have denied it, else those of the sender.
	Ingress   bool
	Tier      policyv1.Tier
	Namespace string
}

// String is the prefix in at most 127 bytes: a namespace has 63.
func (p Prefix) String() string {
	d := egress
	if p.Ingress {
		d = ingress
	}
	return fmt.Sprintf("%s/%s/%s", d, p.Tier, p.Namespace)
}

// ParsePrefix reads what String writes.
func ParsePrefix(s string) (Prefix, bool) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 || parts[2] == "" {
		return Prefix{}, false
	}
	p := Prefix{Ingress: parts[0] == string(ingress), Tier: policyv1.Tier(parts[1]), Namespace: parts[2]}
	if !p.Ingress && parts[0] != string(egress) || p.Tier != policyv1.TierAdministrator && p.Tier != policyv1.TierOwner {
		return Prefix{}, false
	}
	return p, true
}
