//go:build integration

package policy_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/denied"
	"atoll.dev/atoll/internal/network/networktest"
	"atoll.dev/atoll/internal/network/policy"
)

const (
	administrator = policyv1.TierAdministrator
	owner         = policyv1.TierOwner
)

func anything() []policyv1.Rule { return []policyv1.Rule{{AnyPeer: true, AnyPort: true}} }

func nothing() []policyv1.Rule { return []policyv1.Rule{} }

func from(ids ...string) []policyv1.Rule { return []policyv1.Rule{{Peers: ids, AnyPort: true}} }

func TestNoTrafficBeforeRules(t *testing.T) {
	h := newHost(t, "a", "b")
	a, b := h.pods["a"], h.pods["b"]
	networktest.ServeWho(t, h.Host, 90)
	networktest.ServeWho(t, h.World, 91)
	h.know("b")
	h.apply(t)
	closed := func() {
		t.Helper()
		cannot(t, "to a pod without rules", b.netns, "tcp4", a.at(80))
		cannot(t, "from a pod without rules to another", a.netns, "tcp4", b.at(80))
		cannot(t, "from a pod without rules to the host", a.netns, "udp4", h.Network.Gateway.String()+":90")
		cannot(t, "from a pod without rules to the world", a.netns, "tcp4", networktest.WorldAddress+":91")
	}
	closed()
	can(t, "the kubelet's probe", h.Host, "tcp4", b.at(80))
	h.know("a")
	h.apply(t)
	can(t, "to a", b.netns, "tcp4", a.at(80))
	can(t, "from a", a.netns, "tcp4", b.at(80))
	can(t, "to the host", a.netns, "udp4", h.Network.Gateway.String()+":90")
	can(t, "to the world", a.netns, "tcp4", networktest.WorldAddress+":91")
	delete(h.state.Pods, a.address)
	h.apply(t)
	closed()
}

