package policies

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/policy"
)

// lab is a host in a network namespace of its own, with the two pods between which traffic is measured; the
// others exist for the policies only.
type lab struct {
	dir, host string
	network   cniconf.Network
	engine    *policy.Engine
	state     *policyv1.State
	from, to  *labEnd
}

// labEnd is a pod with a wire.
type labEnd struct {
	netns   string
	address netip.Addr
}

const (
	labPods     = 300
	labPolicies = 1000
	// labGroups is how many different labels pods have.
	labGroups = 100
)

func newLab() (l *lab, err error) {
	dir, err := os.MkdirTemp("", "atoll-bench-")
	if err != nil {
		return nil, err
	}
	l = &lab{dir: dir, host: filepath.Join(dir, "host"), network: cniconf.Network{
		Subnet: netip.MustParsePrefix("10.244.0.0/22"), Gateway: netip.MustParseAddr("10.244.0.1"),
		ClusterCIDR: netip.MustParsePrefix("10.244.0.0/16"), StateDir: filepath.Join(dir, "state"),
	}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.network, err = l.network.Complete(); err != nil {
		return nil, err
	}
	if l.engine, err = policy.New(policy.Config{Network: l.network, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}); err != nil {
		return nil, err
	}
	if err := netns.Create(l.host); err != nil {
		return nil, err
	}
	err = l.do(func() error {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			return err
		}
		s, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer s.Close()
		_, _, err = gateway.Ensure(s, l.network)
		return err
	})
	if err != nil {
		return nil, err
	}
	l.state = labState()
	if l.from, err = l.wire(labAddress(7)); err != nil {
		return nil, err
	}
	l.to, err = l.wire(labAddress(1))
	return l, err
}

func (l *lab) do(fn func() error) error { return netns.Do(l.host, fn) }

func (l *lab) close() error {
	var errs []error
	for _, p := range []*labEnd{l.from, l.to} {
		if p != nil {
			errs = append(errs, netns.Remove(p.netns))
		}
	}
	if _, err := os.Stat(l.host); err == nil {
		errs = append(errs, netns.Remove(l.host))
	}
	return errors.Join(append(errs, os.RemoveAll(l.dir))...)
}

func labAddress(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 244, byte((i + 2) / 256), byte((i + 2) % 256)})
}

// labState is labPods pods with the labels of three groups each and labPolicies policies, each of which selects a group
// and allows a port to another.
func labState() *policyv1.State {
	s := &policyv1.State{Pods: map[netip.Addr]*policyv1.Pod{}, Sets: map[string]*policyv1.Set{}, Policies: map[string]*policyv1.Policy{}}
	for g := range labGroups {
		set := &policyv1.Set{}
		for i := range labPods {
			if i%labGroups == g || i%(labGroups-1) == g || i%(labGroups-3) == g {
				set.Addresses = append(set.Addresses, labAddress(i))
			}
		}
		s.Sets[labGroup(g)] = set
	}
	selected := map[netip.Addr][]string{}
	for i := range labPolicies {
		p := labPolicy(i, uint16(1000+i))
		s.Policies[p.ID] = p
		for _, a := range s.Sets[labGroup(i%labGroups)].Addresses {
			selected[a] = append(selected[a], p.ID)
		}
	}
	for i := range labPods {
		a := labAddress(i)
		s.Pods[a] = &policyv1.Pod{Name: fmt.Sprintf("ns%d/p%d", i%10, i), Interface: fmt.Sprintf("atlbench%d", i), MAC: gateway.MAC(a).String(), Address: a, Policies: selected[a]}
	}
	return s
}

func labGroup(g int) string { return fmt.Sprintf("group-%d", g) }

func labPolicy(i int, port uint16) *policyv1.Policy {
	rules := []policyv1.Rule{{
		Peers: []string{labGroup((i * 7) % labGroups)},
		Ports: []policyv1.PortRange{{Protocol: policyv1.TCP, First: port, Last: port}},
	}, {
		Blocks: []policyv1.Block{{CIDR: netip.MustParsePrefix("192.0.2.0/24")}}, AnyPort: true,
	}}
	p := &policyv1.Policy{ID: fmt.Sprintf("ns/p%04d", i), Tier: policyv1.TierOwner, Ingress: &policyv1.Direction{Rules: rules}}
	if i%4 == 0 {
		p.Egress = &policyv1.Direction{Rules: []policyv1.Rule{{AnyPeer: true, AnyPort: true}}}
	}
	return p
}

// wire makes the interface of a pod.
func (l *lab) wire(a netip.Addr) (*labEnd, error) {
	end := &labEnd{netns: filepath.Join(l.dir, a.String()), address: a}
	if err := netns.Create(end.netns); err != nil {
		return nil, err
	}
	pod, err := netns.Open(end.netns)
	if err != nil {
		return end, err
	}
	defer pod.Close()
	name := l.state.Pods[a].Interface
	err = l.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = name, gateway.MAC(l.network.Gateway)
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: gateway.MAC(a), PeerNamespace: netlink.NsFd(pod.FD())})
		if err != nil {
			return err
		}
		index, err := rtnl.Index(name)
		if err != nil {
			return err
		}
		s, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer s.Close()
		return gateway.Attach(s, l.network, index, a, gateway.MAC(a))
	})
	if err != nil {
		return end, err
	}
	return end, pod.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		host := func(a netip.Addr) *net.IPNet { return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)} }
		index := link.Attrs().Index
		return errors.Join(
			netlink.AddrAdd(link, &netlink.Addr{IPNet: host(a)}), netlink.LinkSetUp(link),
			netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: host(l.network.Gateway), Scope: netlink.SCOPE_LINK}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: l.network.Gateway.AsSlice()}),
		)
	})
}

// apply enforces a state, as the agent does.
func (l *lab) apply(ctx context.Context, s *policyv1.State) error {
	l.state = s
	return l.do(func() error {
		_, err := l.engine.Apply(ctx, s)
		return err
	})
}

// throughput is what one TCP connection between the two pods carries, in Gbit/s.
func (l *lab) throughput(port int, during time.Duration) (float64, error) {
	var server net.Listener
	err := netns.Do(l.to.netns, func() (err error) {
		server, err = net.Listen("tcp4", fmt.Sprintf("%s:%d", l.to.address, port))
		return err
	})
	if err != nil {
		return 0, err
	}
	defer server.Close()
	var client net.Conn
	err = netns.Do(l.from.netns, func() (err error) {
		client, err = net.DialTimeout("tcp4", server.Addr().String(), 10*time.Second)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer client.Close()
	conn, err := server.Accept()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	began := time.Now()
	ended := make(chan error, 1)
	go func() {
		block := make([]byte, 256<<10)
		for time.Since(began) < during {
			if _, err := client.Write(block); err != nil {
				ended <- err
				return
			}
		}
		ended <- client.Close()
	}()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 256<<10))
	took := time.Since(began)
	return float64(n) * 8 / took.Seconds() / 1e9, errors.Join(err, <-ended)
}
