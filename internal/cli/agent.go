package cli

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/agent"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/policy"
	"atoll.dev/atoll/internal/pool/wire"
)

func (a *app) agentCommand() *cobra.Command {
	var f roleFlags
	var maxPods int
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the node agent of this host",
		Long: `Runs the kubelet, the service proxy, CoreDNS and the upkeep of the pod network in
one process on the data directory. "atoll up" does this; there is no need to run
it by hand.`,
		Example: `  atoll agent --node-name host1 --node-ip 192.168.1.10`,
		Hidden:  true,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.newRole(up.Agent, f.nodeIP)
			if err != nil {
				return err
			}
			return r.runAgent(cmd.Context(), f, maxPods, a.version)
		},
	}
	nodeFlags(cmd, &f)
	cmd.Flags().IntVar(&maxPods, "max-pods", 500, "pods this node accepts")
	cmd.Flags().IntVar(&f.portal, "portal-port", up.DefaultPortalPort, "port of the portal, where the registry is")
	balancerFlag(cmd, &f)
	return cmd
}

// runAgent sets up the pod network, then runs the agent and the network's
// upkeep until one of them fails or ctx ends.
func (r role) runAgent(ctx context.Context, f roleFlags, maxPods int, version string) error {
	t := r.tree
	balancers, err := f.loadBalancers()
	if err != nil {
		return err
	}
	policies, err := policy.New(policy.Config{Network: podNetwork(t), Logger: r.logger})
	if err != nil {
		return err
	}
	host, err := network.NewHost(network.HostConfig{Network: podNetwork(t), Policies: policies.Prepare, Logger: r.logger})
	if err != nil {
		return err
	}
	labels := map[string]string{}
	if accel := r.accelerator(ctx, 30*time.Second); accel != "" {
		labels[agent.AcceleratorLabel] = accel
	}
	node, err := agent.New(agent.Config{
		PKIDir:           t.PKI(),
		KubeconfigDir:    t.Kubeconfigs(),
		KubeletDir:       t.Kubelet(),
		PodLogsDir:       t.PodLogs(),
		StateDir:         t.Agent(),
		RunDir:           t.Run(),
		MachinesDir:      t.Machines(),
		LeaseDir:         t.CNIState(),
		DeniedDir:        t.Denied(),
		PolicyStatus:     t.PolicyStatus(),
		Policy:           policies,
		ContentDir:       t.Content(),
		ContainerdSocket: t.ContainerdSocket(),
		RegistriesDir:    t.Registries(),
		CredentialDir:    t.Credentials(),
		Portal:           netip.AddrPortFrom(r.addr, uint16(f.portal)),
		NodeName:         f.nodeName,
		NodeIP:           r.addr,
		NodeLabels:       labels,
		Network:          agent.Network{LoadBalancers: balancers},
		MaxPods:          maxPods,
		CgroupRoot:       t.CgroupRoot(),
		CgroupRecord:     t.CgroupRecord(),
		Version:          version,
		Logger:           r.logger,
		OnReady:          r.ready,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hostReady, ended := make(chan struct{}), make(chan error, 2)
	go func() { ended <- host.Run(ctx, func() { close(hostReady) }) }()
	select {
	case <-hostReady:
	case err := <-ended:
		return err
	}
	go func() { ended <- node.Run(ctx) }()
	err = <-ended
	cancel()
	return errors.Join(err, <-ended)
}

// accelerator asks the pool what runs the processors of micro-VMs, for as long
// as it takes the pool to find out, but not for ever: a node without the label
// is better than none.
func (r role) accelerator(ctx context.Context, limit time.Duration) string {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		status, err := wire.GetStatus(ctx, r.tree.PoolSocket())
		if err == nil && status.Accelerator != "" {
			return status.Accelerator
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			r.logger.Warn("the pool does not say which accelerator it uses; the node has no label for it", "waited", limit)
			return ""
		}
	}
}
