// Package bridge makes the pod bridge and its ports.
//
// It is the part of the host's wiring that both the CNI plugin and Host need:
// the plugin when a pod comes, Host when something was removed behind its
// back. It knows no leases and no packet filter.
//
// A port is isolated from other ports and neither learns nor floods: the
// bridge's own address is all a pod reaches on this segment, through static
// forwarding and neighbour entries made here. See package network.
package bridge

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
)

// Config describes the bridge.
type Config struct {
	Name    string
	Address netip.Prefix // the gateway's address with the length of the pod subnet
	MTU     int          // 0 keeps the kernel's 1500
}

// ConfigOf returns the bridge of a pod network.
func ConfigOf(n cniconf.Network) Config {
	return Config{Name: n.Bridge, Address: netip.PrefixFrom(n.Gateway, n.Subnet.Bits()), MTU: n.MTU}
}

// HostIf is the name of the host's end of a pod interface's veth pair: the
// same for the same interface, always 15 bytes.
func HostIf(containerID, ifName string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + ifName))
	return "atl" + hex.EncodeToString(sum[:6])
}

// MAC is the address of the interface that holds a: locally administered and
// made of the IPv4 address, so that a neighbour entry that outlives its pod is
// still right for the next pod with the same address.
func MAC(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x0a, 0x58, b[0], b[1], b[2], b[3]}
}

// Ensure makes the bridge if it is missing, sets what differs from c and
// brings it up. It returns the bridge as it is then, and whether it was made.
func Ensure(s *rtnl.Socket, c Config) (br netlink.Link, made bool, err error) {
	br, made, err = ensure(s, c)
	if err != nil {
		return nil, false, fmt.Errorf("setting up bridge %s: %w", c.Name, err)
	}
	return br, made, nil
}

func ensure(s *rtnl.Socket, c Config) (netlink.Link, bool, error) {
	link, err := s.LinkByName(c.Name)
	made := false
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		if made, err = create(s, c); err != nil {
			return nil, false, err
		}
		link, err = s.LinkByName(c.Name)
	}
	if err != nil {
		return nil, false, err
	}
	if link.Type() != "bridge" {
		return nil, false, fmt.Errorf("an interface of type %s has this name", link.Type())
	}
	a := link.Attrs()
	if mac := MAC(c.Address.Addr()); a.HardwareAddr.String() != mac.String() {
		if err := s.LinkSetHardwareAddr(link, mac); err != nil {
			return nil, false, fmt.Errorf("setting address: %w", err)
		}
		a.HardwareAddr = mac
	}
	if c.MTU != 0 && a.MTU != c.MTU {
		if err := s.LinkSetMTU(link, c.MTU); err != nil {
			return nil, false, fmt.Errorf("setting MTU: %w", err)
		}
		a.MTU = c.MTU
	}
	if err := ensureAddress(s, link, c.Address); err != nil {
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
func create(s *rtnl.Socket, c Config) (bool, error) {
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name = c.Name
	attrs.HardwareAddr = MAC(c.Address.Addr())
	attrs.MTU = c.MTU
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
	err = s.AddrAdd(link, &netlink.Addr{IPNet: ipNet(want)})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding address %s: %w", want, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Attach makes the interface with index port, already a port of the bridge,
// the way to the pod with address pod, and brings it up.
func Attach(s *rtnl.Socket, bridge, port int, pod netip.Addr) error {
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(port)
	opts := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	opts.AddRtAttr(nl.IFLA_BRPORT_ISOLATED, nl.Uint8Attr(1))
	opts.AddRtAttr(nl.IFLA_BRPORT_LEARNING, nl.Uint8Attr(0))
	opts.AddRtAttr(nl.IFLA_BRPORT_UNICAST_FLOOD, nl.Uint8Attr(0))
	opts.AddRtAttr(nl.IFLA_BRPORT_MCAST_FLOOD, nl.Uint8Attr(0))
	opts.AddRtAttr(nl.IFLA_BRPORT_BCAST_FLOOD, nl.Uint8Attr(0))
	if err := s.Send(unix.RTM_SETLINK, 0, msg, opts); err != nil {
		return fmt.Errorf("setting bridge port options: %w", err)
	}
	mac := MAC(pod)
	err := s.NeighSet(&netlink.Neigh{
		LinkIndex: port, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER,
		State: netlink.NUD_NOARP, HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("adding forwarding entry: %w", err)
	}
	err = s.NeighSet(&netlink.Neigh{
		LinkIndex: bridge, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: pod.AsSlice(), HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("adding neighbour entry: %w", err)
	}
	if err := s.LinkUp(port); err != nil {
		return fmt.Errorf("bringing up host end: %w", err)
	}
	return nil
}

// Detach removes what Attach left on the bridge itself; the rest goes away
// with the port. Nothing there is no error.
func Detach(s *rtnl.Socket, bridge int, pod netip.Addr) error {
	err := s.NeighDel(&netlink.Neigh{LinkIndex: bridge, Family: unix.AF_INET, IP: pod.AsSlice()})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing neighbour entry of %s: %w", pod, err)
	}
	return nil
}

// Ports returns the bridge's ports by name.
func Ports(s *rtnl.Socket, bridge int) (map[string]netlink.Link, error) {
	links, err := s.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	out := map[string]netlink.Link{}
	for _, l := range links {
		if l.Attrs().MasterIndex == bridge {
			out[l.Attrs().Name] = l
		}
	}
	return out, nil
}
