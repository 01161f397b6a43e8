// Package networktest builds small networks out of network namespaces for
// tests of internal/network and its packages. It needs root.
//
// Only tests import it. Nothing touches the network of the machine itself, and
// everything made is removed when the test ends.
package networktest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/cniconf"
)

// Addresses of the lab.
const (
	HostAddress  = "192.0.2.1" // the host on the wire to the world
	WorldAddress = "192.0.2.2"
)

// Lab is a host and, joined to it by a wire, the world outside.
type Lab struct {
	// Host and World are paths of network namespaces.
	Host, World string
	// Network is the pod network of the host.
	Network cniconf.Network
	// Dir is the test's own directory.
	Dir string
}

// New builds a lab whose host has no pod network yet.
func New(t testing.TB) *Lab {
	t.Helper()
	dir := t.TempDir()
	l := &Lab{
		Host: filepath.Join(dir, "host"), World: filepath.Join(dir, "world"), Dir: dir,
		Network: cniconf.Network{
			Name: "lab", Bridge: cniconf.DefaultBridge,
			Subnet:      netip.MustParsePrefix("10.244.0.0/22"),
			Gateway:     netip.MustParseAddr("10.244.0.1"),
			ClusterCIDR: netip.MustParsePrefix("10.244.0.0/16"),
			StateDir:    filepath.Join(dir, "state"),
		},
	}
	Namespace(t, l.Host)
	Namespace(t, l.World)
	world, err := netns.Open(l.World)
	check(t, err)
	defer world.Close()
	Do(t, l.Host, func() error {
		a := netlink.NewLinkAttrs()
		a.Name = "up0"
		veth := &netlink.Veth{LinkAttrs: a, PeerName: "up0", PeerNamespace: netlink.NsFd(world.FD())}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return upWith("up0", HostAddress+"/24")
	})
	Do(t, l.World, func() error { return upWith("up0", WorldAddress+"/24") })
	// The first packets may be lost while the kernel notices the carrier.
	Do(t, l.World, func() error { return Ping(netip.MustParseAddr(HostAddress)) })
	return l
}