func TestRules(t *testing.T) {
	h := newHost(t, "db", "client", "other")
	db, client, other := h.pods["db"], h.pods["client"], h.pods["other"]
	networktest.ServeWho(t, h.Host, 90)
	networktest.ServeWho(t, h.Host, 91)
	networktest.ServeWho(t, h.World, 92)
	h.know("client")
	h.know("other")
	h.set("clients", "client")
	gw := h.Network.Gateway

	both := func(what, src string, to string, ok ...string) {
		t.Helper()
		for _, proto := range []string{"tcp4", "udp4"} {
			if strings.Contains(strings.Join(ok, " "), proto) {
				can(t, what, src, proto, to)
			} else {
				cannot(t, what, src, proto, to)
			}
		}
	}
	t.Run("deny ingress", func(t *testing.T) {
		h.policy("test/p", owner, nothing(), nil)
		h.know("db", "test/p")
		h.apply(t)
		both("client", client.netns, db.at(80))
		both("the host", h.Host, db.at(80), "tcp4", "udp4")
		both("answers", db.netns, client.at(80), "tcp4", "udp4")
		both("outwards", db.netns, networktest.WorldAddress+":92", "tcp4", "udp4")
	})
	t.Run("peers", func(t *testing.T) {
		h.policy("test/p", owner, from("clients"), nil)
		h.apply(t)
		both("client", client.netns, db.at(80), "tcp4", "udp4")
		both("other", other.netns, db.at(80))
		h.set("clients", "client", "other")
		h.apply(t)
		both("other, added", other.netns, db.at(80), "tcp4", "udp4")
		h.set("clients", "client")
		h.apply(t)
		both("other, removed", other.netns, db.at(80))
	})
	t.Run("ports", func(t *testing.T) {
		h.policy("test/p", owner, []policyv1.Rule{{AnyPeer: true, Ports: []policyv1.PortRange{{Protocol: policyv1.TCP, First: 70, Last: 80}, {Protocol: policyv1.UDP, First: 81, Last: 81}}}}, nil)
		h.apply(t)
		both("80", client.netns, db.at(80), "tcp4")
		both("81", client.netns, db.at(81), "udp4")
	})
	t.Run("named ports", func(t *testing.T) {
		h.policy("test/p", owner, []policyv1.Rule{{AnyPeer: true, Named: []string{"web"}}}, nil)
		h.state.Sets = map[string]*policyv1.Set{"clients": h.state.Sets["clients"], "web": {Endpoints: []policyv1.Endpoint{{Address: db.address, Protocol: policyv1.TCP, Port: 81}}}}
		h.apply(t)
		both("80", client.netns, db.at(80))
		both("81", client.netns, db.at(81), "tcp4")
	})
	t.Run("blocks", func(t *testing.T) {
		h.policy("test/p", owner, []policyv1.Rule{{AnyPort: true, Blocks: []policyv1.Block{{
			CIDR: netip.MustParsePrefix("10.244.0.0/16"), Except: []netip.Prefix{netip.PrefixFrom(other.address, 32)},
		}}}}, nil)
		h.apply(t)
		both("client", client.netns, db.at(80), "tcp4", "udp4")
		both("other, excepted", other.netns, db.at(80))
	})
	t.Run("egress", func(t *testing.T) {
		h.policy("test/p", owner, nil, nothing())
		h.apply(t)
		both("world", db.netns, networktest.WorldAddress+":92")
		both("pod", db.netns, client.at(80))
		both("host", db.netns, gw.String()+":90")
		both("comes in", client.netns, db.at(80), "tcp4", "udp4")
		h.policy("test/p", owner, nil, []policyv1.Rule{
			{Peers: []string{"clients"}, AnyPort: true},
			{Blocks: []policyv1.Block{{CIDR: netip.PrefixFrom(gw, 32)}}, Ports: []policyv1.PortRange{{Protocol: policyv1.UDP, First: 90, Last: 90}}},
			{Blocks: []policyv1.Block{{CIDR: netip.MustParsePrefix("192.0.2.2/31")}}, Ports: []policyv1.PortRange{{Protocol: policyv1.TCP, Last: 65535}}},
		})
		h.apply(t)
		both("peer", db.netns, client.at(80), "tcp4", "udp4")
		both("no peer", db.netns, other.at(80))
		both("DNS", db.netns, gw.String()+":90", "udp4")
		both("another port of the host", db.netns, gw.String()+":91")
		both("world", db.netns, networktest.WorldAddress+":92", "tcp4")
	})
	t.Run("two policies add up", func(t *testing.T) {
		h.policy("test/p", owner, nothing(), nil)
		h.policy("test/q", owner, from("clients"), nil)
		h.know("db", "test/p", "test/q")
		h.apply(t)
		both("client", client.netns, db.at(80), "tcp4", "udp4")
		both("other", other.netns, db.at(80))
	})
	t.Run("two tiers must agree", func(t *testing.T) {
		h.policy("test/p", administrator, from("clients"), nil)
		h.policy("test/q", owner, anything(), nil)
		h.apply(t)
		both("client", client.netns, db.at(80), "tcp4", "udp4")
		both("other, which only the owner allows", other.netns, db.at(80))
		h.policy("test/p", administrator, anything(), nil)
		h.policy("test/q", owner, from("clients"), nil)
		h.apply(t)
		both("client", client.netns, db.at(80), "tcp4", "udp4")
		both("other, which only the administrator allows", other.netns, db.at(80))
	})
}

