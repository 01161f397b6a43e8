// Package controllermanager runs kube-controller-manager in the server process.
//
// It is upstream with upstream options (see flags); leader election is off
// because a cluster has one server. The server role calls Run when the API
// server is ready. What can go wrong: the port is busy, or the API server goes
// away for long; both end Run with an error.
package controllermanager

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/spf13/pflag"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"

	"atoll.dev/atoll/internal/datadir/pki"
)

// Config of a controller manager.
type Config struct {
	Files       pki.Files
	Port        int
	PodCIDR     netip.Prefix
	NodeMask    int
	ServiceCIDR netip.Prefix
}

// flags are the options of kube-controller-manager, in the words of its
// documentation.
func (c Config) flags() []string {
	f := c.Files
	kubeconfig := f.Kubeconfig(pki.ControllerManager)
	return []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", c.Port),
		"--tls-cert-file=" + f.Cert(pki.ControllerManagerServing),
		"--tls-private-key-file=" + f.Key(pki.ControllerManagerServing),
		"--tls-min-version=VersionTLS12",
		"--client-ca-file=" + f.CACert(pki.ClusterCA),
		"--requestheader-client-ca-file=" + f.CACert(pki.FrontProxyCA),
		"--profiling=false",
		"--leader-elect=false",
		"--use-service-account-credentials=true",
		"--service-account-private-key-file=" + f.ServiceAccountKey(),
		"--root-ca-file=" + f.CACert(pki.ClusterCA),
		"--cluster-signing-cert-file=" + f.CACert(pki.ClusterCA),
		"--cluster-signing-key-file=" + f.CAKey(pki.ClusterCA),
		"--allocate-node-cidrs=true",
		"--cluster-cidr=" + c.PodCIDR.String(),
		fmt.Sprintf("--node-cidr-mask-size=%d", c.NodeMask),
		"--service-cluster-ip-range=" + c.ServiceCIDR.String(),
		// Deployments of hundreds of pods must not wait for the client's limit.
		"--kube-api-qps=200",
		"--kube-api-burst=400",
		// A namespace that is being deleted is looked at again after half of the time that its pods may take to end, hours
		// for a virtual machine that is shut down softly; this is sooner.
		"--namespace-sync-period=20s",
		// One node: finished pods are only worth their logs.
		"--terminated-pod-gc-threshold=1000",
	}
}

// Run holds until ctx ends or the controller manager fails.
func Run(ctx context.Context, cfg Config) error {
	opts, err := options.NewKubeControllerManagerOptions()
	if err != nil {
		return fmt.Errorf("configuring controller manager: %w", err)
	}
	all, off, aliases := app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases()
	fs := pflag.NewFlagSet("kube-controller-manager", pflag.ContinueOnError)
	named := opts.Flags(all, off, aliases)
	for _, set := range named.FlagSets {
		fs.AddFlagSet(set)
	}
	if err := fs.Parse(cfg.flags()); err != nil {
		return fmt.Errorf("configuring controller manager: %w", err)
	}
	config, err := opts.Config(ctx, all, off, aliases)
	if err != nil {
		return fmt.Errorf("configuring controller manager: %w", err)
	}
	if err := app.Run(ctx, config.Complete()); err != nil {
		return fmt.Errorf("running controller manager: %w", err)
	}
	return nil
}
