package policy

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// Flow is one connection as the rules see it: after the translation of its destination, before that of its source.
type Flow struct {
	From, To netip.Addr
	// Protocol is "" for others than TCP, UDP and SCTP.
	Protocol policyv1.Protocol
	Port     uint16 // of To
}

// Allowed tells whether a state lets a connection begin. The host itself is not told from others: what it sends to pods
// is always allowed, which is for the caller to know.
func Allowed(s *policyv1.State, f Flow) bool {
	if f.From == f.To {
		return true
	}
	for _, d := range directions() {
		own, peer := f.To, f.From
		if d == egress {
			own, peer = f.From, f.To
		}
		pod := s.Pods[own]
		if pod == nil {
			continue
		}
		for _, tier := range tiers() {
			ids := selecting(s, pod, d, tier)
			if len(ids) == 0 {
				continue
			}
			one := slices.ContainsFunc(ids, func(id string) bool {
				return slices.ContainsFunc(d.of(s.Policies[id]).Rules, func(r policyv1.Rule) bool {
					return matchesPeer(s, r, peer) && matchesPort(s, r, f)
				})
			})
			if !one {
				return false
			}
		}
	}
	return true
}

func matchesPeer(s *policyv1.State, r policyv1.Rule, peer netip.Addr) bool {
	if r.AnyPeer {
		return true
	}
	for _, id := range r.Peers {
		if set := s.Sets[id]; set != nil {
			if _, ok := slices.BinarySearchFunc(set.Addresses, peer, netip.Addr.Compare); ok {
				return true
			}
		}
	}
	return slices.ContainsFunc(r.Blocks, func(b policyv1.Block) bool {
		return b.CIDR.Contains(peer) && !slices.ContainsFunc(b.Except, func(e netip.Prefix) bool { return e.Contains(peer) })
	})
}

func matchesPort(s *policyv1.State, r policyv1.Rule, f Flow) bool {
	if r.AnyPort {
		return true
	}
	for _, p := range r.Ports {
		if p.Protocol == f.Protocol && p.First <= f.Port && f.Port <= p.Last {
			return true
		}
	}
	return slices.ContainsFunc(r.Named, func(id string) bool {
		set := s.Sets[id]
		return set != nil && slices.Contains(set.Endpoints, policyv1.Endpoint{Address: f.To, Protocol: f.Protocol, Port: f.Port})
	})
}

// flowOf is an entry of the kernel's table: its answers come from where its packets really go. The address that it
// was sent to comes back, too.
func flowOf(k *netlink.ConntrackFlow) (f Flow, original netip.Addr) {
	from, _ := netip.AddrFromSlice(k.Forward.SrcIP)
	to, _ := netip.AddrFromSlice(k.Reverse.SrcIP)
	original, _ = netip.AddrFromSlice(k.Forward.DstIP)
	f = Flow{From: from.Unmap(), To: to.Unmap()}
	switch k.Forward.Protocol {
	case unix.IPPROTO_TCP:
		f.Protocol = policyv1.TCP
	case unix.IPPROTO_UDP:
		f.Protocol = policyv1.UDP
	case unix.IPPROTO_SCTP:
		f.Protocol = policyv1.SCTP
	}
	if f.Protocol != "" {
		f.Port = k.Reverse.SrcPort
	}
	return f, original.Unmap()
}

func hostAddresses() (map[netip.Addr]bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("listing the host's addresses: %w", err)
	}
	out := map[netip.Addr]bool{}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out[p.Addr().Unmap()] = true
		}
	}
	return out, nil
}
