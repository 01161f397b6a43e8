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
	"atoll.dev/atoll/internal/network/bridge"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/lease"
)

// wired is what wire found out on the way.
type wired struct {
	bridgeMAC net.HardwareAddr
	mtu       int
}

// wire makes the pod's interface and everything that leads to it.
func wire(n cniconf.Network, l *lease.Lease, pod *netns.NS, lim limits) (wired, error) {
	s, err := rtnl.Open()
	if err != nil {
		return wired{}, err
	}
	defer s.Close()
	br, _, err := bridge.Ensure(s, bridge.ConfigOf(n))
	if err != nil {
		return wired{}, err
	}
	w := wired{bridgeMAC: br.Attrs().HardwareAddr, mtu: br.Attrs().MTU}
	mac := bridge.MAC(l.Address)
	if err := addVeth(s, l.HostIf, l.IfName, mac, w.mtu, br.Attrs().Index, pod); err != nil {
		return wired{}, fmt.Errorf("creating interface %s: %w", l.IfName, err)
	}
	port, err := rtnl.Index(l.HostIf)
	if err != nil {
		return wired{}, err
	}
	if err := bridge.Attach(s, br.Attrs().Index, port, l.Address); err != nil {
		return wired{}, err
	}
	if err := lim.towardsPod(s, port, w.mtu); err != nil {
		return wired{}, err
	}
	return w, pod.Do(func() error {
		return configure(l, n.Gateway, w, lim)
	})
}

// addVeth makes the pair in one request, the pod's end where it belongs and
// the host's end on the bridge: moving an interface afterwards makes the
// kernel wait for its grace periods.
func addVeth(s *rtnl.Socket, hostIf, podIf string, mac net.HardwareAddr, mtu, master int, pod *netns.NS) error {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(podIf))
	peer.AddRtAttr(unix.IFLA_ADDRESS, mac)
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(pod.FD())))
	return s.Send(
		unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nl.NewIfInfomsg(unix.AF_UNSPEC),
		nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(hostIf)),
		nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))),
		nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(master))),
		info,
	)
}

// configure sets up the pod's end; it runs inside the pod's namespace.
func configure(l *lease.Lease, gateway netip.Addr, w wired, lim limits) error {
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
		IP: gateway.AsSlice(), HardwareAddr: w.bridgeMAC,
	})
	if err != nil {
		return fmt.Errorf("adding neighbour entry of gateway: %w", err)
	}
	routes := []netlink.Route{
		{LinkIndex: index, Dst: hostNet(gateway), Scope: netlink.SCOPE_LINK, Src: l.Address.AsSlice()},
		{LinkIndex: index, Gw: gateway.AsSlice(), Src: l.Address.AsSlice()},
	}
	for _, r := range routes {
		if err := s.RouteAdd(&r); err != nil {
			return fmt.Errorf("adding route through %s: %w", gateway, err)
		}
	}
	return lim.fromPod(s, index, w.mtu)
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// unwire removes what wire made. The pod's end goes with the host's, whether
// the pod's namespace is still there or not.
func unwire(bridgeName string, l *lease.Lease) error {
	s, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer s.Close()
	index, err := rtnl.Index(l.HostIf)
	if err == nil {
		err = s.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}})
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing interface %s: %w", l.HostIf, err)
	}
	if !l.Address.IsValid() {
		return nil
	}
	br, err := rtnl.Index(bridgeName)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	return bridge.Detach(s, br, l.Address)
}
