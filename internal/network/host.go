package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/lease"
	"atoll.dev/atoll/internal/network/nat"
)

// HostConfig describes the node's pod network to Host.
type HostConfig struct {
	// Network is the same as the CNI plugin's configuration is written from.
	Network cniconf.Network
	// Policies, when set, is called with each check and makes what keeps pods without rules from having traffic.
	Policies func(context.Context) error
	// Interval between checks; 30 seconds when zero.
	Interval time.Duration
	Logger   *slog.Logger // slog.Default when nil
}

// Host keeps in order what pods need of the host's network: forwarding, the
// pod bridge with the gateway address, the nftables table, and what the CNI
// plugin made for each pod should somebody remove it.
type Host struct {
	conf HostConfig
	log  *slog.Logger
	// The rest belongs to Setup, which one goroutine calls.
	installed bool            // the table was installed by this Host
	warned    map[string]bool // messages given already
}

// NewHost checks the configuration.
func NewHost(c HostConfig) (*Host, error) {
	n, err := c.Network.Complete()
	if err != nil {
		return nil, err
	}
	c.Network = n
	if c.Interval == 0 {
		c.Interval = 30 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return &Host{conf: c, log: c.Logger, warned: map[string]bool{}}, nil
}

// Run sets the host up, calls ready and then repairs it at every interval,
// until ctx ends. It returns an error when the first set-up fails; later
// failures are logged and tried again.
func (h *Host) Run(ctx context.Context, ready func()) error {
	if err := errors.Join(h.Setup(), h.policies(ctx)); err != nil {
		return err
	}
	ready()
	t := time.NewTicker(h.conf.Interval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := errors.Join(h.Setup(), h.policies(ctx)); err != nil {
				h.log.Error("host network check failed", "err", err)
			}
		}
	}
}

func (h *Host) policies(ctx context.Context) error {
	if h.conf.Policies == nil {
		return nil
	}
	return h.conf.Policies(ctx)
}

// Setup makes or repairs everything once. Pods may start when it returned nil.
// It must not run twice at the same time in one Host.
func (h *Host) Setup() error {
	if err := h.setup(); err != nil {
		return fmt.Errorf("setting up host network: %w", err)
	}
	return nil
}

func (h *Host) setup() error {
	n := h.conf.Network
	store, err := lease.Open(n.StateDir)
	if err != nil {
		return err
	}
	if err := store.ResetAfterBoot(); err != nil {
		return err
	}
	s, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer s.Close()
	_, made, err := gateway.Ensure(s, n)
	if err != nil {
		return err
	}
	if made {
		h.log.Info("pod bridge created", "bridge", n.Bridge, "address", n.Gateway)
	}
	if err := h.forwarding(); err != nil {
		return err
	}
	leases, err := store.List()
	if err != nil {
		return err
	}
	if err := h.attach(s, leases); err != nil {
		return err
	}
	return h.filter(leases)
}

// attach repairs the ways to running pods: deleting the bridge, for one, takes
// the routes that name its address with it.
func (h *Host) attach(s *rtnl.Socket, leases []lease.Lease) error {
	if len(leases) == 0 {
		return nil
	}
	routed, err := gateway.Routed(s)
	if err != nil {
		return err
	}
	for _, l := range leases {
		index, err := rtnl.Index(l.HostIf)
		if errors.Is(err, unix.ENODEV) || err == nil && routed[l.Address] == index {
			continue // the pod is just coming or going, or all is well
		}
		if err != nil {
			return err
		}
		if err := gateway.Attach(s, h.conf.Network, index, l.Address, gateway.Hardware(l.Address, l.MAC)); err != nil {
			return err
		}
		h.log.Warn("route to pod repaired", "interface", l.HostIf, "pod", l.Pod)
	}
	return nil
}

// filter installs the nftables table when it is missing or was changed, with
// the hostPorts of all pods.
func (h *Host) filter(leases []lease.Lease) error {
	cfg := nat.ConfigOf(h.conf.Network)
	ok, err := nat.Installed(cfg)
	if err != nil {
		return err
	}
	// The first time always: an earlier version may have installed other rules.
	if !ok || !h.installed {
		if err := nat.Ensure(cfg); err != nil {
			return err
		}
		for _, l := range leases {
			// One pod's trouble is no reason to leave the others without.
			if err := nat.Add(cfg, nat.Pod{Address: l.Address, Ports: l.HostPorts, Owner: l.Pod}); err != nil {
				h.log.Warn("host ports not restored", "pod", l.Pod, "err", err)
			}
		}
		h.installed = true
		h.log.Info("nftables table installed", "table", cfg.Table)
	}
	if err := nat.AllowForward(gateway.Prefix); err != nil {
		return err
	}
	dropped, err := nat.InputDropped()
	if err != nil {
		return err
	}
	if dropped {
		h.warn("a firewall on this host drops input by default: accept interfaces " + gateway.Prefix + "* to ports 53 and 6443, or pods have no DNS and no API server")
	}
	if b, err := os.ReadFile("/proc/thread-self/net/ip_tables_names"); err == nil && strings.Contains(string(b), "filter") {
		h.warn("iptables rules of the old kernel interface are in use; if their FORWARD policy is DROP, accept interfaces " + gateway.Prefix + "+ there")
	}
	return nil
}

func (h *Host) warn(msg string) {
	if !h.warned[msg] {
		h.warned[msg] = true
		h.log.Warn(msg)
	}
}

// forwarding turns forwarding on and remembers that it was off, for Cleanup.
func (h *Host) forwarding() error {
	const forward = "/proc/sys/net/ipv4/ip_forward"
	old, err := os.ReadFile(forward)
	if err != nil {
		return fmt.Errorf("reading ip_forward: %w", err)
	}
	if strings.TrimSpace(string(old)) != "1" {
		if err := os.WriteFile(filepath.Join(h.conf.Network.StateDir, forwardFile), []byte("0"), 0o600); err != nil {
			return fmt.Errorf("remembering ip_forward: %w", err)
		}
		if err := os.WriteFile(forward, []byte("1"), 0); err != nil {
			return fmt.Errorf("turning on ip_forward: %w", err)
		}
		h.log.Info("IPv4 forwarding turned on")
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/conf/all/arp_ignore"); err == nil && strings.TrimSpace(string(b)) != "0" {
		h.warn("net.ipv4.conf.all.arp_ignore is not 0: pods get no answer to ARP for their gateway; set it to 0")
	}
	return nil
}

// forwardFile, in the state directory, says that forwarding was off before.
const forwardFile = "forwarding-was-off"
