package nat

import (
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/network/lease"
)

// A UDP client that keeps sending keeps its connection tracking entry, and the
// entry keeps the answer to where its datagrams go: from before the hostPort
// was there, or to a pod that is gone. These entries are forgotten when UDP
// hostPorts come and go. It is best effort: a client that stops for the
// kernel's timeout (30 s) gets there anyway.

// comes matches flows to the host on ports that lead to a pod from now on.
type comes struct {
	ports map[uint16]bool
	local map[netip.Addr]bool
}

// MatchConntrackFlow is called for each entry of the kernel's table.
func (c comes) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	dst, ok := netip.AddrFromSlice(f.Forward.DstIP)
	return ok && f.Forward.Protocol == unix.IPPROTO_UDP && c.ports[f.Forward.DstPort] && c.local[dst.Unmap()]
}

// goes matches flows to the host that lead to one pod.
type goes struct {
	ports map[uint16]bool
	pod   netip.Addr
}

// MatchConntrackFlow is called for each entry of the kernel's table.
func (g goes) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	src, ok := netip.AddrFromSlice(f.Reverse.SrcIP)
	return ok && f.Forward.Protocol == unix.IPPROTO_UDP && g.ports[f.Forward.DstPort] && src.Unmap() == g.pod &&
		!f.Forward.DstIP.Equal(f.Reverse.SrcIP)
}

func udpPorts(ports []lease.HostPort) map[uint16]bool {
	out := map[uint16]bool{}
	for _, p := range ports {
		if p.Protocol == "udp" {
			out[p.Port] = true
		}
	}
	return out
}

// forgetBefore drops flows from before the pod's hostPorts were there.
func forgetBefore(p Pod) {
	ports := udpPorts(p.Ports)
	if len(ports) == 0 {
		return
	}
	local := map[netip.Addr]bool{}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				local[ip.Unmap()] = true
			}
		}
	}
	_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, comes{ports, local})
}

// forgetAfter drops flows to a pod whose hostPorts are gone.
func forgetAfter(p Pod) {
	if ports := udpPorts(p.Ports); len(ports) > 0 {
		_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, goes{ports, p.Address})
	}
}
