package kubelet

import (
	"net/netip"
	"testing"

	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"
	"sigs.k8s.io/yaml"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/testkit/golden"
)

func testConfig() Config {
	return Config{
		Files:        pki.Files{Dir: "/data/pki", KubeconfigDir: "/data/kubeconfig"},
		Dir:          "/data/kubelet",
		PodLogsDir:   "/data/logs/pods",
		StateDir:     "/data/agent",
		Socket:       "/run/atoll/containerd.sock",
		ImageSocket:  "/run/atoll/images.sock",
		NodeName:     "host-1",
		NodeIP:       netip.MustParseAddr("192.0.2.7"),
		NodeLabels:   map[string]string{"atoll.dev/accelerator": "kvm"},
		MaxPods:      500,
		Port:         10250,
		HealthPort:   10248,
		DNSServiceIP: netip.MustParseAddr("10.96.0.10"),
		Domain:       "cluster.local",
		ResolvConf:   "/etc/resolv.conf",
	}
}

func TestGoldenConfiguration(t *testing.T) {
	for name, c := range map[string]struct {
		groups cgroups
		limits hostLimits
	}{
		"v1.yaml":         {cgroups{}, hostLimits{openFiles: 524288}},
		"v2.yaml":         {cgroups{unified: true}, hostLimits{openFiles: upstreamOpenFiles}},
		"v2-systemd.yaml": {cgroups{unified: true, systemd: true}, hostLimits{openFiles: upstreamOpenFiles}},
	} {
		t.Run(name, func(t *testing.T) {
			kc := configuration(testConfig(), c.groups, c.limits)
			text, err := yaml.Marshal(kc)
			if err != nil {
				t.Fatal(err)
			}
			golden.Compare(t, name, string(text))
			internal, err := internalConfiguration(kc)
			if err != nil {
				t.Fatal(err)
			}
			if err := validation.ValidateKubeletConfiguration(internal, utilfeature.DefaultFeatureGate); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestGoldenCredentials(t *testing.T) {
	text, err := yaml.Marshal(credentials([]string{"registry.atoll.local", "192.0.2.7"}))
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "credential-providers.yaml", string(text))
}

func TestFlags(t *testing.T) {
	cfg := testConfig()
	f := flags(cfg)
	f.NodeLabels["x"] = "y"
	if _, leaked := cfg.NodeLabels["x"]; leaked {
		t.Error("the labels of the configuration are shared")
	}
	if f.HostnameOverride != "host-1" || f.NodeIP != "192.0.2.7" || f.RootDirectory != "/data/kubelet" {
		t.Errorf("flags %+v", f)
	}
}
