package dns

import (
	"net/netip"
	"testing"

	"atoll.dev/atoll/internal/testkit/golden"
)

func TestGoldenCorefile(t *testing.T) {
	cfg := Config{
		Kubeconfig: "/data/kubeconfig/coredns.kubeconfig",
		Address:    netip.MustParseAddr("10.244.0.1"),
		Port:       53,
		ReadyPort:  8181,
		Domain:     "cluster.local",
	}
	golden.Compare(t, "alone.corefile", cfg.corefile())
	cfg.Upstreams = []string{"192.0.2.53", "2001:db8::53"}
	golden.Compare(t, "upstreams.corefile", cfg.corefile())
}

func TestAddressExists(t *testing.T) {
	if !addressExists(netip.MustParseAddr("127.0.0.1")) || addressExists(netip.MustParseAddr("192.0.2.254")) {
		t.Fatal("wrong answer")
	}
}
