// Package gateway makes the host's side of the pod network: the bridge that
// holds the gateway address, and the host's end of each pod's wire.
//
// It is the part that both the CNI plugin and Host need: the plugin when a pod
// comes, Host when something was removed behind its back. It knows no leases
// and no packet filter.
//
// The bridge has no ports. It carries the gateway address, for name servers to
// listen on before there is a pod. A pod is reached by a route of its own
// through the host's end of its wire, which answers ARP for the gateway
// address as every interface of a host does. See package network for why.
package gateway

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
)

// Prefix is what the names of the host's ends begin with.
const Prefix = "atl"

// HostIf is the name of the host's end of a pod interface's veth pair: the
// same for the same interface, always 15 bytes.
func HostIf(containerID, ifName string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + ifName))
	return Prefix + hex.EncodeToString(sum[:6])
}

// MAC is the address of the interface that holds a: locally administered and
// made of the IPv4 address, so that a neighbour entry that outlives its pod is
// still right for the next pod with the same address. Every host's end has
// that of the gateway.
func MAC(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x0a, 0x58, b[0], b[1], b[2], b[3]}
}

// Hardware is the address of the interface of a pod: the one it was given, or MAC.
func Hardware(a netip.Addr, given string) net.HardwareAddr {
	if mac, err := net.ParseMAC(given); err == nil {
		return mac
	}
	return MAC(a)
}

// Ensure makes the bridge of the network if it is missing, sets what differs
// and brings it up. It returns the bridge as it is then, and whether it was
// made.
func Ensure(s *rtnl.Socket, n cniconf.Network) (br netlink.Link, made bool, err error) {
	br, made, err = ensure(s, n)
	if err != nil {
		return nil, false, fmt.Errorf("setting up bridge %s: %w", n.Bridge, err)
	}
	return br, made, nil
}

func ensure(s *rtnl.Socket, n cniconf.Network) (netlink.Link, bool, error) {
	link, err := s.LinkByName(n.Bridge)
	made := false
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		if made, err = create(s, n); err != nil {
			return nil, false, err
		}
		link, err = s.LinkByName(n.Bridge)
	}
	if err != nil {
		return nil, false, err
	}
	if link.Type() != "bridge" {
		return nil, false, fmt.Errorf("an interface of type %s has this name", link.Type())
	}
	a := link.Attrs()
	if n.MTU != 0 && a.MTU != n.MTU {
		if err := s.LinkSetMTU(link, n.MTU); err != nil {
			return nil, false, fmt.Errorf("setting MTU: %w", err)
		}
		a.MTU = n.MTU
	}
	if err := ensureAddress(s, link, netip.PrefixFrom(n.Gateway, n.Subnet.Bits())); err != nil {
		return nil, false, err
	}
	if a.Flags&net.FlagUp == 0 {
		if err := s.LinkUp(a.Index); err != nil {
			return nil, false, fmt.Errorf("bringing up: %w", err)
		}
	}
	return link, made, nil
}

// create makes the bridge; one that another process makes at the same time is
// as good.
func create(s *rtnl.Socket, n cniconf.Network) (bool, error) {
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.Bridge
	attrs.HardwareAddr = MAC(n.Gateway)
	attrs.MTU = n.MTU
	err := s.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off})
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("creating: %w", err)
	}
	return true, nil
}

// ensureAddress gives the bridge its gateway address and takes away addresses
// of an earlier configuration.
func ensureAddress(s *rtnl.Socket, link netlink.Link, want netip.Prefix) error {
	addrs, err := s.AddrList(link, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("listing addresses: %w", err)
	}
	found := false
	for _, a := range addrs {
		if a.IPNet.String() == want.String() {
			found = true
			continue
		}
		if err := s.AddrDel(link, &a); err != nil {
			return fmt.Errorf("removing address %s: %w", a.IPNet, err)
		}
	}
	if found {
		return nil
	}
	err = s.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{
		IP: want.Addr().AsSlice(), Mask: net.CIDRMask(want.Bits(), want.Addr().BitLen()),
	}})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding address %s: %w", want, err)
	}
	return nil
}

// Attach brings up the host's end of a wire, the interface with this index,
// and makes it the way to the pod, whose interface has the address mac. What it makes goes away with the interface.
func Attach(s *rtnl.Socket, n cniconf.Network, index int, pod netip.Addr, mac net.HardwareAddr) error {
	if err := s.LinkUp(index); err != nil {
		return fmt.Errorf("bringing up host end: %w", err)
	}
	err := s.NeighSet(&netlink.Neigh{
		LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: pod.AsSlice(), HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("adding neighbour entry of %s: %w", pod, err)
	}
	err = s.RouteReplace(&netlink.Route{
		LinkIndex: index, Scope: netlink.SCOPE_LINK, Src: n.Gateway.AsSlice(),
		Dst: &net.IPNet{IP: pod.AsSlice(), Mask: net.CIDRMask(pod.BitLen(), pod.BitLen())},
	})
	if err != nil {
		return fmt.Errorf("adding route to %s: %w", pod, err)
	}
	return nil
}

// Routed returns, for each destination with a route of its own through an
// interface, that interface's index.
func Routed(s *rtnl.Socket) (map[netip.Addr]int, error) {
	routes, err := s.RouteListFiltered(unix.AF_INET, &netlink.Route{Scope: netlink.SCOPE_LINK, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_SCOPE|netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("listing routes: %w", err)
	}
	out := map[netip.Addr]int{}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if ones, bits := r.Dst.Mask.Size(); ones != bits {
			continue
		}
		if a, ok := netip.AddrFromSlice(r.Dst.IP); ok {
			out[a.Unmap()] = r.LinkIndex
		}
	}
	return out, nil
}
