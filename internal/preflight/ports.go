package preflight

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"atoll.dev/atoll/internal/linux/process"
)

// Port is a port that will be listened on.
type Port struct {
	Number  int
	Network string // tcp or udp
	// Address is the one that will be listened on; the unspecified address
	// means all.
	Address netip.Addr
	Use     string
}

// socket is a listening socket as /proc/net lists it.
type socket struct {
	network string
	addr    netip.AddrPort
	inode   string
}

// checkPorts reports busy ports with the processes that hold them.
func (c *Checker) checkPorts() []Result {
	var sockets []socket
	for _, file := range []string{"tcp", "tcp6", "udp", "udp6"} {
		b, err := os.ReadFile(filepath.Join("/proc/thread-self/net", file))
		if err != nil {
			continue // no IPv6
		}
		sockets = append(sockets, parseSockets(strings.TrimSuffix(file, "6"), string(b))...)
	}
	var out []Result
	free := 0
	for _, p := range c.cfg.Ports {
		at := slices.IndexFunc(sockets, p.collides)
		if at < 0 {
			free++
			continue
		}
		holder, ok := socketHolder(sockets[at].inode)
		if ok && c.cfg.Ours(holder) {
			free++
			continue
		}
		r := Result{
			Name: fmt.Sprintf("port %d/%s", p.Number, p.Network), Level: Fail,
			Detail: fmt.Sprintf("needed by %s, but in use at %s", p.Use, sockets[at].addr),
			Fix:    "stop the program that listens there",
		}
		if ok {
			r.Detail += fmt.Sprintf(" by process %d (%s)", holder.PID, strings.Join(holder.Args, " "))
			r.Fix = howToStop(holder)
		}
		out = append(out, r)
	}
	if free > 0 {
		out = append(out, Result{Name: "ports", Level: OK, Detail: fmt.Sprintf("%d of %d needed ports are free or ours", free, len(c.cfg.Ports))})
	}
	return out
}

// collides tells whether the port cannot be bound because of s.
func (p Port) collides(s socket) bool {
	if s.network != p.Network || int(s.addr.Port()) != p.Number {
		return false
	}
	theirs := s.addr.Addr()
	return theirs.IsUnspecified() || p.Address.IsUnspecified() || theirs == p.Address
}

// parseSockets reads the text of /proc/net/{tcp,udp}{,6}: listening TCP
// sockets and unconnected UDP sockets.
func parseSockets(network, text string) []socket {
	const tcpListen, udpUnconnected = "0A", "07"
	var out []socket
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 10 || (network == "tcp" && f[3] != tcpListen) || (network == "udp" && f[3] != udpUnconnected) {
			continue
		}
		if addr, ok := parseHexAddr(f[1]); ok {
			out = append(out, socket{network: network, addr: addr, inode: f[9]})
		}
	}
	return out
}

// parseHexAddr reads "0100007F:1F90": 32-bit words in host order, then the
// port. IPv4 addresses mapped into IPv6 come out as IPv4.
func parseHexAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	if !ok {
		return netip.AddrPort{}, false
	}
	b, err := hex.DecodeString(host)
	if err != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	addr, ok := netip.AddrFromSlice(b)
	n, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), true
}

// socketHolder finds the process that has a socket open.
func socketHolder(inode string) (process.Info, bool) {
	want := "socket:[" + inode + "]"
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return process.Info{}, false
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err != nil || to != want {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil {
			continue
		}
		if info, err := process.Read(pid); err == nil {
			return info, true
		}
	}
	return process.Info{}, false
}

// howToStop is what frees a port. Another Atoll would start a service again that is merely ended.
func howToStop(holder process.Info) string {
	for _, arg := range holder.Args {
		if dir, ok := strings.CutPrefix(arg, "--data-dir="); ok && filepath.Base(holder.Args[0]) == "atoll" {
			return "another Atoll runs on this host; stop it with: atoll down --data-dir " + dir
		}
	}
	return fmt.Sprintf("stop process %d", holder.PID)
}

// Network is an address range the cluster will use.
type Network struct {
	Prefix netip.Prefix
	Use    string
}

// checkNetworks reports routes of the host that overlap the cluster's ranges.
func (c *Checker) checkNetworks() []Result {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return []Result{{Name: "address ranges", Level: Warn, Detail: fmt.Sprintf("cannot list the host's routes: %v", err)}}
	}
	var out []Result
	for _, n := range c.cfg.Networks {
		for _, route := range routes {
			dst, ok := prefix(route.Dst)
			if !ok || dst.Bits() == 0 || !dst.Overlaps(n.Prefix) {
				continue
			}
			name := "?"
			if link, err := net.InterfaceByIndex(route.LinkIndex); err == nil {
				name = link.Name
			}
			if c.cfg.OurInterface(name) {
				continue
			}
			out = append(out, Result{
				Name: "address ranges", Level: Fail,
				Detail: fmt.Sprintf("%s (%s) overlaps the host's route to %s over %s", n.Prefix, n.Use, dst, name),
				Fix:    "remove the route, or run Atoll on a host that is not in that network",
			})
		}
	}
	if len(out) == 0 {
		out = append(out, Result{Name: "address ranges", Level: OK, Detail: "no route of the host overlaps the cluster's ranges"})
	}
	return out
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones), ok
}