// TestServices translates destinations as kube-proxy does.
func TestServices(t *testing.T) {
	h := newHost(t, "db", "client", "other")
	db, client, other := h.pods["db"], h.pods["client"], h.pods["other"]
	rules := fmt.Sprintf(`table ip kube-proxy {
	chain in { type nat hook prerouting priority -100; ip daddr 10.96.0.1 tcp dport 5432 dnat to %[1]s:80; fib daddr type local tcp dport 30000 dnat to %[1]s:80; }
	chain out { type nat hook output priority -100; ip daddr 10.96.0.1 tcp dport 5432 dnat to %[1]s:80; }
	chain post { type nat hook postrouting priority 100; ip saddr %[1]s ip daddr %[1]s masquerade; }
}`, db.address)
	networktest.Do(t, h.Host, func() error { return networktest.Run("nft", rules) })
	networktest.Do(t, h.Host, func() error {
		return networktest.Run("ip", "route", "add", "default", "via", networktest.WorldAddress)
	})
	networktest.Do(t, h.World, func() error {
		return networktest.Run("ip", "route", "add", "10.244.0.0/16", "via", networktest.HostAddress)
	})
	h.set("clients", "client")
	h.policy("test/p", owner, []policyv1.Rule{{Peers: []string{"clients"}, Ports: []policyv1.PortRange{{Protocol: policyv1.TCP, First: 80, Last: 80}}}}, nil)
	h.policy("test/q", owner, nil, []policyv1.Rule{{Blocks: []policyv1.Block{{CIDR: netip.PrefixFrom(db.address, 32)}}, Ports: []policyv1.PortRange{{Protocol: policyv1.TCP, First: 80, Last: 80}}}})
	h.know("db", "test/p", "test/q")
	h.know("client", "test/q")
	h.know("other")
	h.apply(t)
	const service = "10.96.0.1:5432"
	node := networktest.HostAddress + ":30000"
	can(t, "client to the service", client.netns, "tcp4", service)
	can(t, "client to the node port", client.netns, "tcp4", node)
	cannot(t, "other to the service", other.netns, "tcp4", service)
	cannot(t, "other to the node port", other.netns, "tcp4", node)
	can(t, "the host to the service", h.Host, "tcp4", service)
	can(t, "the pod to itself through the service", db.netns, "tcp4", service)
	cannot(t, "the world to the node port", h.World, "tcp4", node)
	h.policy("test/p", owner, []policyv1.Rule{{AnyPort: true, Blocks: []policyv1.Block{{CIDR: netip.MustParsePrefix("192.0.2.0/24")}}}}, nil)
	h.apply(t)
	can(t, "the world, by its address, to the node port", h.World, "tcp4", node)
	can(t, "the world, by its address, to the pod", h.World, "tcp4", db.at(80))
	cannot(t, "client to the service", client.netns, "tcp4", service)
}

func TestSCTP(t *testing.T) {
	h := newHost(t, "db", "client")
	db, client := h.pods["db"], h.pods["client"]
	// The host's kernel need not have SCTP itself to forward it: an INIT with no checksum.
	send := func(port uint16) func() error {
		init := binary.BigEndian.AppendUint16([]byte{0x30, 0x39}, port)
		init = append(init, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 1, 0, 1, 0, 0, 0, 1)
		return func() error {
			return netns.Do(client.netns, func() error {
				return raw(packet(unix.IPPROTO_SCTP, client.address, db.address, init), db.address)
			})
		}
	}
	h.know("client")
	h.policy("test/p", owner, []policyv1.Rule{{AnyPeer: true, Ports: []policyv1.PortRange{{Protocol: policyv1.SCTP, First: 7, Last: 9}}}}, nil)
	h.know("db", "test/p")
	h.apply(t)
	if !arrives(t, db, unix.IPPROTO_SCTP, client.address, patience, send(8)) {
		t.Error("SCTP to an allowed port does not arrive")
	}
	if arrives(t, db, unix.IPPROTO_SCTP, client.address, soon, send(10)) {
		t.Error("SCTP to another port arrives")
	}
}

