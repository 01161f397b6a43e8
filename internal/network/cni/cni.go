// Package cni is the CNI plugin "atoll": one call makes everything a pod's
// interface needs on this host, with the reference plugins' bridge, host-local,
// portmap, bandwidth and loopback in one process.
//
// It is not a general bridge plugin: it serves Atoll's pod network as package
// network describes it, IPv4 only. The container runtime executes it (as
// atoll-pod, linked to the name "atoll") for every pod; nothing of it stays
// running. Configuration comes from package cniconf.
//
// # What can go wrong
//
// Addresses run out: ADD fails and names the subnet. The address that is kept
// for the pod is another pod's still: ADD fails and names that. A hostPort is taken: ADD
// fails and names the pod that holds it. The call is killed half-way: the
// lease that was written first names everything that may exist, and DEL or GC
// remove it. DEL never fails because something is gone already, the pod's
// network namespace included.
package cni

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/lease"
	"atoll.dev/atoll/internal/network/nat"
)

// codeUnavailable is the CNI error code "plugin not available".
const codeUnavailable = 50

// Main serves the one call that CNI's environment variables and standard
// input describe and returns the process's exit code.
func Main() int {
	funcs := skel.CNIFuncs{Add: add, Del: del, Check: check, GC: gc, Status: status}
	versions := version.PluginSupports("0.4.0", "1.0.0", "1.1.0")
	if err := skel.PluginMainFuncsWithError(funcs, versions, "CNI plugin atoll"); err != nil {
		if err := err.Print(); err != nil {
			fmt.Fprintln(os.Stderr, "writing CNI error:", err)
		}
		return 1
	}
	return 0
}

// call is what every verb needs.
type call struct {
	conf  *cniconf.Plugin
	net   cniconf.Network
	store *lease.Store
}

func begin(stdin []byte) (*call, error) {
	conf, err := cniconf.Parse(stdin)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	store, err := lease.Open(conf.StateDir)
	if err != nil {
		return nil, err
	}
	return &call{conf: conf, net: conf.Network(), store: store}, nil
}

func add(args *skel.CmdArgs) error {
	c, err := begin(args.StdinData)
	if err != nil {
		return err
	}
	ports, err := hostPorts(c.conf.RuntimeConfig.PortMappings)
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	limits := limitsOf(c.conf.RuntimeConfig.Bandwidth)
	pod, err := netns.Open(args.Netns)
	if err != nil {
		return types.NewError(types.ErrInvalidNetNS, err.Error(), "")
	}
	defer pod.Close()

	l := &lease.Lease{
		ContainerID: args.ContainerID, IfName: args.IfName, Netns: args.Netns,
		Pod: podName(args.Args), UID: podArg(args.Args, "K8S_POD_UID"), HostIf: gateway.HostIf(args.ContainerID, args.IfName), HostPorts: ports,
		Key: c.conf.RuntimeConfig.Annotations[machinev1.AddressAnnotation],
	}
	if l.MAC, err = machineMAC(c.conf.RuntimeConfig.Annotations[machinev1.Annotation]); err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	if err := c.store.Add(l, lease.Range{Subnet: c.net.Subnet, Gateway: c.net.Gateway}); err != nil {
		return err
	}
	mtu, err := wire(c.net, l, pod, limits)
	if err == nil {
		err = c.openPorts(l)
	}
	if err != nil {
		return errors.Join(err, c.release(l))
	}
	return types.PrintResult(result(c.net, l, mtu), c.conf.CNIVersion)
}

// openPorts makes the lease's hostPorts lead to the pod.
func (c *call) openPorts(l *lease.Lease) error {
	if len(l.HostPorts) == 0 {
		return nil
	}
	cfg, pod := nat.ConfigOf(c.net), natPod(l)
	err := nat.Add(cfg, pod)
	if errors.Is(err, nat.ErrPortTaken) && c.dropStale(cfg, l.HostPorts) {
		err = nat.Add(cfg, pod)
	}
	if errors.Is(err, nat.ErrNoTable) {
		if err = nat.Ensure(cfg); err == nil {
			err = nat.Add(cfg, pod)
		}
	}
	if err != nil {
		return err
	}
	// Connections of the host to its own 127.0.0.1 leave through this interface.
	path := "/proc/sys/net/ipv4/conf/" + l.HostIf + "/route_localnet"
	if err := os.WriteFile(path, []byte("1"), 0); err != nil {
		return fmt.Errorf("opening host ports on loopback: %w", err)
	}
	return nil
}

