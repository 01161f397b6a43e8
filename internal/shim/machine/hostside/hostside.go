// Package hostside is the real host of a virtual machine's shim: the engine, the network, the agent. It only passes
// calls on, so that package machine can be tested without any of them.
//
// internal/shim/daemon wires it. What can go wrong: what the packages behind it say.
package hostside

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/dhcp"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/machine"
	"atoll.dev/atoll/internal/vm/hardware"
	"atoll.dev/atoll/internal/vm/swtpm"
)

// QEMU is the engine that there is.
type QEMU struct{}

// Start implements machine.Engine.
func (QEMU) Start(ctx context.Context, cfg hardware.Config) (machine.Hardware, error) {
	m, err := hardware.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// StartTPM implements machine.Engine.
func (QEMU) StartTPM(ctx context.Context, cfg swtpm.Config) (machine.TPM, error) {
	t, err := swtpm.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Network is the network that there is.
type Network struct{}

// NewTap implements machine.Network. The namespace of the pool may not be there yet.
func (Network) NewTap(poolNetns, name string) (network.Tap, error) {
	if err := network.CreatePoolNetns(poolNetns); err != nil {
		return network.Tap{}, err
	}
	return network.NewTap(poolNetns, name)
}

// JoinTap implements machine.Network.
func (Network) JoinTap(netns string, tap network.Tap) (network.Guest, error) {
	return network.JoinTap(netns, tap)
}

// NewBridgeTap implements machine.Network.
func (Network) NewBridgeTap(name, bridge string, vlan int) (*os.File, error) {
	return network.NewBridgeTap(name, bridge, vlan)
}

// ServeDHCP implements machine.Network.
func (Network) ServeDHCP(ctx context.Context, netns string, c dhcp.Config) error {
	return dhcp.Serve(ctx, netns, network.PodTap, c)
}

// dialTimeout bounds how long the guest may take to accept a forwarded connection.
const dialTimeout = 90 * time.Second

// ServePortForward implements machine.Network. The guest is reached from the host: in the pod's namespace the address is the
// interface's, behind which the guest is.
func (Network) ServePortForward(ctx context.Context, netns, address string) error {
	return network.ServePortForward(ctx, netns, func(ctx context.Context, port uint16) (net.Conn, error) {
		d := net.Dialer{Timeout: dialTimeout}
		return d.DialContext(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(int(port))))
	})
}

// Agent is the agent that there is.
type Agent struct{ RunDir string }

// Open implements machine.Agent.
func (a Agent) Open(ctx context.Context, r attach.OpenRequest) (attach.Opened, error) {
	return disks.Ask(ctx, a.RunDir, r)
}

// closeTimeout bounds how long the agent may take to hear that a volume is closed; it notices by itself later.
const closeTimeout = 10 * time.Second

// Close implements machine.Agent.
func (a Agent) Close(ctx context.Context, r attach.OpenRequest) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	return attach.Call(ctx, attach.AgentSocket(a.RunDir), attach.MethodClose, r, nil)
}

// Snapshots implements machine.Agent.
func (a Agent) Snapshots(ctx context.Context, r attach.SnapshotsRequest) error {
	if err := attach.Call(ctx, attach.AgentSocket(a.RunDir), attach.MethodSnapshots, r, nil); err != nil {
		return fmt.Errorf("taking snapshots of disks: %w", err)
	}
	return nil
}