func upWith(name, cidr string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// Namespace makes a network namespace at path for the time of the test.
func Namespace(t testing.TB, path string) {
	t.Helper()
	check(t, netns.Create(path))
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
}

// Pod makes the network namespace of a pod and returns its path.
func (l *Lab) Pod(t testing.TB, id string) string {
	t.Helper()
	path := filepath.Join(l.Dir, "pod-"+id)
	Namespace(t, path)
	return path
}

// Do runs fn in a network namespace and fails the test when it fails.
func Do(t testing.TB, path string, fn func() error) {
	t.Helper()
	check(t, netns.Do(path, fn))
}

// CNI runs the plugin in the lab's host as a container runtime does. The test
// binary must call cni.Main when CNI_COMMAND is set. It returns what the
// plugin printed; err is set when it failed.
func (l *Lab) CNI(verb, id, pod string, rc cniconf.RuntimeConfig, change ...func(*cniconf.Plugin)) (out []byte, err error) {
	b, err := cniconf.Render(l.Network)
	if err != nil {
		return nil, err
	}
	var list struct {
		CNIVersion, Name string
		Plugins          []cniconf.Plugin
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, err
	}
	conf := list.Plugins[0]
	conf.CNIVersion, conf.Name, conf.RuntimeConfig = list.CNIVersion, list.Name, rc
	if verb == "GC" || verb == "STATUS" {
		conf.CNIVersion = "1.1.0"
	}
	for _, c := range change {
		c(&conf)
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + pod, "CNI_IFNAME=eth0", "CNI_PATH=/nowhere",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=test;K8S_POD_NAME=" + id,
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	err = netns.Do(l.Host, cmd.Run)
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s%s", verb, id, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), err
}

// Add gives a pod its interface and returns its address.
func (l *Lab) Add(t testing.TB, id, pod string, rc cniconf.RuntimeConfig) netip.Addr {
	t.Helper()
	out, err := l.CNI("ADD", id, pod, rc)
	check(t, err)
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	check(t, json.Unmarshal(out, &result))
	if len(result.IPs) != 1 {
		t.Fatalf("ADD returned %s", out)
	}
	return result.IPs[0].Address.Addr()
}

// Del takes a pod's interface away.
func (l *Lab) Del(t testing.TB, id, pod string) {
	t.Helper()
	_, err := l.CNI("DEL", id, pod, cniconf.RuntimeConfig{})
	check(t, err)
}

const (
	// patience is how long something is tried that has to work.
	patience = time.Minute
	// again is after how long a packet is sent again that nothing answers.
	again = time.Second
	// silence is how long nobody must answer.
	silence = 2 * time.Second
)

// Ping sends ICMP echoes from the namespace of the calling thread, one a second, until one is answered or a minute
// has passed.
func Ping(to netip.Addr) error {
	_, err := PingCount(to)
	return err
}

// PingCount is Ping, and returns how many echoes it sent.
func PingCount(to netip.Addr) (sent int, err error) {
	for end := time.Now().Add(patience); ; {
		sent++
		begun := time.Now()
		if err = echo(to); err == nil || begun.Add(again).After(end) {
			return sent, err
		}
		time.Sleep(time.Until(begun.Add(again))) // some errors come at once
	}
}

// Silent sends one ICMP echo from the namespace of the calling thread, and fails if it is answered within a second.
func Silent(to netip.Addr) error {
	if echo(to) == nil {
		return fmt.Errorf("%s has answered", to)
	}
	return nil
}

// echo sends one ICMP echo and waits for an answer, to it or to an earlier one, for a second.
func echo(to netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(again.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	echo := []byte{8, 0, 0, 0, 0x41, 0x54, 0, 1}
	sum := ^Checksum(echo)
	echo[2], echo[3] = byte(sum>>8), byte(sum)
	if err := unix.Sendto(fd, echo, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("no answer from %s: %w", to, err)
		}
		// A raw socket also sees requests to itself.
		if n >= 28 && buf[20] == 0 && bytes.Equal(buf[24:28], echo[4:]) {
			if a, ok := from.(*unix.SockaddrInet4); ok && netip.AddrFrom4(a.Addr) == to {
				return nil
			}
		}
	}
}

// Checksum is the ones' complement sum of RFC 1071, not inverted.
func Checksum(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// ServeWho starts a TCP and a UDP server in a namespace that answer every
// connection and datagram with the address it came from.
func ServeWho(t testing.TB, path string, port int) {
	t.Helper()
	Do(t, path, func() error {
		tcp, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = tcp.Close() })
		go func() {
			for {
				c, err := tcp.Accept()
				if err != nil {
					return
				}
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				_, _ = c.Write([]byte(host))
				_ = c.Close()
			}
		}()
		udp, err := net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = udp.Close() })
		go func() {
			buf := make([]byte, 64)
			for {
				_, from, err := udp.ReadFrom(buf)
				if err != nil {
					return
				}
				host, _, _ := net.SplitHostPort(from.String())
				_, _ = udp.WriteTo([]byte(host), from)
			}
		}()
		return nil
	})
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Who asks a server of ServeWho, from a namespace, which address it sees. It tries for a minute.
func Who(path, network, to string) (seen string, err error) {
	return who(path, network, to, patience)
}

// Unanswered asks a server of ServeWho over TCP, from a namespace, and fails if it answers within two seconds.
func Unanswered(path, to string) error {
	if seen, err := who(path, "tcp4", to, silence); err == nil {
		return fmt.Errorf("%s answered %q", to, seen)
	}
	return nil
}

func who(path, network, to string, limit time.Duration) (seen string, err error) {
	err = netns.Do(path, func() error {
		end := time.Now().Add(limit)
		c, err := dial(network, to, end)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 64)
		if network != "udp4" {
			_ = c.SetDeadline(end)
			n, err := c.Read(buf)
			seen = string(buf[:n])
			return err
		}
		for { // a datagram may get lost
			begun := time.Now()
			_ = c.SetDeadline(begun.Add(again))
			_, err := c.Write([]byte("?"))
			if err == nil {
				var n int
				if n, err = c.Read(buf); err == nil {
					seen = string(buf[:n])
					return nil
				}
			}
			if begun.Add(again).After(end) {
				return err
			}
			time.Sleep(time.Until(begun.Add(again))) // some errors come at once
		}
	})
	return seen, err
}

// dial connects, again after a second if that is refused, until end.
func dial(network, to string, end time.Time) (net.Conn, error) {
	d := net.Dialer{Deadline: end}
	for {
		begun := time.Now()
		c, err := d.Dial(network, to)
		if err == nil || begun.Add(again).After(end) {
			return c, err
		}
		time.Sleep(time.Until(begun.Add(again)))
	}
}

// Run runs a command in the namespace of the calling thread.
func Run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}
	return nil
}