func natPod(l *lease.Lease) nat.Pod {
	owner := l.Pod
	if owner == "" {
		owner = l.ContainerID
	}
	return nat.Pod{Address: l.Address, Ports: l.HostPorts, Owner: owner}
}

// release undoes whatever ADD did for a lease, and the lease.
func (c *call) release(l *lease.Lease) error {
	if l.Address.IsValid() {
		if err := nat.Remove(nat.ConfigOf(c.net), natPod(l)); err != nil {
			return err
		}
	}
	if err := unwire(l); err != nil {
		return err
	}
	return c.store.Remove(l.ContainerID, l.IfName)
}

func del(args *skel.CmdArgs) error {
	c, err := begin(args.StdinData)
	if err != nil {
		return err
	}
	l, err := c.store.Get(args.ContainerID, args.IfName)
	if err != nil {
		// No lease, or one nobody can read: what its name tells is removed.
		l = &lease.Lease{
			ContainerID: args.ContainerID, IfName: args.IfName,
			HostIf: gateway.HostIf(args.ContainerID, args.IfName),
		}
	}
	return c.release(l)
}

func gc(args *skel.CmdArgs) error {
	c, err := begin(args.StdinData)
	if err != nil {
		return err
	}
	valid := map[cniconf.Attachment]bool{}
	for _, a := range c.conf.ValidAttachments {
		valid[a] = true
	}
	leases, err := c.store.List()
	if err != nil {
		return err
	}
	for _, l := range leases {
		if valid[cniconf.Attachment{ContainerID: l.ContainerID, IfName: l.IfName}] {
			continue
		}
		err = errors.Join(err, c.release(&l))
	}
	return err
}

func status(args *skel.CmdArgs) error {
	c, err := begin(args.StdinData)
	if err != nil {
		return err
	}
	if _, err := rtnl.Index(c.net.Bridge); err != nil {
		return types.NewError(codeUnavailable, "the pod bridge is not set up", err.Error())
	}
	return nil
}

func check(args *skel.CmdArgs) error {
	c, err := begin(args.StdinData)
	if err != nil {
		return err
	}
	l, err := c.store.Get(args.ContainerID, args.IfName)
	if err != nil {
		return err
	}
	s, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer s.Close()
	host, err := s.LinkByName(l.HostIf)
	if err != nil {
		return fmt.Errorf("checking host end %s: %w", l.HostIf, err)
	}
	routed, err := gateway.Routed(s)
	if err != nil {
		return err
	}
	if routed[l.Address] != host.Attrs().Index {
		return fmt.Errorf("checking host end %s: the route to %s is missing", l.HostIf, l.Address)
	}
	return netns.Do(args.Netns, func() error {
		p, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer p.Close()
		link, err := p.LinkByName(args.IfName)
		if err != nil {
			return fmt.Errorf("checking %s: %w", args.IfName, err)
		}
		if link.Attrs().Flags&net.FlagUp == 0 {
			return fmt.Errorf("checking %s: it is down", args.IfName)
		}
		addrs, err := p.AddrList(link, unix.AF_INET)
		if err != nil {
			return fmt.Errorf("checking %s: %w", args.IfName, err)
		}
		for _, a := range addrs {
			if a.IP.Equal(l.Address.AsSlice()) {
				return nil
			}
		}
		return fmt.Errorf("checking %s: address %s is missing", args.IfName, l.Address)
	})
}

func result(n cniconf.Network, l *lease.Lease, mtu int) *current.Result {
	return &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{
			{Name: l.HostIf, Mac: gateway.MAC(n.Gateway).String(), Mtu: mtu},
			{Name: l.IfName, Mac: gateway.Hardware(l.Address, l.MAC).String(), Mtu: mtu, Sandbox: l.Netns},
		},
		IPs: []*current.IPConfig{{
			Interface: new(1),
			Address:   net.IPNet{IP: l.Address.AsSlice(), Mask: net.CIDRMask(32, 32)},
			Gateway:   n.Gateway.AsSlice(),
		}},
		Routes: []*types.Route{
			{Dst: net.IPNet{IP: n.Gateway.AsSlice(), Mask: net.CIDRMask(32, 32)}},
			{Dst: net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, GW: n.Gateway.AsSlice()},
		},
	}
}
