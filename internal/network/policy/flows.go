package policy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

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

// finder looks for connections that are not allowed, and counts them.
type finder struct {
	state *policyv1.State
	gone  map[netip.Addr]bool
	local map[netip.Addr]bool // of the host
	// subnet is where pods of this host are: an address in it that is nobody's was that of a pod.
	subnet netip.Prefix
	pairs  map[string]bool
	found  int
}

// MatchConntrackFlow is called for each entry of the kernel's table.
func (c *finder) MatchConntrackFlow(k *netlink.ConntrackFlow) bool {
	f, back := flowOf(k)
	if c.left(f.From) || c.left(f.To) || c.left(back) {
		c.found++
		return true
	}
	if c.local[f.From] || Allowed(c.state, f) {
		return false
	}
	c.found++
	if f.Protocol == policyv1.TCP {
		for _, p := range pairs(f.From, f.To) {
			c.pairs[p] = true
		}
	}
	return true
}

// left tells whether an address was that of a pod that is gone.
func (c *finder) left(a netip.Addr) bool {
	return c.gone[a] || c.subnet.Contains(a) && c.state.Pods[a] == nil && !c.local[a]
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

// Cut ends the connections of pods that the state applied last does not allow, and forgets those of pods that are gone,
// whose addresses others get. The peers of a connection over TCP cannot go on with it by sending in its middle.
// It returns how many entries of the kernel's table it removed.
func (e *Engine) Cut(ctx context.Context) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state == nil || e.nft == nil {
		return 0, nil
	}
	local, err := hostAddresses()
	if err != nil {
		return 0, err
	}
	c := &finder{state: e.state, gone: e.gone, local: local, subnet: e.cfg.Network.Subnet, pairs: map[string]bool{}}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return 0, fmt.Errorf("listing connections: %w", err)
	}
	for _, f := range flows {
		c.MatchConntrackFlow(f)
	}
	if c.found == 0 {
		e.gone = map[netip.Addr]bool{}
		return 0, nil
	}
	if len(c.pairs) > 0 {
		tx := e.nft.NewTransaction()
		for _, p := range sorted(c.pairs) {
			tx.Add(&knftables.Element{Set: cutSet, Key: strings.Split(p, " . ")})
		}
		if err := e.nft.Run(ctx, tx); err != nil {
			return 0, fmt.Errorf("cutting connections: %w", err)
		}
	}
	n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, c)
	if err != nil {
		return int(n), fmt.Errorf("cutting connections: %w", err)
	}
	e.gone = map[netip.Addr]bool{}
	return int(n), nil
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