func TestPodsCannotForge(t *testing.T) {
	h := newHost(t, "a", "b", "c")
	a, b, c := h.pods["a"], h.pods["b"], h.pods["c"]
	for name := range h.pods {
		h.know(name)
	}
	h.apply(t)
	icmp := []byte{8, 0, 0, 0, 0x41, 0x54, 0, 1}
	sum := ^networktest.Checksum(icmp)
	icmp[2], icmp[3] = byte(sum>>8), byte(sum)
	send := func(src netip.Addr) func() error {
		return func() error {
			return netns.Do(a.netns, func() error { return raw(packet(unix.IPPROTO_ICMP, src, b.address, icmp), b.address) })
		}
	}
	if !arrives(t, b, unix.IPPROTO_ICMP, a.address, patience, send(a.address)) {
		t.Fatal("a packet with the pod's own address does not arrive")
	}
	for _, src := range []netip.Addr{c.address, h.Network.Gateway, netip.MustParseAddr("10.244.3.77"), netip.MustParseAddr(networktest.WorldAddress)} {
		if arrives(t, b, unix.IPPROTO_ICMP, src, soon, send(src)) {
			t.Errorf("a packet from %s arrives", src)
		}
	}

	t.Run("another MAC", func(t *testing.T) {
		setMAC := func(mac string) {
			networktest.Do(t, a.netns, func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				hw, err := net.ParseMAC(mac)
				if err != nil {
					return err
				}
				return netlink.LinkSetHardwareAddr(link, hw)
			})
		}
		own := h.state.Pods[a.address].MAC
		setMAC("0a:58:0a:f4:09:09")
		if arrives(t, b, unix.IPPROTO_ICMP, a.address, soon, send(a.address)) {
			t.Error("a packet with another MAC arrives")
		}
		setMAC(own)
		if !arrives(t, b, unix.IPPROTO_ICMP, a.address, patience, send(a.address)) {
			t.Error("a packet with the pod's own MAC does not arrive")
		}
	})
	t.Run("link-local", func(t *testing.T) {
		const metadata = "169.254.169.254"
		networktest.Do(t, h.Host, func() error { return networktest.Run("ip", "addr", "add", metadata+"/32", "dev", "lo") })
		networktest.ServeWho(t, h.Host, 53)
		networktest.ServeWho(t, h.Host, 80)
		can(t, "the host's own way", h.Host, "tcp4", metadata+":80")
		can(t, "a cloud's DNS", a.netns, "tcp4", metadata+":53")
		if err := ask(a.netns, "tcp4", metadata+":80", time.Second); err == nil || !strings.Contains(err.Error(), "timeout") {
			t.Errorf("a cloud's metadata can be reached: %v", err)
		}
	})
	t.Run("IPv6", func(t *testing.T) {
		if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
			t.Log("this kernel has no IPv6: nothing to get past")
			return
		}
		networktest.Do(t, h.Host, func() error {
			l, err := net.Listen("tcp6", "[::]:99")
			if err == nil {
				t.Cleanup(func() { _ = l.Close() })
			}
			return err
		})
		var to netip.Addr
		networktest.Do(t, h.Host, func() error {
			links, err := allLinks()
			for _, l := range links {
				if l.Attrs().Name != h.state.Pods[a.address].Interface {
					continue
				}
				addrs, err := netlink.AddrList(l, unix.AF_INET6)
				if err != nil || len(addrs) == 0 {
					return err
				}
				to, _ = netip.AddrFromSlice(addrs[0].IP)
			}
			return err
		})
		if !to.IsValid() {
			t.Log("the host's end has no IPv6 address")
			return
		}
		if err := ask(a.netns, "tcp6", "["+to.String()+"%eth0]:99", time.Second); err == nil || !strings.Contains(err.Error(), "timeout") {
			t.Errorf("the host's link-local address can be reached: %v", err)
		}
	})
}

