// Package proxy runs kube-proxy (nftables mode) in the agent process.
//
// It is upstream with a KubeProxyConfiguration built here, which upstream insists
// on reading from a file. It changes nothing on the host but its own nftables
// tables: connection tracking limits and other sysctls stay as the administrator
// set them. The agent role calls Run when the Node object exists. What can go
// wrong: the nft program is missing or the kernel lacks nftables; that ends Run
// with an error. Rules stay in place when the agent ends, so that running pods
// keep their Services.
package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	componentbaseconfig "k8s.io/component-base/config/v1alpha1"
	logsapi "k8s.io/component-base/logs/api/v1"
	proxyv1alpha1 "k8s.io/kube-proxy/config/v1alpha1"
	"k8s.io/kubernetes/cmd/kube-proxy/app"
	"sigs.k8s.io/yaml"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/datadir/pki"
)

// Config of a proxy.
type Config struct {
	Files pki.Files
	// StateDir holds the generated configuration.
	StateDir    string
	NodeName    string
	PodCIDR     netip.Prefix
	HealthPort  int
	MetricsPort int
}

// configuration is the proxy's configuration; what is not set has upstream's
// default.
func configuration(cfg Config) *proxyv1alpha1.KubeProxyConfiguration {
	var zero int32
	return &proxyv1alpha1.KubeProxyConfiguration{
		TypeMeta:           metav1.TypeMeta{APIVersion: proxyv1alpha1.SchemeGroupVersion.String(), Kind: "KubeProxyConfiguration"},
		Mode:               "nftables",
		HostnameOverride:   cfg.NodeName,
		HealthzBindAddress: fmt.Sprintf("127.0.0.1:%d", cfg.HealthPort),
		MetricsBindAddress: fmt.Sprintf("127.0.0.1:%d", cfg.MetricsPort),
		ClientConnection:   componentbaseconfig.ClientConnectionConfiguration{Kubeconfig: cfg.Files.Kubeconfig(pki.KubeProxy)},
		DetectLocalMode:    "ClusterCIDR",
		ClusterCIDR:        cfg.PodCIDR.String(),
		Conntrack: proxyv1alpha1.KubeProxyConntrackConfiguration{
			MaxPerCore:            &zero,
			Min:                   &zero,
			TCPEstablishedTimeout: &metav1.Duration{},
			TCPCloseWaitTimeout:   &metav1.Duration{},
		},
		Logging: logsapi.LoggingConfiguration{Format: "text"},
	}
}

// Run starts the proxy. Upstream has no way to stop it, so when ctx ends Run
// returns and leaves it to the end of the process.
func Run(ctx context.Context, cfg Config) error {
	text, err := yaml.Marshal(configuration(cfg))
	if err != nil {
		return fmt.Errorf("configuring proxy: %w", err)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("configuring proxy: %w", err)
	}
	opts := app.NewOptions()
	opts.ConfigFile = filepath.Join(cfg.StateDir, "kube-proxy.yaml")
	if _, err := atomicfile.WriteIfChanged(opts.ConfigFile, text, 0o600); err != nil {
		return fmt.Errorf("configuring proxy: %w", err)
	}
	fs := pflag.NewFlagSet("kube-proxy", pflag.ContinueOnError)
	opts.AddFlags(fs)
	if err := opts.Complete(fs); err != nil {
		return fmt.Errorf("configuring proxy: %w", err)
	}
	if err := opts.Validate(); err != nil {
		return fmt.Errorf("configuring proxy: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- opts.Run(ctx) }()
	select {
	case <-ctx.Done():
		return nil
	case err := <-ended:
		if err == nil || ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("running proxy: %w", err)
	}
}
