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
	// PodTap is the interface of the pod's namespace that leads to the tap.
	PodTap = "vm0"
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

// JoinTap joins the tap, which stays in its pool namespace, to the eth0 of the
// pod's namespace at netnsPath, and returns what the guest must configure.
//
// A veth pair leads from one namespace to the other and tc passes every frame
// on at both ends. Moving the tap itself would be one hop less, but for each
// move the kernel waits out a grace period while it holds the lock of all
// network configuration: 10 to 20 ms in which no other pod could start.
//
// A second call for the same namespace (with another tap: the first VM is
// gone) replaces the join. The join goes away with the pod's namespace.
func JoinTap(netnsPath string, tap Tap) (Guest, error) {
	g, err := joinTap(netnsPath, tap)
	if err != nil {
		return Guest{}, fmt.Errorf("joining tap %s to %s: %w", tap.Name, netnsPath, err)
	}
	return g, nil
}

func joinTap(netnsPath string, tap Tap) (Guest, error) {
	pod, err := openAt(netnsPath)
	if err != nil {
		return Guest{}, err
	}
	defer pod.close()
	pool, err := openAt(tap.PoolNetns)
	if err != nil {
		return Guest{}, err
	}
	defer pool.close()
	g, eth0, err := pod.guest()
	if err != nil {
		return Guest{}, err
	}
	dev, err := pool.LinkByName(tap.Name)
	if err != nil {
		return Guest{}, fmt.Errorf("finding tap: %w", err)
	}
	if dev.Attrs().MTU != g.MTU {
		if err := pool.LinkSetMTU(dev, g.MTU); err != nil {
			return Guest{}, fmt.Errorf("setting MTU of tap: %w", err)
		}
	}
	podEnd, poolEnd, err := addWire(pod, pool, dev.Attrs().Index, g.MTU)
	if err != nil {
		return Guest{}, err
	}
	for _, r := range []struct {
		in       *space
		from, to int
	}{
		{pod, eth0, podEnd},
		{pod, podEnd, eth0},
		{pool, poolEnd, dev.Attrs().Index},
		{pool, dev.Attrs().Index, poolEnd},
	} {
		if err := r.in.redirect(r.from, r.to); err != nil {
			return Guest{}, err
		}
	}
	return g, up(pod, podEnd, pool, poolEnd, dev.Attrs().Index)
}

// up brings everything up at last, when the redirects are in place and nothing
// reaches the namespaces' own protocol stacks.
func up(pod *space, podEnd int, pool *space, poolEnd, tap int) error {
	for _, u := range []struct {
		in    *space
		index int
	}{{pod, podEnd}, {pool, poolEnd}, {pool, tap}} {
		if err := u.in.LinkUp(u.index); err != nil {
			return fmt.Errorf("bringing up interface %d: %w", u.index, err)
		}
	}
	// The end that came up first waits for the kernel's link watch; asking for
	// it makes that happen now.
	if _, err := pod.LinkByIndex(podEnd); err != nil {
		return fmt.Errorf("checking %s: %w", PodTap, err)
	}
	return nil
}

// addWire makes the veth pair between the namespaces and returns the indices
// of its ends. What an earlier join left is removed.
func addWire(pod, pool *space, tap, mtu int) (podEnd, poolEnd int, err error) {
	poolName := fmt.Sprintf("w%d", tap)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(poolName))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(pool.ns.FD())))
	add := func() error {
		return pod.Send(
			unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nl.NewIfInfomsg(unix.AF_UNSPEC),
			nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(PodTap)),
			nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))),
			info,
		)
	}
	err = add()
	if errors.Is(err, unix.EEXIST) {
		for _, old := range []struct {
			in   *space
			name string
		}{{pod, PodTap}, {pool, poolName}} {
			if link, err := old.in.LinkByName(old.name); err == nil {
				_ = old.in.LinkDel(link)
			}
		}
		err = add()
	}
	if err != nil {
		return 0, 0, fmt.Errorf("creating %s: %w", PodTap, err)
	}
	a, err := pod.LinkByName(PodTap)
	if err != nil {
		return 0, 0, fmt.Errorf("finding %s: %w", PodTap, err)
	}
	b, err := pool.LinkByName(poolName)
	if err != nil {
		return 0, 0, fmt.Errorf("finding other end of %s: %w", PodTap, err)
	}
	return a.Attrs().Index, b.Attrs().Index, nil
}

// space is an open network namespace and a socket in it.
type space struct {
	*rtnl.Socket
	ns *netns.NS
}

func openAt(path string) (*space, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	s, err := rtnl.OpenAt(ns)
	if err != nil {
		_ = ns.Close()
		return nil, err
	}
	return &space{Socket: s, ns: ns}, nil
}

func (p *space) close() {
	p.Close()
	_ = p.ns.Close()
}

// guest reads the identity of eth0 and its index.
func (p *space) guest() (Guest, int, error) {
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

// redirect sends every frame that arrives on one interface out of the other.
func (p *space) redirect(from, to int) error {
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
