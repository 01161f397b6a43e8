package up

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/pool/config"
	"atoll.dev/atoll/internal/pool/wire"
	machines "atoll.dev/atoll/internal/shim/machine/config"
	"atoll.dev/atoll/internal/supervise"
	"atoll.dev/atoll/internal/vm/podkernel"
)

// Names of the child processes, in the order they are started.
const (
	Containerd = "containerd"
	Pool       = "pool"
	Server     = "server"
	Agent      = "agent"
)

// services lists the child processes.
func (u *Up) services() ([]supervise.Service, error) {
	t, s := u.cfg.Tree, u.cfg.Settings
	addr, err := s.Address()
	if err != nil {
		return nil, err
	}
	common := []string{"--data-dir=" + t.Root(), "--log-format=" + s.LogFormat}
	node := []string{"--node-name=" + s.NodeName, "--node-ip=" + addr.String()}
	server := append(slices.Clip(node), "--portal-port="+strconv.Itoa(s.PortalPort))
	for _, san := range s.TLSSANs {
		server = append(slices.Clip(server), "--tls-san="+san)
	}
	agent := append(slices.Clip(node), "--max-pods="+strconv.Itoa(s.MaxPods), "--portal-port="+strconv.Itoa(s.PortalPort))
	if s.LoadBalancerRange != "" {
		flag := "--load-balancer-range=" + s.LoadBalancerRange
		server, agent = append(slices.Clip(server), flag), append(slices.Clip(agent), flag)
	}
	pool := supervise.Service{
		Name: Pool,
		Process: &supervise.Process{
			Path: t.AtollPod(), Args: []string{"atoll-pod", "pool", "--config=" + t.PoolConfig()},
			Log: t.Log(Pool), Prepare: u.preparePool(),
		},
		Ready: u.poolAnswers,
	}
	return []supervise.Service{
		u.role(Containerd, nil, common, nil),
		pool,
		u.role(Server, nil, common, server),
		u.role(Agent, []string{Containerd, Server}, common, agent),
	}, nil
}

// role is a child process that is this same binary. It is started from
// /proc/self/exe, so that it is the same even if the file was replaced.
func (u *Up) role(name string, after, common, flags []string) supervise.Service {
	t := u.cfg.Tree
	ready, prepare := markReady(t.ReadyMark(name))
	return supervise.Service{
		Name: name, After: after, Ready: ready,
		Process: &supervise.Process{
			Path: "/proc/self/exe", Args: slices.Concat([]string{"atoll", name}, common, flags),
			Log: t.Log(name), Prepare: prepare, StopTimeout: time.Minute,
		},
	}
}

// preparePool returns what precedes each start of the pool. A pool that is started again may have died
// of a damaged kernel or helper, so these are looked at again.
func (u *Up) preparePool() func() error {
	again := false
	return func() error {
		if again {
			if err := u.extractAssets(); err != nil {
				return err
			}
		}
		again = true
		return u.writePoolConfig()
	}
}

// writePoolConfig writes the configuration file of the pool.
func (u *Up) writePoolConfig() error {
	t, s := u.cfg.Tree, u.cfg.Settings
	kernel := podkernel.Kernel{Path: t.Kernel()}
	if s.Kernel != "" {
		var err error
		if kernel, err = podkernel.Find(s.Kernel); err != nil {
			return fmt.Errorf("looking at the kernel of --kernel: %w", err)
		}
	}
	b, err := json.MarshalIndent(config.Config{
		RunDir: t.Run(), DataDir: t.Pool(), Binary: t.AtollPod(), Kernel: kernel.Path, Modules: kernel.Modules, ExecHelper: t.ExecHelper(),
		Kubelet: t.Kubelet(), Containerd: t.Containerd(), Warm: &s.PoolSize, Accelerator: s.Accelerator,
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the pool's configuration: %w", err)
	}
	if _, err := atomicfile.WriteIfChanged(t.PoolConfig(), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the pool's configuration: %w", err)
	}
	return nil
}

// writeMachinesConfig writes the configuration file of the shims of virtual machines.
func (u *Up) writeMachinesConfig() error {
	t := u.cfg.Tree
	b, err := json.MarshalIndent(machines.Config{
		RunDir: t.Run(), DataDir: t.Machines(), Binary: t.AtollPod(), Kubelet: t.Kubelet(), Accelerator: u.cfg.Settings.Accelerator,
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the configuration of virtual machines: %w", err)
	}
	if _, err := atomicfile.WriteIfChanged(machines.File(t.Run()), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the configuration of virtual machines: %w", err)
	}
	return nil
}

// poolAnswers returns nil when the pool works, and its own problem otherwise.
func (u *Up) poolAnswers(ctx context.Context) error {
	status, err := wire.GetStatus(ctx, u.cfg.Tree.PoolSocket())
	if err != nil {
		return err
	}
	if status.Error != "" {
		return errors.New(status.Error)
	}
	return nil
}

// Kind is a set of an instance's processes.
type Kind int

// The kinds.
const (
	// Services are the children of `up`, which may be ended at any time.
	Services Kind = 1 << iota
	// Supervisor is `up` itself and its keeper.
	Supervisor
	// Pods are the shims; QEMU processes die with them.
	Pods
)

// OwnProcesses finds the processes of a data directory by what they run: a role
// with the data directory in its arguments, or a binary below it.
func OwnProcesses(t datadir.Tree, kinds Kind) ([]process.Info, error) {
	all, err := process.List()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(i process.Info) bool { return kindOf(t, i)&kinds == 0 }), nil
}

// IsOwn tells whether a process belongs to the data directory.
func IsOwn(t datadir.Tree, i process.Info) bool { return kindOf(t, i) != 0 }

func kindOf(t datadir.Tree, i process.Info) Kind {
	if len(i.Args) < 2 {
		return 0
	}
	role := i.Args[1]
	switch {
	case filepath.Dir(i.Exe) == t.Bin() && i.Exe != t.Atoll(), i.Exe == t.CNIPlugin():
		if role == "pool" {
			return Services
		}
		return Pods
	case filepath.Base(i.Args[0]) != "atoll" || !hasDataDir(i.Args, t.Root()):
		return 0
	case slices.Contains([]string{Containerd, Server, Agent}, role):
		return Services
	case role == "up", role == "keeper":
		return Supervisor
	}
	return 0
}

// hasDataDir looks for --data-dir in an argv. Without the flag the process
// works on the default data directory.
func hasDataDir(args []string, root string) bool {
	for at, arg := range args {
		if value, ok := strings.CutPrefix(arg, "--data-dir="); ok {
			return filepath.Clean(value) == root
		}
		if arg == "--data-dir" && at+1 < len(args) {
			return filepath.Clean(args[at+1]) == root
		}
	}
	return root == datadir.DefaultRoot
}
