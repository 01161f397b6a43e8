package network

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
)

const (
	// PodInterface is the name of a pod's interface, as CNI makes it.
	PodInterface = "eth0"
	// PodTap is the name a tap gets in the pod's namespace.
	PodTap = "tap0"
)

// Guest is what the guest's eth0 must be: the identity of the pod's interface.
type Guest struct {
	MAC net.HardwareAddr
	MTU int
	// Addresses with their prefix lengths; pods of Atoll's own CNI have one
	// /32.
	Addresses []netip.Prefix
	// Routes in the order to add them: on-link ones first, so that a gateway is
	// reachable when the route through it is added.
	Routes []Route
}

// Route is one route of a guest through its eth0.
type Route struct {
	Destination netip.Prefix // 0.0.0.0/0 is the default route
	Gateway     netip.Addr   // the zero Addr means on-link
}

// JoinTap moves the tap from its pool namespace into the pod's namespace at
// netnsPath, gives it the MTU of the pod's eth0, joins the two with tc and
// returns what the guest must configure. QEMU keeps its descriptor: the device
// is the same one.
//
// A second call for the same namespace (with another tap: the first VM is
// gone) replaces the join.
func JoinTap(netnsPath string, tap Tap) (Guest, error) {
	g, err := joinTap(netnsPath, tap)
	if err != nil {
		return Guest{}, fmt.Errorf("joining tap %s to %s: %w", tap.Name, netnsPath, err)
	}
	return g, nil
}

func joinTap(netnsPath string, tap Tap) (Guest, error) {
	pod, err := openPod(netnsPath)
	if err != nil {
		return Guest{}, err
	}
	defer pod.close()
	g, eth0, err := pod.guest()
	if err != nil {
		return Guest{}, err
	}
	if err := moveTap(tap, pod.ns, g.MTU); err != nil {
		return Guest{}, err
	}
	moved, err := pod.LinkByName(PodTap)
	if err != nil {
		return Guest{}, fmt.Errorf("finding moved tap: %w", err)
	}
	if err := pod.redirect(eth0, moved.Attrs().Index); err != nil {
		return Guest{}, err
	}
	if err := pod.redirect(moved.Attrs().Index, eth0); err != nil {
		return Guest{}, err
	}
	return g, nil
}

// podNS is an open namespace of a pod and a socket in it.
type podNS struct {
	*rtnl.Socket
	ns *netns.NS
}

func openPod(path string) (*podNS, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	s, err := rtnl.OpenAt(ns)
	if err != nil {
		_ = ns.Close()
		return nil, err
	}
	return &podNS{Socket: s, ns: ns}, nil
}

func (p *podNS) close() {
	p.Close()
	_ = p.ns.Close()
}

// guest reads the identity of eth0 and its index.
func (p *podNS) guest() (Guest, int, error) {
	link, err := p.LinkByName(PodInterface)
	if err != nil {
		return Guest{}, 0, fmt.Errorf("finding %s: %w", PodInterface, err)
	}
	g := Guest{MAC: link.Attrs().HardwareAddr, MTU: link.Attrs().MTU}
	addrs, err := p.AddrList(link, unix.AF_UNSPEC)
	if err != nil {
		return Guest{}, 0, fmt.Errorf("listing addresses of %s: %w", PodInterface, err)
	}
	for _, a := range addrs {
		if a.Scope == unix.RT_SCOPE_LINK {
			continue // the guest makes its own link-local address
		}
		if prefix, ok := prefixOf(a.IPNet); ok {
			g.Addresses = append(g.Addresses, prefix)
		}
	}
	routes, err := p.RouteList(link, unix.AF_UNSPEC)
	if err != nil {
		return Guest{}, 0, fmt.Errorf("listing routes of %s: %w", PodInterface, err)
	}
	g.Routes = guestRoutes(routes)
	return g, link.Attrs().Index, nil
}

// guestRoutes picks what the guest's kernel would not make by itself, on-link
// routes first.
func guestRoutes(routes []netlink.Route) []Route {
	var onLink, via []Route
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST || r.Protocol == unix.RTPROT_KERNEL {
			continue
		}
		out := Route{}
		if p, ok := prefixOf(r.Dst); ok {
			out.Destination = p
		} else {
			out.Destination = defaultRoute(r.Family)
		}
		gw, ok := netip.AddrFromSlice(r.Gw)
		if !ok {
			onLink = append(onLink, out)
			continue
		}
		out.Gateway = gw.Unmap()
		via = append(via, out)
	}
	return append(onLink, via...)
}

func defaultRoute(family int) netip.Prefix {
	if family == unix.AF_INET6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), true
}

// moveTap moves the tap into the pod's namespace, renames it, sets its MTU and
// brings it up, in one message: each step apart would wait for the kernel's
// grace periods again.
func moveTap(tap Tap, pod *netns.NS, mtu int) error {
	return netns.Do(tap.PoolNetns, func() error {
		s, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer s.Close()
		index, err := rtnl.Index(tap.Name)
		if err != nil {
			return err
		}
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(index)
		msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
		err = s.Send(
			unix.RTM_SETLINK, 0, msg,
			nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(pod.FD()))),
			nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(PodTap)),
			nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))),
		)
		if err != nil {
			return fmt.Errorf("moving tap: %w", err)
		}
		return nil
	})
}

// redirect sends every frame that arrives on one interface out of the other.
func (p *podNS) redirect(from, to int) error {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from,
		Parent:    netlink.HANDLE_INGRESS,
		Handle:    netlink.MakeHandle(0xffff, 0),
	}}
	err := p.QdiscAdd(qdisc)
	if errors.Is(err, unix.EEXIST) {
		if err := p.QdiscDel(qdisc); err != nil {
			return fmt.Errorf("removing old ingress queue: %w", err)
		}
		err = p.QdiscAdd(qdisc)
	}
	if err != nil {
		return fmt.Errorf("adding ingress queue: %w", err)
	}
	err = p.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from,
			Parent:    netlink.MakeHandle(0xffff, 0),
			Priority:  1,
			Protocol:  unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to)},
	})
	if err != nil {
		return fmt.Errorf("adding redirect: %w", err)
	}
	return nil
}
