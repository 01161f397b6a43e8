package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/network/dhcp"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/shim/machine/seed"
)

// nic is a network interface that the machine has.
type nic struct {
	spec    machinev1.NIC
	missing bool   // it could not be added
	failed  string // what went wrong with it last
}

// openNICs makes the taps of all network interfaces.
func (l *life) openNICs(m *machinev1.Machine, out map[string]*os.File, keep func(*os.File) *os.File) error {
	for _, n := range m.NICs {
		tap, err := l.openNIC(&n)
		if err != nil {
			return fmt.Errorf("network interface %s: %w", n.Name, err)
		}
		out[n.Name] = keep(tap)
		l.mu.Lock()
		l.nics[n.Name] = &nic{spec: n}
		l.mu.Unlock()
	}
	for i := range m.NICs { // the engine has to know the address of the pod's own
		if m.NICs[i].Pod && m.NICs[i].MAC == "" {
			m.NICs[i].MAC = l.podNetwork().MAC
		}
	}
	return nil
}

// openNIC makes the tap of one interface and joins it to its network.
func (l *life) openNIC(n *machinev1.NIC) (*os.File, error) {
	l.mu.Lock()
	l.taps++
	name := fmt.Sprintf("v%.10s%d", l.s.cfg.Member, l.taps)
	l.mu.Unlock()
	if !n.Pod {
		return l.s.cfg.Network.NewBridgeTap(name, n.Bridge, n.VLAN)
	}
	l.s.mu.Lock()
	netns := l.s.netns
	l.s.mu.Unlock()
	if netns == "" {
		return nil, errors.New("the pod has no network of its own (hostNetwork)")
	}
	tap, err := l.s.cfg.Network.NewTap(filepath.Join(l.s.cfg.Host.RunDir, "netns", "pool"), name)
	if err != nil {
		return nil, err
	}
	guest, err := l.s.cfg.Network.JoinTap(netns, tap)
	if err != nil {
		return nil, errors.Join(err, tap.Close())
	}
	if mac, err := net.ParseMAC(n.MAC); err == nil && mac.String() != guest.MAC.String() {
		return nil, errors.Join(fmt.Errorf("the pod's interface has the address %s instead of %s", guest.MAC, mac), tap.Close())
	}
	l.mu.Lock()
	l.guest = guest
	l.mu.Unlock()
	return tap.File, nil
}

// podNetwork is what the guest is to configure on the pod's interface.
func (l *life) podNetwork() seed.Network {
	l.mu.Lock()
	g := l.guest
	l.mu.Unlock()
	out := seed.Network{MAC: g.MAC.String(), MTU: g.MTU, Addresses: g.Addresses}
	for _, r := range g.Routes {
		if r.Destination.Bits() != 0 || !r.Gateway.IsValid() {
			continue
		}
		if r.Gateway.Is4() {
			out.Gateway4 = r.Gateway
		} else {
			out.Gateway6 = r.Gateway
		}
	}
	dns := l.s.pod.GetDnsConfig()
	out.Nameservers, out.Search = dns.GetServers(), dns.GetSearches()
	return out
}

// podNIC is the interface with the pod's address, if the machine has it.
func (l *life) podNIC() (machinev1.NIC, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.nics {
		if n.spec.Pod {
			return n.spec, true
		}
	}
	return machinev1.NIC{}, false
}

// serveNetwork answers DHCP on the pod's interface and leads the pod's loopback addresses to the guest, for
// port-forward.
func (l *life) serveNetwork(wg *sync.WaitGroup) {
	n, ok := l.podNIC()
	pod := l.podNetwork()
	address, has4 := first4(pod.Addresses)
	if !ok || !has4 {
		return
	}
	l.s.mu.Lock()
	netns, m := l.s.netns, l.s.machine
	l.s.mu.Unlock()
	background := func(doing string, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(l.ctx); err != nil && l.ctx.Err() == nil {
				slog.Error(doing, "sandbox", l.s.ID(), "error", err)
			}
		})
	}
	background("forwarding ports", func(ctx context.Context) error {
		return l.s.cfg.Network.ServePortForward(ctx, netns, address.Addr().String())
	})
	cfg := dhcp.Config{
		Address: address, Router: pod.Gateway4, Search: pod.Search, Hostname: m.Hostname, Domain: m.Domain, MTU: pod.MTU,
	}
	if n.MTU != 0 {
		cfg.MTU = n.MTU
	}
	if len(n.Search) > 0 {
		cfg.Search = n.Search
	}
	servers := pod.Nameservers
	if len(n.Nameservers) > 0 {
		servers = n.Nameservers
	}
	for _, s := range servers {
		if a, err := netip.ParseAddr(s); err == nil {
			cfg.DNS = append(cfg.DNS, a)
		}
	}
	mac, err := net.ParseMAC(n.MAC)
	if err != nil || !pod.Gateway4.IsValid() {
		return
	}
	cfg.MAC, cfg.ServerMAC = mac, gateway.MAC(pod.Gateway4)
	background("answering DHCP", func(ctx context.Context) error { return l.s.cfg.Network.ServeDHCP(ctx, netns, cfg) })
}

func first4(all []netip.Prefix) (netip.Prefix, bool) {
	for _, p := range all {
		if p.Addr().Is4() {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
