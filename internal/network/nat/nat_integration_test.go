//go:build integration

package nat

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/lease"
)

func inNamespace(t *testing.T, fn func() error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	if err := netns.Do(path, fn); err != nil {
		t.Fatal(err)
	}
}

func testConfig() Config {
	return ConfigOf(cniconf.Network{
		Bridge: cniconf.DefaultBridge, Gateway: netip.MustParseAddr("10.244.0.1"),
		Subnet: netip.MustParsePrefix("10.244.0.0/22"), ClusterCIDR: netip.MustParsePrefix("10.244.0.0/16"),
	})
}

func testPod(last byte, owner string, ports ...lease.HostPort) Pod {
	return Pod{Address: netip.AddrFrom4([4]byte{10, 244, 0, last}), Ports: ports, Owner: owner}
}

// TestGolden shows the table as nft lists it.
func TestGolden(t *testing.T) {
	var got []byte
	inNamespace(t, func() error {
		// One element per map: nft lists several in the order of a random hash.
		pod := testPod(
			2, "ns/a", lease.HostPort{Protocol: "tcp", Port: 80, PodPort: 8080},
			lease.HostPort{Protocol: "sctp", Port: 80, PodPort: 81, HostIP: netip.MustParseAddr("192.0.2.1")},
		)
		// Twice: it replaces, it does not add.
		for range 2 {
			if err := errors.Join(Ensure(testConfig()), Add(testConfig(), pod)); err != nil {
				return err
			}
		}
		var err error
		got, err = exec.Command("nft", "list", "table", "ip", "atoll").CombinedOutput()
		return err
	})
	golden := filepath.Join("testdata", "table.nft")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("got\n%s\nwant\n%s\nUPDATE_GOLDEN=1 renews %s", got, want, golden)
	}
}

func TestHostPortsComeAndGo(t *testing.T) {
	inNamespace(t, func() error {
		c := testConfig()
		web := lease.HostPort{Protocol: "tcp", Port: 80, PodPort: 8080}
		dns := lease.HostPort{Protocol: "udp", Port: 53, PodPort: 53}
		if err := Add(c, testPod(2, "a", web)); !errors.Is(err, ErrNoTable) {
			t.Errorf("without a table: %v", err)
		}
		if err := Ensure(c); err != nil {
			return err
		}
		if err := Add(c, testPod(2, "a", web)); err != nil {
			return err
		}
		// All or none: the free port of a refused pod is not taken either.
		if err := Add(c, testPod(3, "b", dns, web)); !errors.Is(err, ErrPortTaken) {
			t.Errorf("taken port: %v", err)
		}
		if _, ok, err := Lookup(c, dns); ok || err != nil {
			t.Errorf("port of the refused pod: %v, %v", ok, err)
		}
		// Another pod's removal leaves the port alone.
		if err := Remove(c, testPod(3, "b", dns, web)); err != nil {
			return err
		}
		if a, ok, err := Lookup(c, web); !ok || err != nil || a.String() != "10.244.0.2" {
			t.Errorf("port of the first pod: %v, %v, %v", a, ok, err)
		}
		for range 2 {
			if err := Remove(c, testPod(2, "a", web)); err != nil {
				return err
			}
		}
		if _, ok, err := Lookup(c, web); ok || err != nil {
			t.Errorf("after removal: %v, %v", ok, err)
		}
		ok, err := Installed(c)
		if err != nil || !ok {
			t.Errorf("installed: %v, %v", ok, err)
		}
		for range 2 {
			if err := DeleteTables(c.Table, "missing"); err != nil {
				return err
			}
		}
		if ok, err := Installed(c); err != nil || ok {
			t.Errorf("installed after deletion: %v, %v", ok, err)
		}
		// A pod may still go when the table is gone.
		return Remove(c, testPod(2, "a", web))
	})
}
