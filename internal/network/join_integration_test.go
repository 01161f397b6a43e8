//go:build integration

package network_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/cni"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/networktest"
)

// The test binary is the CNI plugin when it is called like one.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(cni.Main())
	}
	os.Exit(m.Run())
}

func newLab(t testing.TB) *networktest.Lab {
	t.Helper()
	lab := networktest.New(t)
	h, err := network.NewHost(network.HostConfig{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	networktest.Do(t, lab.Host, h.Setup)
	return lab
}

// guest plays a guest's kernel on a tap: it answers ICMP echo requests to its
// address and counts the frames it got.
type guest struct {
	tap    *os.File
	mac    []byte
	addr   netip.Addr
	frames atomic.Int64
	// replies receives the ICMP echo replies and ARP replies to the guest.
	replies chan []byte
}

const vnetHeader = 10 // struct virtio_net_hdr

func newGuest(t *testing.T, tap network.Tap, g network.Guest) *guest {
	t.Helper()
	out := &guest{tap: tap.File, mac: g.MAC, addr: g.Addresses[0].Addr(), replies: make(chan []byte, 16)}
	if err := unix.SetNonblock(int(tap.File.Fd()), true); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(tap.File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	out.tap = os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { _ = out.tap.Close() })
	go out.run()
	return out
}

func (g *guest) run() {
	buf := make([]byte, 65536)
	for {
		n, err := g.tap.Read(buf)
		if err != nil {
			return
		}
		f := buf[vnetHeader:n]
		g.frames.Add(1)
		if len(f) < 42 || !bytes.Equal(f[:6], g.mac) {
			continue
		}
		switch binary.BigEndian.Uint16(f[12:]) {
		case unix.ETH_P_ARP:
			g.replies <- bytes.Clone(f)
		case unix.ETH_P_IP:
			if f[23] != unix.IPPROTO_ICMP || netip.AddrFrom4([4]byte(f[30:34])) != g.addr {
				continue
			}
			if f[34] == 0 {
				g.replies <- bytes.Clone(f)
				continue
			}
			reply := bytes.Clone(buf[:n])
			r := reply[vnetHeader:]
			copy(r[0:6], f[6:12])
			copy(r[6:12], f[0:6])
			copy(r[26:30], f[30:34])
			copy(r[30:34], f[26:30])
			r[34] = 0
			seal(r)
			_, _ = g.tap.Write(reply)
		}
	}
}

// seal computes the ICMP checksum of a frame.
func seal(f []byte) {
	f[36], f[37] = 0, 0
	binary.BigEndian.PutUint16(f[36:], ^networktest.Checksum(f[34:]))
}

// ping sends an echo request to an address through the gateway.
func (g *guest) ping(gatewayMAC []byte, to netip.Addr) error {
	f := make([]byte, vnetHeader+42)
	e := f[vnetHeader:]
	copy(e[0:], gatewayMAC)
	copy(e[6:], g.mac)
	binary.BigEndian.PutUint16(e[12:], unix.ETH_P_IP)
	e[14], e[17], e[22], e[23] = 0x45, 28, 64, unix.IPPROTO_ICMP
	copy(e[26:], g.addr.AsSlice())
	copy(e[30:], to.AsSlice())
	binary.BigEndian.PutUint16(e[24:], ^networktest.Checksum(e[14:34]))
	e[34] = 8
	seal(e)
	_, err := g.tap.Write(f)
	return err
}

// arp asks who has an address.
func (g *guest) arp(who netip.Addr) error {
	f := make([]byte, vnetHeader+42)
	e := f[vnetHeader:]
	copy(e[0:], []byte{255, 255, 255, 255, 255, 255})
	copy(e[6:], g.mac)
	binary.BigEndian.PutUint16(e[12:], unix.ETH_P_ARP)
	copy(e[14:], []byte{0, 1, 8, 0, 6, 4, 0, 1})
	copy(e[22:], g.mac)
	copy(e[28:], g.addr.AsSlice())
	copy(e[38:], who.AsSlice())
	_, err := g.tap.Write(f)
	return err
}

// ask sends something, again each second, until what comes is an answer to it.
func (g *guest) ask(t *testing.T, what string, send func() error, answers func(frame []byte) bool) []byte {
	t.Helper()
	for range 60 {
		if err := send(); err != nil {
			t.Fatal(err)
		}
		for again := time.After(time.Second); again != nil; {
			select {
			case f := <-g.replies:
				if answers(f) {
					return f
				}
			case <-again:
				again = nil
			}
		}
	}
	t.Fatalf("%s: no answer reached the guest", what)
	return nil
}

func TestJoinedGuestHasThePodsIdentityAlone(t *testing.T) {
	lab := newLab(t)
	pool, pod := filepath.Join(lab.Dir, "pool"), lab.Pod(t, "a")
	if err := network.CreatePoolNetns(pool); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.RemovePoolNetns(pool); err != nil {
			t.Error(err)
		}
	})
	addr := lab.Add(t, "a", pod, cniconf.RuntimeConfig{})
	networktest.Do(t, lab.Host, func() error { return networktest.Ping(addr) })
	tap, err := network.NewTap(pool, "vm1")
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	got, err := network.JoinTap(pod, tap)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("{0a:58:0a:f4:00:02 1500 [%s/32] [{10.244.0.1/32 invalid IP} {0.0.0.0/0 10.244.0.1}]}", addr)
	if s := fmt.Sprint(got); s != want {
		t.Errorf("guest identity %s, want %s", s, want)
	}
	// Nobody plays the guest yet: the namespace itself must stay silent,
	// although its eth0 still has the address.
	networktest.Do(t, lab.Host, func() error { return networktest.Silent(addr) })
	g := newGuest(t, tap, got)
	networktest.Do(t, lab.Host, func() error { return networktest.Ping(addr) })
	// The gateway and the world from inside the guest.
	gatewayMAC := g.ask(t, "ARP for the gateway", func() error { return g.arp(lab.Network.Gateway) }, func(f []byte) bool {
		return binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_ARP && netip.AddrFrom4([4]byte(f[28:32])) == lab.Network.Gateway
	})[6:12]
	for _, to := range []netip.Addr{lab.Network.Gateway, netip.MustParseAddr(networktest.WorldAddress)} {
		g.ask(t, "ping to "+to.String(), func() error { return g.ping(gatewayMAC, to) }, func(f []byte) bool {
			return binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_IP && netip.AddrFrom4([4]byte(f[26:30])) == to
		})
	}
	// A guest that lies about its address is not heard.
	b := lab.Pod(t, "b")
	g.addr = lab.Add(t, "b", b, cniconf.RuntimeConfig{})
	// The first packets may be lost while the kernel notices the carrier.
	networktest.Do(t, b, func() error { return networktest.Ping(netip.MustParseAddr(networktest.WorldAddress)) })
	before := received(t, lab.World)
	if err := g.ping(gatewayMAC, netip.MustParseAddr(networktest.WorldAddress)); err != nil {
		t.Fatal(err)
	}
	honest, heard := 0, 0
	networktest.Do(t, b, func() (err error) {
		honest, err = networktest.PingCount(netip.MustParseAddr(networktest.WorldAddress))
		return err
	})
	for end := time.Now().Add(time.Minute); heard < honest && time.Now().Before(end); { // an earlier one was answered
		heard = received(t, lab.World) - before
	}
	if heard != honest {
		t.Errorf("the world got %d packets, want only the %d honest ones", heard, honest)
	}
}

