// Package scheduler runs kube-scheduler in the server process.
//
// It is upstream with upstream options (see flags); leader election is off
// because a cluster has one server. The server role calls Run when the API
// server is ready. What can go wrong: the port is busy; that ends Run with an
// error.
package scheduler

import (
	"context"
	"fmt"

	"github.com/spf13/pflag"
	"k8s.io/kubernetes/cmd/kube-scheduler/app"
	"k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"atoll.dev/atoll/internal/datadir/pki"
)

// Config of a scheduler.
type Config struct {
	Files pki.Files
	Port  int
}

// flags are the options of kube-scheduler, in the words of its documentation.
func (c Config) flags() []string {
	f := c.Files
	kubeconfig := f.Kubeconfig(pki.Scheduler)
	return []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", c.Port),
		"--tls-cert-file=" + f.Cert(pki.SchedulerServing),
		"--tls-private-key-file=" + f.Key(pki.SchedulerServing),
		"--tls-min-version=VersionTLS12",
		"--client-ca-file=" + f.CACert(pki.ClusterCA),
		"--requestheader-client-ca-file=" + f.CACert(pki.FrontProxyCA),
		"--kube-api-qps=200",
		"--kube-api-burst=400",
		"--profiling=false",
		"--leader-elect=false",
	}
}

// Run holds until ctx ends or the scheduler fails.
func Run(ctx context.Context, cfg Config) error {
	opts := options.NewOptions()
	fs := pflag.NewFlagSet("kube-scheduler", pflag.ContinueOnError)
	for _, set := range opts.Flags.FlagSets {
		fs.AddFlagSet(set)
	}
	if err := fs.Parse(cfg.flags()); err != nil {
		return fmt.Errorf("configuring scheduler: %w", err)
	}
	config, scheduler, err := app.Setup(ctx, opts)
	if err != nil {
		return fmt.Errorf("configuring scheduler: %w", err)
	}
	err = app.Run(ctx, config, scheduler)
	if ctx.Err() != nil {
		// Run reports an error even when it was told to stop.
		return nil
	}
	return fmt.Errorf("running scheduler: %w", err)
}
