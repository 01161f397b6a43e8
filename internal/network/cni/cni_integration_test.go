//go:build integration

package cni_test

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/cni"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/networktest"
)

// The test binary is the plugin when it is called like one.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(cni.Main())
	}
	os.Exit(m.Run())
}

// newLab is a lab whose host is set up.
func newLab(t testing.TB) *networktest.Lab {
	t.Helper()
	lab := networktest.New(t)
	setUp(t, lab)
	return lab
}

func setUp(t testing.TB, lab *networktest.Lab) {
	t.Helper()
	h, err := network.NewHost(network.HostConfig{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	networktest.Do(t, lab.Host, h.Setup)
}

func TestPodsReachEachOtherHostAndWorld(t *testing.T) {
	lab := newLab(t)
	a, b := lab.Pod(t, "a"), lab.Pod(t, "b")
	addrA := lab.Add(t, "a", a, cniconf.RuntimeConfig{})
	addrB := lab.Add(t, "b", b, cniconf.RuntimeConfig{})
	networktest.ServeWho(t, b, 80)
	networktest.ServeWho(t, lab.Host, 81)
	networktest.ServeWho(t, lab.World, 82)
	for _, tc := range []struct{ name, from, to, want string }{
		{"pod to pod", a, addrB.String() + ":80", addrA.String()},
		{"pod to gateway", a, lab.Network.Gateway.String() + ":81", addrA.String()},
		{"pod to host address", a, networktest.HostAddress + ":81", addrA.String()},
		{"pod to world, masqueraded", a, networktest.WorldAddress + ":82", networktest.HostAddress},
		{"host to pod", lab.Host, addrB.String() + ":80", lab.Network.Gateway.String()},
	} {
		for _, network := range []string{"tcp4", "udp4"} {
			if network == "udp4" && tc.name == "pod to host address" {
				continue // an unbound server answers from the gateway address
			}
			got, err := networktest.Who(tc.from, network, tc.to)
			if err != nil || got != tc.want {
				t.Errorf("%s over %s: seen as %q, %v; want %s", tc.name, network, got, err, tc.want)
			}
		}
	}
	networktest.Do(t, a, func() error { return networktest.Ping(addrB) })
	if out, err := lab.CNI("CHECK", "a", a, cniconf.RuntimeConfig{}); err != nil {
		t.Errorf("CHECK: %v %s", err, out)
	}
}

func TestHostPorts(t *testing.T) {
	lab := newLab(t)
	a, b := lab.Pod(t, "a"), lab.Pod(t, "b")
	lab.Add(t, "b", b, cniconf.RuntimeConfig{})
	mappings := []cniconf.PortMapping{
		{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"},
		{HostPort: 8080, ContainerPort: 80, Protocol: "udp"},
		{HostPort: 8081, ContainerPort: 80, Protocol: "TCP", HostIP: networktest.HostAddress},
		{HostPort: 8082, ContainerPort: 80, Protocol: "tcp", HostIP: "127.0.0.1"},
		{HostPort: 8083, ContainerPort: 80, Protocol: "sctp", HostIP: "0.0.0.0"},
	}
	addr := lab.Add(t, "a", a, cniconf.RuntimeConfig{PortMappings: mappings}).String()
	networktest.ServeWho(t, a, 80)
	gw := lab.Network.Gateway.String()
	for _, tc := range []struct{ name, from, net, to, want string }{
		{"from the world", lab.World, "tcp4", networktest.HostAddress + ":8080", networktest.WorldAddress},
		{"from the world, udp", lab.World, "udp4", networktest.HostAddress + ":8080", networktest.WorldAddress},
		{"with host address", lab.World, "tcp4", networktest.HostAddress + ":8081", networktest.WorldAddress},
		{"from the host", lab.Host, "tcp4", networktest.HostAddress + ":8080", networktest.HostAddress},
		{"from the host's loopback", lab.Host, "tcp4", "127.0.0.1:8080", gw},
		{"from the host's loopback, udp", lab.Host, "udp4", "127.0.0.1:8080", gw},
		{"only on loopback", lab.Host, "tcp4", "127.0.0.1:8082", gw},
		{"from another pod", b, "tcp4", networktest.HostAddress + ":8080", ""},
		{"through the gateway address", b, "tcp4", gw + ":8080", ""},
		{"from the pod itself", a, "tcp4", networktest.HostAddress + ":8080", gw},
	} {
		got, err := networktest.Who(tc.from, tc.net, tc.to)
		if err != nil || tc.want != "" && got != tc.want {
			t.Errorf("%s: seen as %q, %v; want %s", tc.name, got, err, tc.want)
		}
	}
	for _, tc := range []struct{ name, from, to string }{
		{"address port on another address", lab.Host, gw + ":8081"},
		{"loopback port from the world", lab.World, networktest.HostAddress + ":8082"},
	} {
		if err := networktest.Unanswered(tc.from, tc.to); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
	}

	c := lab.Pod(t, "c")
	_, err := lab.CNI("ADD", "c", c, cniconf.RuntimeConfig{PortMappings: mappings[:1]})
	if err == nil || !strings.Contains(err.Error(), "8080/tcp is held by test/a") {
		t.Errorf("second use of a host port: %v", err)
	}
	if got, err := networktest.Who(lab.World, "tcp4", networktest.HostAddress+":8080"); err != nil {
		t.Errorf("after the refused pod: %q %v", got, err)
	}
	lab.Del(t, "a", a)
	lab.Add(t, "c", c, cniconf.RuntimeConfig{PortMappings: mappings[:1]})
	_ = addr
}

func TestPodCannotReachHostLoopback(t *testing.T) {
	lab := newLab(t)
	a := lab.Pod(t, "a")
	// A host port turns route_localnet on.
	lab.Add(t, "a", a, cniconf.RuntimeConfig{PortMappings: []cniconf.PortMapping{{HostPort: 8080, ContainerPort: 80}}})
	networktest.ServeWho(t, lab.Host, 9000)
	networktest.Do(t, a, func() error {
		// What an attacker in the pod would do: lo down, 127/8 to the gateway.
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/eth0/route_localnet", []byte("1"), 0); err != nil {
			return err
		}
		return networktest.Run("ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
	})
	networktest.Do(t, a, func() error {
		return networktest.Run("sh", "-c", "ip route del local 127.0.0.1 dev lo table local; ip route add 127.0.0.0/8 via 10.244.0.1")
	})
	if err := networktest.Unanswered(a, "127.0.0.1:9000"); err != nil {
		t.Errorf("the host's loopback: %v", err)
	}
}

func TestDelIsIdempotentAndWorksWithoutNamespace(t *testing.T) {
	lab := newLab(t)
	a := lab.Pod(t, "a")
	lab.Add(t, "a", a, cniconf.RuntimeConfig{PortMappings: []cniconf.PortMapping{{HostPort: 8080, ContainerPort: 80}}})
	if err := networktest.Run("umount", a); err != nil {
		t.Fatal(err)
	}
	lab.Del(t, "a", a)
	lab.Del(t, "a", a)
	lab.Del(t, "a", "")
	lab.Del(t, "never-added", "")
	expectClean(t, lab)
}

func TestAddressesRunOut(t *testing.T) {
	lab := networktest.New(t)
	lab.Network.Subnet = mustPrefix("10.244.0.0/29")
	setUp(t, lab)
	for i := range 5 {
		id := fmt.Sprint("p", i)
		lab.Add(t, id, lab.Pod(t, id), cniconf.RuntimeConfig{})
	}
	_, err := lab.CNI("ADD", "p5", lab.Pod(t, "p5"), cniconf.RuntimeConfig{})
	if err == nil || !strings.Contains(err.Error(), "no free pod address in 10.244.0.0/29: all 5 are in use") {
		t.Errorf("sixth pod: %v", err)
	}
	lab.Del(t, "p2", "")
	if got := lab.Add(t, "p6", lab.Pod(t, "p6"), cniconf.RuntimeConfig{}); got.String() != "10.244.0.4" {
		t.Errorf("address %s after the release of 10.244.0.4", got)
	}
}

// TestUDPClientFollowsTheHostPort keeps one client socket, so one entry in the
// connection tracking table, through the changes of the pod behind a port.
func TestUDPClientFollowsTheHostPort(t *testing.T) {
	lab := newLab(t)
	var client net.Conn
	networktest.Do(t, lab.World, func() (err error) {
		client, err = net.Dial("udp4", networktest.HostAddress+":8053")
		return err
	})
	defer client.Close()
	answer := func(within time.Duration) error {
		_ = client.SetReadDeadline(time.Now().Add(within))
		_, err := client.Read(make([]byte, 64))
		return err
	}
	ask := func() error {
		_, _ = client.Write([]byte("?"))
		return answer(time.Second)
	}
	if err := ask(); err == nil {
		t.Fatal("answered before there is a pod")
	}
	rc := cniconf.RuntimeConfig{PortMappings: []cniconf.PortMapping{{HostPort: 8053, ContainerPort: 53, Protocol: "udp"}}}
	for _, id := range []string{"a", "b"} {
		pod := lab.Pod(t, id)
		lab.Add(t, id, pod, rc)
		networktest.ServeWho(t, pod, 53)
		// The first try may still get the refusal of the time before, and later ones may be slow.
		for end := time.Now().Add(time.Minute); ; {
			err := ask()
			if err == nil {
				break
			}
			if time.Now().After(end) {
				t.Errorf("pod %s: %v", id, err)
				break
			}
		}
		lab.Del(t, id, pod)
		for answer(10*time.Millisecond) == nil { // to a question that was asked twice
		}
	}
}

// TestServiceTraffic stands in for kube-proxy: destination NAT to pods, with
// the masquerading it asks for.
func TestServiceTraffic(t *testing.T) {
	for _, bridgeCalls := range []string{"0", "1"} {
		lab := newLab(t)
		a, b := lab.Pod(t, "a"), lab.Pod(t, "b")
		addrA := lab.Add(t, "a", a, cniconf.RuntimeConfig{}).String()
		addrB := lab.Add(t, "b", b, cniconf.RuntimeConfig{}).String()
		networktest.ServeWho(t, b, 80)
		networktest.Do(t, lab.Host, func() error {
			// Absent where br_netfilter is.
			_ = os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte(bridgeCalls), 0)
			return networktest.Run("sh", "-ec", `
nft add table ip kube-proxy
nft add chain ip kube-proxy in '{ type nat hook prerouting priority dstnat; }'
nft add chain ip kube-proxy out '{ type nat hook output priority -100; }'
nft add chain ip kube-proxy post '{ type nat hook postrouting priority srcnat; }'
for c in out in; do
  nft add rule ip kube-proxy $c ip daddr 10.96.0.50 tcp dport 80 ip saddr `+addrB+` meta mark set 0x4000 dnat to `+addrB+`:80
  nft add rule ip kube-proxy $c ip daddr 10.96.0.50 tcp dport 80 dnat to `+addrB+`:80
  nft add rule ip kube-proxy $c fib daddr type local tcp dport 30080 meta mark set 0x4000 dnat to `+addrB+`:80
done
nft add rule ip kube-proxy post mark and 0x4000 != 0 masquerade fully-random`)
		})
		for _, tc := range []struct{ name, from, to, want string }{
			{"pod to service", a, "10.96.0.50:80", addrA},
			{"pod to itself through its service", b, "10.96.0.50:80", networktest.HostAddress},
			{"node port from the world", lab.World, networktest.HostAddress + ":30080", networktest.HostAddress},
			{"node port from a pod", a, networktest.HostAddress + ":30080", networktest.HostAddress},
			{"node port on the gateway address", a, lab.Network.Gateway.String() + ":30080", networktest.HostAddress},
		} {
			if got, err := networktest.Who(tc.from, "tcp4", tc.to); err != nil || got != tc.want {
				t.Errorf("bridge-nf-call %s: %s: seen as %q, %v; want %s", bridgeCalls, tc.name, got, err, tc.want)
			}
		}
	}
}

// TestVirtualMachine: its address is kept for its next pod, and its interface has the machine's hardware address.
func TestVirtualMachine(t *testing.T) {
	lab := newLab(t)
	a, b := lab.Pod(t, "a"), lab.Pod(t, "b")
	machine := `{"name":"m","namespace":"n","uid":"u","biosUUID":"4c4c4544-0051-3010-8052-b4c04f4e3132","cpu":{"count":1},` +
		`"memory":{"bytes":1073741824},"firmware":{"type":"bios"},"disks":[],"nics":[{"name":"eth0","model":"virtio-net-pci","mac":"52:54:00:00:00:09","pod":true}],"stop":{"mode":"Hard"}}`
	rc := cniconf.RuntimeConfig{Annotations: map[string]string{machinev1.AddressAnnotation: "vm-u", machinev1.Annotation: machine}}
	first := lab.Add(t, "a", a, rc)
	networktest.Do(t, a, func() error {
		link, err := net.InterfaceByName("eth0")
		if err == nil && link.HardwareAddr.String() != "52:54:00:00:00:09" {
			err = fmt.Errorf("eth0 has %s", link.HardwareAddr)
		}
		return err
	})
	networktest.Do(t, lab.Host, func() error { return networktest.Ping(first) })
	if out, err := lab.CNI("DEL", "a", a, rc); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	for _, name := range []string{"c", "d"} {
		if other := lab.Add(t, name, lab.Pod(t, name), cniconf.RuntimeConfig{}); other == first {
			t.Errorf("pod %s got the address of the machine", name)
		}
	}
	if again := lab.Add(t, "b", b, rc); again != first {
		t.Errorf("the machine had %s and has %s", first, again)
	}
	rc.Annotations[machinev1.Annotation] = "{"
	if out, err := lab.CNI("ADD", "e", lab.Pod(t, "e"), rc); err == nil || !strings.Contains(string(out), machinev1.Annotation) {
		t.Errorf("a damaged machine: %v %s", err, out)
	}
}
