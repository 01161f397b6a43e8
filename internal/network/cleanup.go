package network

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/lease"
	"atoll.dev/atoll/internal/network/nat"
)

// CleanupConfig says what to remove.
type CleanupConfig struct {
	// Network names the bridge and the state directory; the rest of it may be
	// zero. Without a subnet that of the bridge is used.
	Network cniconf.Network
	// NetnsDirs are directories of network namespace files: the pool's and
	// the container runtime's. Everything in them is removed, and they.
	NetnsDirs []string
	// Tables are nftables tables of others to delete, kube-proxy's for one.
	Tables []string
	// CNICacheDir is where the runtime's CNI library remembers results,
	// /var/lib/cni when empty. Only this network's files are removed.
	CNICacheDir string
	Logger      *slog.Logger // slog.Default when nil
}

// Cleanup removes everything the pods, the CNI plugin and Host left on the
// host's network, in any state it may be in. Pods must have ended: a namespace
// or tap that a process still holds goes away with that process. It does as
// much as it can and returns what failed; when nothing is there it does
// nothing.
func Cleanup(c CleanupConfig) error {
	if c.Network.Bridge == "" {
		c.Network.Bridge = cniconf.DefaultBridge
	}
	if c.Network.Name == "" {
		c.Network.Name = cniconf.DefaultName
	}
	if c.CNICacheDir == "" {
		c.CNICacheDir = "/var/lib/cni"
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	err := errors.Join(
		removeLinks(c.Network),
		removeNamespaces(c.NetnsDirs),
		nat.ForgetForward(gateway.Prefix),
		nat.DeleteTables(append([]string{nat.ConfigOf(c.Network).Table}, c.Tables...)...),
		restoreForwarding(c),
		removeCache(c),
	)
	if c.Network.StateDir != "" {
		err = errors.Join(err, lease.Clear(c.Network.StateDir))
	}
	if err != nil {
		return fmt.Errorf("cleaning up network: %w", err)
	}
	return nil
}

// removeLinks deletes the bridge and the host ends of pods: those that leases
// name, and those whose route says that a pod of the subnet is behind them.
func removeLinks(n cniconf.Network) error {
	s, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer s.Close()
	links, err := s.LinkList()
	if err != nil {
		return fmt.Errorf("listing interfaces: %w", err)
	}
	ours, err := leased(n.StateDir)
	if err != nil {
		return err
	}
	routed, err := gateway.Routed(s)
	if err != nil {
		return err
	}
	if !n.Subnet.IsValid() {
		n.Subnet = bridgeSubnet(s, n.Bridge)
	}
	podWire := map[int]bool{}
	for a, index := range routed {
		podWire[index] = podWire[index] || n.Subnet.IsValid() && n.Subnet.Contains(a)
	}
	var doomed []int
	for _, l := range links {
		a := l.Attrs()
		wire := l.Type() == "veth" && (ours[a.Name] || podWire[a.Index] && strings.HasPrefix(a.Name, gateway.Prefix))
		if wire || a.Name == n.Bridge && l.Type() == "bridge" {
			doomed = append(doomed, a.Index)
		}
	}
	if err := s.DeleteLinks(doomed); err != nil {
		return fmt.Errorf("removing interfaces: %w", err)
	}
	return nil
}

// bridgeSubnet is the pod subnet as the bridge's address tells it.
func bridgeSubnet(s *rtnl.Socket, name string) netip.Prefix {
	link, err := s.LinkByName(name)
	if err != nil {
		return netip.Prefix{}
	}
	addrs, err := s.AddrList(link, unix.AF_INET)
	if err != nil || len(addrs) == 0 {
		return netip.Prefix{}
	}
	p, _ := prefixOf(addrs[0].IPNet)
	return p.Masked()
}

// leased returns the host ends that leases name.
func leased(dir string) (map[string]bool, error) {
	ours := map[string]bool{}
	if _, err := os.Stat(dir); err != nil {
		return ours, nil
	}
	store, err := lease.Open(dir)
	if err != nil {
		return nil, err
	}
	leases, err := store.List()
	if err != nil {
		return nil, err
	}
	for _, l := range leases {
		ours[l.HostIf] = true
	}
	return ours, nil
}

func removeNamespaces(dirs []string) error {
	var errs error
	for _, d := range dirs {
		entries, err := os.ReadDir(d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("listing network namespaces: %w", err))
			continue
		}
		for _, e := range entries {
			errs = errors.Join(errs, netns.Remove(filepath.Join(d, e.Name())))
		}
		if err := os.Remove(d); err != nil {
			errs = errors.Join(errs, fmt.Errorf("removing directory of network namespaces: %w", err))
		}
	}
	return errs
}

// restoreForwarding turns forwarding off when Host turned it on, unless the
// host has other virtual networks that may have come to need it.
func restoreForwarding(c CleanupConfig) error {
	if c.Network.StateDir == "" {
		return nil
	}
	if _, err := os.Stat(filepath.Join(c.Network.StateDir, forwardFile)); err != nil {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("listing interfaces: %w", err)
	}
	for _, l := range links {
		switch l.Type() {
		case "bridge", "veth", "tuntap", "wireguard", "vxlan":
			c.Logger.Warn("IPv4 forwarding was off before Atoll and is left on: other virtual networks may need it",
				"interface", l.Attrs().Name)
			return nil
		}
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		return fmt.Errorf("turning off ip_forward: %w", err)
	}
	return nil
}

// removeCache deletes the CNI library's results of this network.
func removeCache(c CleanupConfig) error {
	dir := filepath.Join(c.CNICacheDir, "results")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing CNI results: %w", err)
	}
	var errs error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), c.Network.Name+"-") {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = errors.Join(errs, fmt.Errorf("removing CNI result: %w", err))
			}
		}
	}
	// Directories others still use are not empty.
	_ = os.Remove(dir)
	_ = os.Remove(c.CNICacheDir)
	return errs
}