// received counts the ICMP echo requests a namespace got.
func received(t *testing.T, path string) int {
	t.Helper()
	n := 0
	networktest.Do(t, path, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if f[0] != "Icmp:" {
				continue
			}
			if names == nil {
				names = f
				continue
			}
			n, err = strconv.Atoi(f[slices.Index(names, "InEchos")])
		}
		return err
	})
	return n
}

func TestJoinAgainReplacesAndTapFollowsItsHolder(t *testing.T) {
	lab := newLab(t)
	pool, pod := filepath.Join(lab.Dir, "pool"), lab.Pod(t, "a")
	networktest.Namespace(t, pool)
	addr := lab.Add(t, "a", pod, cniconf.RuntimeConfig{})
	for range 2 {
		tap, err := network.NewTap(pool, "vm1")
		if err != nil {
			t.Fatal(err)
		}
		got, err := network.JoinTap(pod, tap)
		if err != nil {
			t.Fatal(err)
		}
		g := newGuest(t, tap, got)
		networktest.Do(t, lab.Host, func() error { return networktest.Ping(addr) })
		if err := errors.Join(g.tap.Close(), tap.Close()); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(time.Minute)
		for {
			var err error
			networktest.Do(t, pool, func() error {
				_, err = netlink.LinkByName("vm1")
				return nil
			})
			if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the tap outlives its holder")
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	if _, err := network.JoinTap(filepath.Join(lab.Dir, "gone"), network.Tap{PoolNetns: pool, Name: "vm1"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("join without a pod: %v", err)
	}
	if _, err := network.JoinTap(lab.Dir, network.Tap{PoolNetns: pool, Name: "vm1"}); !errors.Is(err, netns.ErrNotNetNS) {
		t.Errorf("join to a directory: %v", err)
	}
}

func TestJoinTapIsFast(t *testing.T) {
	lab := newLab(t)
	pool := filepath.Join(lab.Dir, "pool")
	networktest.Namespace(t, pool)
	var news, joins []time.Duration
	for i := range 40 {
		id := fmt.Sprint("p", i)
		pod := lab.Pod(t, id)
		lab.Add(t, id, pod, cniconf.RuntimeConfig{})
		start := time.Now()
		tap, err := network.NewTap(pool, "vm"+id)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tap.Close() })
		made := time.Now()
		if _, err := network.JoinTap(pod, tap); err != nil {
			t.Fatal(err)
		}
		news, joins = append(news, made.Sub(start)), append(joins, time.Since(made))
	}
	for _, m := range []struct {
		name string
		d    []time.Duration
	}{{"NewTap", news}, {"JoinTap", joins}} {
		slices.Sort(m.d)
		t.Logf("%s: median %s, p95 %s", m.name, m.d[len(m.d)/2], m.d[len(m.d)*95/100])
	}
}
