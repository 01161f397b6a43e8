package cniconf

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func network() Network {
	return Network{
		Subnet:      netip.MustParsePrefix("10.244.0.0/22"),
		ClusterCIDR: netip.MustParsePrefix("10.244.0.0/16"),
		StateDir:    "/var/lib/atoll/cni/state",
	}
}

func TestRenderGolden(t *testing.T) {
	got, err := Render(network())
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", FileName)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s\nUPDATE_GOLDEN=1 renews %s", got, want, golden)
	}
	// What is rendered, the plugin reads.
	var l list
	if err := json.Unmarshal(got, &l); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(l.Plugins[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if n := p.Network(); n.Subnet != network().Subnet || n.Gateway.String() != "10.244.0.1" || n.Bridge != "atoll0" {
		t.Errorf("read back %+v", n)
	}
}

func TestRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Network)
		want   string
	}{
		"no subnet":         {func(n *Network) { n.Subnet = netip.Prefix{} }, "ranges[0]: subnet: missing"},
		"IPv6":              {func(n *Network) { n.Subnet = netip.MustParsePrefix("fd00::/64") }, "IPv6 pod networks are not supported"},
		"IPv6 cluster":      {func(n *Network) { n.ClusterCIDR = netip.MustParsePrefix("fd00::/64") }, "clusterCIDRs: one IPv4"},
		"tiny subnet":       {func(n *Network) { n.Subnet = netip.MustParsePrefix("10.244.0.0/30") }, "between /8 and /29"},
		"foreign gateway":   {func(n *Network) { n.Gateway = netip.MustParseAddr("10.1.0.1") }, "gateway: 10.1.0.1 is no host address"},
		"network gateway":   {func(n *Network) { n.Gateway = netip.MustParseAddr("10.244.0.0") }, "gateway: 10.244.0.0 is no host address"},
		"broadcast gateway": {func(n *Network) { n.Gateway = netip.MustParseAddr("10.244.3.255") }, "gateway: 10.244.3.255 is no host address"},
		"foreign cluster":   {func(n *Network) { n.ClusterCIDR = netip.MustParsePrefix("10.245.0.0/16") }, "does not hold the node's"},
		"small cluster":     {func(n *Network) { n.ClusterCIDR = netip.MustParsePrefix("10.244.0.0/24") }, "does not hold the node's"},
		"bridge name":       {func(n *Network) { n.Bridge = "a/b" }, "bridge:"},
		"long bridge name":  {func(n *Network) { n.Bridge = strings.Repeat("a", 16) }, "bridge:"},
		"MTU":               {func(n *Network) { n.MTU = 100 }, "mtu: 100"},
		"state directory":   {func(n *Network) { n.StateDir = "state" }, "stateDir:"},
	} {
		n := network()
		tc.change(&n)
		if _, err := Render(n); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want %q", name, err, tc.want)
		}
	}
	for _, bad := range []string{
		``, `null`, `[]`, `{}`, `{"ranges":[]}`,
		`{"stateDir":"/s","ranges":[{"subnet":"10.0.0.0/24"},{"subnet":"10.0.1.0/24"}]}`,
		`{"stateDir":"/s","ranges":[{"subnet":"10.0.0.0/24"},{"subnet":"fd00::/64"}]}`,
		`{"stateDir":"/s","ranges":[{"subnet":"10.0.0.0"}]}`,
	} {
		if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", bad)
		}
	}
}

func TestWriteOnlyOnChange(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "net.d")
	if err := Write(dir, network()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, FileName)
	first, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, network()); err != nil {
		t.Fatal(err)
	}
	if second, err := os.Stat(path); err != nil || !os.SameFile(first, second) {
		t.Errorf("an unchanged configuration was written again (%v)", err)
	}
	n := network()
	n.MTU = 1400
	if err := Write(dir, n); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil || !bytes.Contains(b, []byte(`"mtu": 1400`)) {
		t.Errorf("%s %v", b, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left in the directory: %v %v", entries, err)
	}
}

func FuzzParse(f *testing.F) {
	b, err := os.ReadFile(filepath.Join("testdata", FileName))
	if err != nil {
		f.Fatal(err)
	}
	var l struct{ Plugins []json.RawMessage }
	if err := json.Unmarshal(b, &l); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(l.Plugins[0]))
	f.Add([]byte(`{"stateDir":"/s","ranges":[{"subnet":"10.0.0.0/24","gateway":"10.0.0.9"}],"runtimeConfig":{"portMappings":[{"hostPort":1}],"bandwidth":{}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		n := p.Network()
		if !n.Subnet.Contains(n.Gateway) || !n.ClusterCIDR.Contains(n.Subnet.Addr()) || !n.Subnet.Addr().Is4() {
			t.Errorf("accepted %+v", n)
		}
		// What was accepted is accepted again when it is written out.
		if _, err := n.Complete(); err != nil {
			t.Errorf("%s: accepted, then: %v", b, err)
		}
	})
}
