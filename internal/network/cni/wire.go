package cni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/lease"
)

// wire makes the pod's interface and everything that leads to it, and returns
// its MTU.
func wire(n cniconf.Network, l *lease.Lease, pod *netns.NS, lim limits) (mtu int, err error) {
	s, err := rtnl.Open()
	if err != nil {
		return 0, err
	}
	defer s.Close()
	br, _, err := gateway.Ensure(s, n)
	if err != nil {
		return 0, err
	}
	mtu = br.Attrs().MTU
	if err := addVeth(s, n, l, mtu, pod); err != nil {
		return 0, fmt.Errorf("creating interface %s: %w", l.IfName, err)
	}
	index, err := rtnl.Index(l.HostIf)
	if err != nil {
		return 0, err
	}
	if err := gateway.Attach(s, n, index, l.Address, gateway.Hardware(l.Address, l.MAC)); err != nil {
		return 0, err
	}
	if err := lim.towardsPod(s, index, mtu); err != nil {
		return 0, err
	}
	err = pod.Do(func() error {
		return configure(n, l, mtu, lim)
	})
	if err != nil {
		return 0, err
	}
	// The host's end came up without a carrier. Until the kernel's link watch
	// has noticed the pod's end it drops every packet; asking for the link
	// makes it notice (since Linux 6.8; before, within milliseconds).
	if _, err := s.LinkByIndex(index); err != nil {
		return 0, fmt.Errorf("checking host end: %w", err)
	}
	return mtu, nil
}

// addVeth makes the pair in one request, the pod's end where it belongs: moving
// an interface afterwards makes the kernel wait for its grace periods.
func addVeth(s *rtnl.Socket, n cniconf.Network, l *lease.Lease, mtu int, pod *netns.NS) error {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(l.IfName))
	peer.AddRtAttr(unix.IFLA_ADDRESS, gateway.Hardware(l.Address, l.MAC))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(pod.FD())))
	return s.Send(
		unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nl.NewIfInfomsg(unix.AF_UNSPEC),
		nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(l.HostIf)),
		nl.NewRtAttr(unix.IFLA_ADDRESS, gateway.MAC(n.Gateway)),
		nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))),
		info,
	)
}

// configure sets up the pod's end; it runs inside the pod's namespace.
func configure(n cniconf.Network, l *lease.Lease, mtu int, lim limits) error {
	s, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer s.Close()
	const loopback = 1 // lo is every namespace's first interface
	if err := s.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: loopback}}); err != nil {
		return fmt.Errorf("bringing up lo: %w", err)
	}
	index, err := rtnl.Index(l.IfName)
	if err != nil {
		return err
	}
	if err := s.LinkUp(index); err != nil {
		return fmt.Errorf("bringing up %s: %w", l.IfName, err)
	}
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	if err := s.AddrAdd(link, &netlink.Addr{IPNet: hostNet(l.Address)}); err != nil {
		return fmt.Errorf("adding address %s: %w", l.Address, err)
	}
	err = s.NeighSet(&netlink.Neigh{
		LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: n.Gateway.AsSlice(), HardwareAddr: gateway.MAC(n.Gateway),
	})
	if err != nil {
		return fmt.Errorf("adding neighbour entry of gateway: %w", err)
	}
	routes := []netlink.Route{
		{LinkIndex: index, Dst: hostNet(n.Gateway), Scope: netlink.SCOPE_LINK, Src: l.Address.AsSlice()},
		{LinkIndex: index, Gw: n.Gateway.AsSlice(), Src: l.Address.AsSlice()},
	}
	for _, r := range routes {
		if err := s.RouteAdd(&r); err != nil {
			return fmt.Errorf("adding route through %s: %w", n.Gateway, err)
		}
	}
	return lim.fromPod(s, index, mtu)
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// unwire removes what wire made. Everything goes with the host's end, whether
// the pod's namespace is still there or not.
func unwire(l *lease.Lease) error {
	index, err := rtnl.Index(l.HostIf)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	s, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer s.Close()
	err = s.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing interface %s: %w", l.HostIf, err)
	}
	return nil
}
