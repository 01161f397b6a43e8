package controllermanager

import (
	"net/netip"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/testkit/golden"
)

func TestGoldenFlags(t *testing.T) {
	cfg := Config{
		Files:       pki.Files{Dir: "/data/pki", KubeconfigDir: "/data/kubeconfig"},
		Port:        10257,
		PodCIDR:     netip.MustParsePrefix("10.244.0.0/16"),
		NodeMask:    22,
		ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"),
	}
	golden.Compare(t, "flags.txt", strings.Join(cfg.flags(), "\n")+"\n")
}
