//go:build integration

package policy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/cni"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/networktest"
	"atoll.dev/atoll/internal/network/policy"
)

// The test binary is the CNI plugin when it is called like one.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(cni.Main())
	}
	os.Exit(m.Run())
}

// host is a host with pods whose policies are enforced.
type host struct {
	*networktest.Lab
	engine *policy.Engine
	state  *policyv1.State
	pods   map[string]*labPod
}

type labPod struct {
	netns   string
	address netip.Addr
}

func newHost(t testing.TB, pods ...string) *host {
	t.Helper()
	lab := networktest.New(t)
	h := &host{Lab: lab, engine: newEngine(t, lab), pods: map[string]*labPod{}, state: &policyv1.State{
		Pods: map[netip.Addr]*policyv1.Pod{}, Sets: map[string]*policyv1.Set{}, Policies: map[string]*policyv1.Policy{},
	}}
	n, err := network.NewHost(network.HostConfig{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	networktest.Do(t, lab.Host, n.Setup)
	networktest.Do(t, lab.Host, func() error { return h.engine.Prepare(context.Background()) })
	networktest.Do(t, lab.Host, remember)
	for _, name := range pods {
		h.add(t, name)
	}
	return h
}

// remember has the kernel not forget a conversation that nobody answers while a test is slow.
func remember() error {
	for _, name := range []string{"udp_timeout", "sctp_timeout_cookie_wait"} {
		err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_"+name, []byte("600"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel may know no SCTP
			return err
		}
	}
	return nil
}

func newEngine(t testing.TB, lab *networktest.Lab) *policy.Engine {
	t.Helper()
	e, err := policy.New(policy.Config{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// add makes a pod with an interface, of which the engine is not told.
func (h *host) add(t testing.TB, name string) *labPod {
	t.Helper()
	p := &labPod{netns: h.Pod(t, name)}
	p.address = h.Add(t, name, p.netns, cniconf.RuntimeConfig{})
	h.pods[name] = p
	networktest.ServeWho(t, p.netns, 80)
	networktest.ServeWho(t, p.netns, 81)
	return p
}

// know puts a pod into the state, with the policies that select it.
func (h *host) know(name string, policies ...string) {
	p := h.pods[name]
	h.state.Pods[p.address] = &policyv1.Pod{
		Name: "test/" + name, Interface: gateway.HostIf(name, "eth0"), MAC: gateway.MAC(p.address).String(), Address: p.address, Policies: policies,
	}
}

// apply enforces the state and cuts what it does not allow.
func (h *host) apply(t testing.TB) {
	t.Helper()
	s := *h.state
	networktest.Do(t, h.Host, func() error {
		narrowed, err := h.engine.Apply(context.Background(), &s)
		if err == nil && narrowed {
			_, err = h.engine.Cut(context.Background())
		}
		return err
	})
}

// policy puts a policy into the state.
func (h *host) policy(id string, tier policyv1.Tier, in, out []policyv1.Rule) {
	p := &policyv1.Policy{ID: id, Tier: tier}
	if in != nil {
		p.Ingress = &policyv1.Direction{Rules: in}
	}
	if out != nil {
		p.Egress = &policyv1.Direction{Rules: out}
	}
	policies := map[string]*policyv1.Policy{id: p}
	for k, v := range h.state.Policies {
		if k != id {
			policies[k] = v
		}
	}
	h.state.Policies = policies
}

// set makes a set of pods.
func (h *host) set(id string, pods ...string) {
	s := &policyv1.Set{}
	for _, name := range pods {
		s.Addresses = append(s.Addresses, h.pods[name].address)
	}
	sets := map[string]*policyv1.Set{id: s}
	for k, v := range h.state.Sets {
		if k != id {
			sets[k] = v
		}
	}
	h.state.Sets = sets
}

const (
	// soon is how long an answer may take that must not come, patience one that must.
	soon     = 400 * time.Millisecond
	patience = time.Minute
)

// ask connects to a server of ServeWho and waits for its answer.
func ask(from, proto, to string, wait time.Duration) error {
	return netns.Do(from, func() error {
		c, err := net.DialTimeout(proto, to, wait)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(wait))
		if proto == "udp4" {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
		}
		_, err = c.Read(make([]byte, 64))
		return err
	})
}

// can fails the test when a connection is not possible.
func can(t testing.TB, what, from, proto, to string) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if err = ask(from, proto, to, 2*time.Second); err == nil {
			return
		}
	}
	t.Errorf("%s over %s: %v", what, proto, err)
}

// cannot fails the test when a connection is possible.
func cannot(t testing.TB, what, from, proto, to string) {
	t.Helper()
	if err := ask(from, proto, to, soon); err == nil {
		t.Errorf("%s over %s is possible", what, proto)
	}
}

func (p *labPod) at(port int) string { return fmt.Sprintf("%s:%d", p.address, port) }

// conversation is a TCP connection that goes to and fro.
type conversation struct {
	client, server net.Conn
}

func talk(t testing.TB, from string, to *labPod, port int) *conversation {
	t.Helper()
	c := &conversation{}
	var l net.Listener
	networktest.Do(t, to.netns, func() (err error) {
		l, err = net.Listen("tcp4", to.at(port))
		return err
	})
	defer l.Close()
	networktest.Do(t, from, func() (err error) {
		c.client, err = net.DialTimeout("tcp4", to.at(port), patience)
		return err
	})
	var err error
	if c.server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.client.Close(), c.server.Close() })
	return c
}

// goesOn sends a byte each way, beginning with one side.
func goesOn(first, second net.Conn, wait time.Duration) error {
	for _, pair := range [][2]net.Conn{{first, second}, {second, first}} {
		end := time.Now().Add(wait)
		_ = pair[0].SetDeadline(end)
		_ = pair[1].SetDeadline(end)
		if _, err := pair[0].Write([]byte("x")); err != nil {
			return err
		}
		if _, err := io.ReadFull(pair[1], make([]byte, 1)); err != nil {
			return err
		}
	}
	return nil
}

// raw sends one packet as it is, IP header included.
func raw(packet []byte, to netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: to.As4()})
}

// packet is an IPv4 packet.
func packet(protocol byte, from, to netip.Addr, payload []byte) []byte {
	a, b := from.As4(), to.As4()
	size := 20 + len(payload)
	head := []byte{0x45, 0, byte(size >> 8), byte(size), 0, 1, 0, 0, 64, protocol, 0, 0}
	head = append(append(head, a[:]...), b[:]...)
	sum := ^networktest.Checksum(head)
	head[10], head[11] = byte(sum>>8), byte(sum)
	return append(head, payload...)
}

// arrives tells whether a packet of a protocol from an address comes to a pod when send is called.
func arrives(t testing.TB, to *labPod, protocol int, from netip.Addr, wait time.Duration, send func() error) bool {
	t.Helper()
	var fd int
	networktest.Do(t, to.netns, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		return err
	})
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	for end := time.Now().Add(wait); time.Now().Before(end); {
		if err := send(); err != nil {
			t.Fatal(err)
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if n >= 20 && netip.AddrFrom4([4]byte(buf[12:16])) == from {
			return true
		}
	}
	return false
}
