package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestValidateNamesEverythingMissing(t *testing.T) {
	err := Config{NodeIP: netip.MustParseAddr("127.0.0.1")}.WithDefaults().Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, name := range []string{"PKIDir", "KubeconfigDir", "KubeletDir", "PodLogsDir", "StateDir", "ContentDir", "ContainerdSocket", "NodeName", "NodeIP"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
}

// TestNetworksOfTheCluster: images of a namespace come from none of them.
func TestNetworksOfTheCluster(t *testing.T) {
	for _, tc := range []struct {
		network Network
		in      []string
	}{
		{Network{}, []string{"10.244.3.7", "10.96.0.10", "10.97.0.7"}},
		{Network{LoadBalancers: netip.MustParsePrefix("192.0.2.64/28")}, []string{"10.244.3.7", "10.96.0.10", "192.0.2.65"}},
	} {
		networks := Config{Network: tc.network}.WithDefaults().Network.cluster()
		for _, a := range tc.in {
			if !slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(a)) }) {
				t.Errorf("%s is in none of %v", a, networks)
			}
		}
	}
}
