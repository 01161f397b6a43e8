package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/kube/containerd"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/preflight"
	"atoll.dev/atoll/internal/server"
	"atoll.dev/atoll/internal/storage/stores"
)

// roleFlags are the flags of the roles that know the node.
type roleFlags struct {
	nodeName string
	nodeIP   string
	tlsSANs  []string
	portal   int
	balancer string // addresses of load balancers
}

// role is what a role's command needs to run.
type role struct {
	tree   datadir.Tree
	logger *slog.Logger
	addr   netip.Addr
	// ready makes the mark that tells `atoll up` that the role does its work.
	ready func()
}

// roleCommands are the processes that `atoll up` starts. They are commands of
// their own so that each can be run and looked at alone.
func (a *app) roleCommands() []*cobra.Command {
	return []*cobra.Command{a.containerdCommand(), a.serverCommand(), a.agentCommand()}
}

// newRole prepares what all roles need.
func (a *app) newRole(name, nodeIP string) (role, error) {
	t, err := a.tree()
	if err != nil {
		return role{}, err
	}
	logger, err := a.logger(a.ErrOut)
	if err != nil {
		return role{}, err
	}
	// The process runs from /proc/self/exe; "exe" is not what ps should call it.
	if err := os.WriteFile("/proc/self/comm", []byte("atoll-"+name), 0); err != nil {
		logger.Warn("naming the process failed", "error", err)
	}
	r := role{tree: t, logger: logger}
	if nodeIP != "" {
		if r.addr, err = netip.ParseAddr(nodeIP); err != nil {
			return role{}, command.UsageError{Err: fmt.Errorf("--node-ip: %w", err)}
		}
	}
	if err := t.Create(); err != nil {
		return role{}, fmt.Errorf("preparing the data directory: %w", err)
	}
	r.ready = func() {
		if err := atomicfile.Write(t.ReadyMark(name), nil, 0o600); err != nil {
			logger.Error("making the ready mark failed", "error", err)
		}
	}
	return r, nil
}

// nodeFlags adds the flags of the roles that know the node.
func nodeFlags(cmd *cobra.Command, f *roleFlags) {
	cmd.Flags().StringVar(&f.nodeName, "node-name", "", "name of this host's Node (required)")
	cmd.Flags().StringVar(&f.nodeIP, "node-ip", "", "IPv4 address of this host (required)")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if f.nodeName == "" || f.nodeIP == "" {
			return command.UsageError{Err: errors.New("--node-name and --node-ip are required")}
		}
		return nil
	}
}

// balancerFlag adds the flag of the roles that know the addresses of load balancers.
func balancerFlag(cmd *cobra.Command, f *roleFlags) {
	cmd.Flags().StringVar(&f.balancer, "load-balancer-range", "", "addresses of load balancers (default 10.97.0.0/24)")
}

// loadBalancers are the addresses of load balancers, invalid for the built-in ones.
func (f roleFlags) loadBalancers() (p netip.Prefix, err error) {
	if f.balancer == "" {
		return p, nil
	}
	if p, err = netip.ParsePrefix(f.balancer); err != nil {
		return p, command.UsageError{Err: fmt.Errorf("--load-balancer-range: %w", err)}
	}
	return p, nil
}

func (a *app) containerdCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "containerd",
		Short: "Run the container runtime of this host",
		Long: `Runs containerd, with Atoll's storage of image layers built in, on the data
directory. "atoll up" does this; there is no need to run it by hand. Registries
are configured in <data-dir>/registries/<host>/hosts.toml.`,
		Example: `  atoll containerd --data-dir /var/lib/atoll`,
		Hidden:  true,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.newRole(up.Containerd, "")
			if err != nil {
				return err
			}
			return r.runContainerd(cmd.Context())
		},
	}
}

func (r role) runContainerd(ctx context.Context) error {
	t := r.tree
	if err := cniconf.Write(t.CNIConf(), podNetwork(t)); err != nil {
		return err
	}
	runc, err := preflight.LookPath("runc")
	if err != nil {
		return fmt.Errorf("looking for runc: %w", err)
	}
	if runc, err = filepath.Abs(runc); err != nil {
		return fmt.Errorf("looking for runc: %w", err)
	}
	daemon, err := containerd.New(containerd.Config{
		ConfigFile:       t.ContainerdConfig(),
		Root:             t.Containerd(),
		State:            t.ContainerdState(),
		Address:          t.ContainerdSocket(),
		SocketDir:        t.ShimSockets(),
		BinDir:           t.Bin(),
		RuncBinary:       runc,
		CNIBinDir:        t.CNIBin(),
		CNIConfDir:       t.CNIConf(),
		RegistryDir:      t.Registries(),
		PauseArchive:     t.PauseImage(),
		RestrictOOMScore: preflight.HasCapability(unix.CAP_SYS_RESOURCE) != nil,
	}, r.logger)
	if err != nil {
		return err
	}
	go func() {
		select {
		case <-daemon.Ready():
			r.ready()
		case <-ctx.Done():
		}
	}()
	return daemon.Run(ctx)
}

// podNetwork is the network pods of this host are in.
func podNetwork(t datadir.Tree) cniconf.Network {
	return cniconf.Network{
		Subnet:      netip.MustParsePrefix(nodeCIDR),
		Gateway:     netip.MustParseAddr(gatewayIP),
		ClusterCIDR: netip.MustParsePrefix(podCIDR),
		StateDir:    t.CNIState(),
	}
}

func (a *app) serverCommand() *cobra.Command {
	var f roleFlags
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the control plane",
		Long: `Runs etcd, the API server, the controller manager and the scheduler in one
process on the data directory. "atoll up" does this; there is no need to run it
by hand.`,
		Example: `  atoll server --node-name host1 --node-ip 192.168.1.10`,
		Hidden:  true,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.newRole(up.Server, f.nodeIP)
			if err != nil {
				return err
			}
			t := r.tree
			var network server.Network
			if network.LoadBalancers, err = f.loadBalancers(); err != nil {
				return err
			}
			s, err := server.New(server.Config{
				PKIDir:          t.PKI(),
				KubeconfigDir:   t.Kubeconfigs(),
				EtcdDir:         t.Etcd(),
				StateDir:        t.Server(),
				AuditLog:        filepath.Join(t.Audit(), "audit.log"),
				AdminKubeconfig: t.AdminKubeconfig(),
				DatastorePath:   t.Datastore(stores.Default),
				ContentDir:      t.Content(),
				RegistryDir:     t.Registry(),
				NodeName:        f.nodeName,
				NodeIP:          r.addr,
				ExtraSANs:       f.tlsSANs,
				Ports:           server.Ports{Portal: f.portal},
				Network:         network,
				Version:         a.version,
				Logger:          r.logger,
				OnReady:         r.ready,
			})
			if err != nil {
				return err
			}
			return s.Run(cmd.Context())
		},
	}
	nodeFlags(cmd, &f)
	cmd.Flags().StringSliceVar(&f.tlsSANs, "tls-san", nil, "further name or address of the API server and the portal; may be repeated")
	cmd.Flags().IntVar(&f.portal, "portal-port", 0, "port that people log in at and push images to (default 443)")
	balancerFlag(cmd, &f)
	return cmd
}
