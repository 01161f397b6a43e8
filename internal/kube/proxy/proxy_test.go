package proxy

import (
	"net/netip"
	"testing"

	"sigs.k8s.io/yaml"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/testkit/golden"
)

func TestGoldenConfiguration(t *testing.T) {
	text, err := yaml.Marshal(configuration(Config{
		Files:       pki.Files{Dir: "/data/pki", KubeconfigDir: "/data/kubeconfig"},
		StateDir:    "/data/agent",
		NodeName:    "host-1",
		PodCIDR:     netip.MustParsePrefix("10.244.0.0/16"),
		HealthPort:  10256,
		MetricsPort: 10249,
	}))
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "kube-proxy.yaml", string(text))
}