// allLinks lists the interfaces in the namespace of the calling thread, again if they change meanwhile.
func allLinks() (links []netlink.Link, err error) {
	for range 10 {
		if links, err = netlink.LinkList(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return links, err
}

func TestEstablishedConnectionsAreCut(t *testing.T) {
	h := newHost(t, "db", "client", "other")
	db, client, other := h.pods["db"], h.pods["client"], h.pods["other"]
	h.set("clients", "client", "other")
	h.policy("test/p", owner, from("clients"), nil)
	h.know("db", "test/p")
	h.know("client")
	h.know("other")
	h.apply(t)
	stays, goes := talk(t, client.netns, db, 1000), talk(t, other.netns, db, 1001)
	probe := talk(t, h.Host, db, 1002)
	for _, c := range []*conversation{stays, goes, probe} {
		if err := goesOn(c.client, c.server, patience); err != nil {
			t.Fatal(err)
		}
	}
	h.set("clients", "client")
	h.apply(t)
	if err := goesOn(stays.client, stays.server, patience); err != nil {
		t.Errorf("a connection that is allowed was cut: %v", err)
	}
	if err := goesOn(probe.client, probe.server, patience); err != nil {
		t.Errorf("a connection of the host was cut: %v", err)
	}
	if err := goesOn(goes.server, goes.client, 2*soon); err == nil {
		t.Error("the server goes on with a connection that is not allowed any more")
	}
	if err := goesOn(goes.client, goes.server, 2*soon); err == nil {
		t.Error("the client goes on with a connection that is not allowed any more")
	}
	can(t, "a new connection the other way", db.netns, "tcp4", other.at(80))
}

// TestRestart replaces the engine while connections come and go: nothing that is denied gets through at any time, and
// nothing that is allowed is refused.
func TestRestart(t *testing.T) {
	h := newHost(t, "db", "client", "other")
	db, client, other := h.pods["db"], h.pods["client"], h.pods["other"]
	h.set("clients", "client")
	h.policy("test/p", owner, from("clients"), nil)
	h.know("db", "test/p")
	h.know("client")
	h.know("other")
	h.apply(t)
	old := talk(t, client.netns, db, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var refused, leaked, asked int
	wg.Go(func() {
		for ctx.Err() == nil {
			asked++
			if ask(client.netns, "tcp4", db.at(80), patience) != nil {
				refused++
			}
		}
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			if ask(other.netns, "udp4", db.at(80), 10*time.Millisecond) == nil {
				leaked++
			}
		}
	})
	for range 10 {
		h.engine = newEngine(t, h.Lab)
		networktest.Do(t, h.Host, func() error { return h.engine.Prepare(ctx) })
		h.apply(t)
	}
	cancel()
	wg.Wait()
	if refused > 0 || leaked > 0 || asked == 0 {
		t.Errorf("%d of %d connections refused, %d leaked", refused, asked, leaked)
	}
	if err := goesOn(old.client, old.server, patience); err != nil {
		t.Errorf("a connection did not survive: %v", err)
	}

	networktest.Do(t, h.Host, func() error { return networktest.Run("nft", "flush", "ruleset") })
	networktest.Do(t, h.Host, func() error {
		if !h.engine.Damaged() {
			t.Error("the table is gone and nobody has noticed")
		}
		return nil
	})
	h.apply(t)
	cannot(t, "other", other.netns, "tcp4", db.at(80))
	can(t, "client", client.netns, "tcp4", db.at(80))
}

func TestDeniedIsLoggedAndCounted(t *testing.T) {
	h := newHost(t, "db", "client")
	db, client := h.pods["db"], h.pods["client"]
	h.policy("test/p", owner, nothing(), nil)
	h.policy("test/q", administrator, nil, []policyv1.Rule{{Peers: []string{"db"}, AnyPort: true}})
	h.set("db", "db")
	h.know("db", "test/p")
	h.know("client", "test/q")
	h.apply(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	log := denied.New(denied.Config{Dir: h.Dir + "/denied", Name: func(a netip.Addr) string {
		return map[netip.Addr]string{client.address: "test/client"}[a]
	}})
	go func() { ended <- netns.Do(h.Host, func() error { return log.Run(ctx) }) }()
	want := []string{
		"denied=ingress tier=owner from=test/client(" + client.address.String() + ") to=" + db.address.String() + " port=80/TCP",
		"denied=egress tier=administrator from=test/client(" + client.address.String() + ") to=" + h.Network.Gateway.String() + " port=90/UDP",
	}
	var text []byte
	for end := time.Now().Add(patience); ; {
		cannot(t, "client", client.netns, "tcp4", db.at(80))
		cannot(t, "client to the host", client.netns, "udp4", h.Network.Gateway.String()+":90")
		text, _ = os.ReadFile(denied.Path(h.Dir+"/denied", "test"))
		if strings.Contains(string(text), want[0]) && strings.Contains(string(text), want[1]) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the log is %q", text)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	networktest.Do(t, h.Host, func() error {
		values, err := policy.Counters(context.Background(), h.Network)
		if err != nil {
			return err
		}
		found := map[string]bool{}
		for name, what := range h.engine.Labels() {
			if values[name] > 0 {
				found[what] = true
			}
		}
		for _, what := range []string{"denied ingress owner test", "denied egress administrator test", "allowed egress test/q"} {
			if !found[what] {
				t.Errorf("%q counts nothing: %v", what, found)
			}
		}
		return nil
	})
}
