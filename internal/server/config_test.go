package server

import (
	"net/netip"
	"strings"
	"testing"
)

func TestValidateNamesEverythingMissing(t *testing.T) {
	err := Config{}.WithDefaults().Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, name := range []string{"PKIDir", "KubeconfigDir", "EtcdDir", "StateDir", "AuditLog", "AdminKubeconfig", "DatastorePath", "ContentDir", "NodeName", "NodeIP"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
}

func TestValidateNetwork(t *testing.T) {
	for _, c := range []struct {
		name    string
		network Network
		want    string
	}{
		{"defaults", Network{}, ""},
		{"dns outside", Network{DNSServiceIP: netip.MustParseAddr("10.97.0.10")}, "DNSServiceIP"},
		{"overlap", Network{PodCIDR: netip.MustParsePrefix("10.96.0.0/12")}, "overlap"},
		{"node mask", Network{NodeMaskSize: 8}, "NodeMaskSize"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := Config{
				PKIDir: "/a", KubeconfigDir: "/a", EtcdDir: "/a", StateDir: "/a", AuditLog: "/a", AdminKubeconfig: "/a", DatastorePath: "/a", ContentDir: "/a", RegistryDir: "/a",
				NodeName: "n", NodeIP: netip.MustParseAddr("192.0.2.7"), Network: c.network,
			}
			err := cfg.WithDefaults().Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Fatalf("error %v", err)
			}
		})
	}
}
