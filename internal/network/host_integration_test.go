//go:build integration

package network_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/networktest"
)

func run(t *testing.T, ns, script string) string {
	t.Helper()
	var out []byte
	networktest.Do(t, ns, func() (err error) {
		if out, err = exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
		return nil
	})
	return string(out)
}

func TestHostRepairsWhatOthersRemove(t *testing.T) {
	lab := networktest.New(t)
	h, err := network.NewHost(network.HostConfig{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	networktest.Do(t, lab.Host, h.Setup)
	pod := lab.Pod(t, "a")
	addr := lab.Add(t, "a", pod, cniconf.RuntimeConfig{
		PortMappings: []cniconf.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}},
	})
	networktest.ServeWho(t, pod, 80)
	networktest.ServeWho(t, lab.World, 82)
	ok := func(when string) {
		t.Helper()
		for _, c := range []struct{ from, to, want string }{
			{lab.World, networktest.HostAddress + ":8080", networktest.WorldAddress},
			{lab.Host, addr.String() + ":80", "10.244.0.1"},
			{pod, networktest.WorldAddress + ":82", networktest.HostAddress},
		} {
			if got, err := networktest.Who(c.from, "tcp4", c.to); err != nil || got != c.want {
				t.Errorf("%s: %s seen as %q, %v; want %s", when, c.to, got, err, c.want)
			}
		}
	}
	ok("at first")
	for _, harm := range []string{
		"nft flush ruleset",
		"nft flush chain ip atoll postrouting",
		"ip link del atoll0",
		"ip addr flush dev atoll0",
		"ip route flush table main scope link; ip link set up0 down; ip link set up0 up; ip route replace 192.0.2.0/24 dev up0",
		"sysctl -qw net.ipv4.ip_forward=0",
	} {
		run(t, lab.Host, harm)
		networktest.Do(t, lab.Host, h.Setup)
		ok("after " + harm)
	}
}

func TestPodsPassForeignForwardDrop(t *testing.T) {
	lab := newLab(t)
	pod := lab.Pod(t, "a")
	lab.Add(t, "a", pod, cniconf.RuntimeConfig{
		PortMappings: []cniconf.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}},
	})
	networktest.ServeWho(t, pod, 80)
	networktest.ServeWho(t, lab.World, 82)
	run(t, lab.Host, "iptables -P FORWARD DROP; iptables -A FORWARD -i other0 -j ACCEPT")
	if err := networktest.Unanswered(pod, networktest.WorldAddress+":82"); err != nil {
		t.Fatalf("the policy does not drop, so the test proves nothing: %v", err)
	}
	h, err := network.NewHost(network.HostConfig{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		networktest.Do(t, lab.Host, h.Setup)
	}
	for from, to := range map[string]string{pod: networktest.WorldAddress + ":82", lab.World: networktest.HostAddress + ":8080"} {
		if got, err := networktest.Who(from, "tcp4", to); err != nil {
			t.Errorf("%s: %q %v", to, got, err)
		}
	}
	// iptables still reads its own table, and the rules are there once.
	rules := run(t, lab.Host, "iptables -S FORWARD")
	if strings.Count(rules, "atl+") != 2 || !strings.Contains(rules, "other0") {
		t.Errorf("rules:\n%s", rules)
	}
	networktest.Do(t, lab.Host, func() error {
		return network.Cleanup(network.CleanupConfig{Network: lab.Network, CNICacheDir: lab.Dir})
	})
	if rules := run(t, lab.Host, "iptables -S FORWARD"); strings.Contains(rules, "atl") {
		t.Errorf("left in the foreign chain:\n%s", rules)
	}
}

func TestCleanupLeavesNothing(t *testing.T) {
	lab := networktest.New(t)
	networktest.Do(t, lab.Host, func() error {
		// A host without other virtual networks: the wire to the world would
		// count as one.
		link, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	before := state(t, lab)
	h, err := network.NewHost(network.HostConfig{Network: lab.Network})
	if err != nil {
		t.Fatal(err)
	}
	networktest.Do(t, lab.Host, h.Setup)
	pods, pool := filepath.Join(lab.Dir, "netns"), filepath.Join(lab.Dir, "pool")
	for _, id := range []string{"a", "b", "c"} {
		pod := filepath.Join(pods, id)
		if err := netns.Create(pod); err != nil {
			t.Fatal(err)
		}
		lab.Add(t, id, pod, cniconf.RuntimeConfig{
			PortMappings: []cniconf.PortMapping{{HostPort: 8000 + int(id[0]), ContainerPort: 80, Protocol: "tcp"}},
		})
	}
	if err := network.CreatePoolNetns(filepath.Join(pool, "taps")); err != nil {
		t.Fatal(err)
	}
	// Leases that were lost do not hide their interfaces.
	if err := os.Remove(filepath.Join(lab.Network.StateDir, "leases", "b@eth0")); err != nil {
		t.Fatal(err)
	}
	cache := filepath.Join(lab.Dir, "cache")
	if err := os.MkdirAll(filepath.Join(cache, "results"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cache, "results", "lab-a-eth0"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, lab.Host, "nft add table ip kube-proxy; nft add table ip6 kube-proxy; nft add table ip others")
	c := network.CleanupConfig{
		Network:   cniconf.Network{Name: lab.Network.Name, StateDir: lab.Network.StateDir},
		NetnsDirs: []string{pods, pool, filepath.Join(lab.Dir, "missing")},
		Tables:    []string{"kube-proxy"}, CNICacheDir: cache,
	}
	for range 2 {
		networktest.Do(t, lab.Host, func() error { return network.Cleanup(c) })
	}
	run(t, lab.Host, "nft delete table ip others")
	if after := state(t, lab); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// state is the network of the lab's host and the files of the test.
func state(t *testing.T, lab *networktest.Lab) string {
	t.Helper()
	out := run(t, lab.Host, "ip -br link; ip addr; ip route show table all; nft list ruleset; sysctl net.ipv4.ip_forward; grep -c "+lab.Dir+" /proc/self/mountinfo")
	entries, err := filepath.Glob(filepath.Join(lab.Dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(entries)
	return out + strings.Join(entries, "\n")
}
