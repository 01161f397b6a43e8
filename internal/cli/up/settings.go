package up

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// bridgeName is the bridge pods are connected to; its address is not the host's.
const bridgeName = "atoll0"

// DefaultPortalPort is that of HTTPS.
const DefaultPortalPort = 443

// Settings are what the user may choose for a host. They are kept in the data
// directory, so that a later start without flags uses the same ones.
type Settings struct {
	// NodeName is the name of the Node object. It cannot change once the
	// cluster exists.
	NodeName string `json:"nodeName"`
	// NodeIP is the address of this host for others; "" means the one of the
	// default route, looked up at every start.
	NodeIP string `json:"nodeIP,omitempty"`
	// PoolSize is the number of micro-VMs that are kept ready.
	PoolSize int `json:"poolSize"`
	// MaxPods is how many pods the node accepts.
	MaxPods int `json:"maxPods"`
	// PortalPort is where people log in and push images to.
	PortalPort int `json:"portalPort"`
	// TLSSANs are more names or addresses of the API server and the portal.
	TLSSANs []string `json:"tlsSANs,omitempty"`
	// LoadBalancerRange are addresses for load balancers of virtual machines, "" for the built-in range.
	LoadBalancerRange string `json:"loadBalancerRange,omitempty"`
	// Accelerator is auto, kvm or tcg.
	Accelerator string `json:"accelerator"`
	// Kernel is the path of the kernel that pods run on, "" for the built-in one.
	Kernel string `json:"kernel,omitempty"`
	// LogFormat is text or json.
	LogFormat string `json:"logFormat"`
}

// Defaults returns the settings of a host nobody has chosen anything for.
func Defaults() (Settings, error) {
	name, err := os.Hostname()
	if err != nil {
		return Settings{}, fmt.Errorf("finding the host's name: %w", err)
	}
	return Settings{
		NodeName: strings.ToLower(name), PoolSize: 4, MaxPods: 500, PortalPort: DefaultPortalPort,
		Accelerator: "auto", LogFormat: "text",
	}, nil
}

// LoadSettings reads settings over the ones given; a missing file changes
// nothing. It reports whether there was a file.
func LoadSettings(path string, into *Settings) (bool, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading the settings: %w", err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return false, fmt.Errorf("reading the settings in %s: %w", path, err)
	}
	return true, nil
}

// Save writes the settings.
func (s Settings) Save(path string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the settings: %w", err)
	}
	if _, err := atomicfile.WriteIfChanged(path, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the settings: %w", err)
	}
	return nil
}

// Validate says what is wrong with the settings, all of it at once.
func (s Settings) Validate() error {
	var errs []error
	// What Kubernetes takes as the name of a Node and as a label value.
	name := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	if len(s.NodeName) > 63 || !name.MatchString(s.NodeName) {
		errs = append(errs, fmt.Errorf("--node-name %q: use up to 63 lower-case letters, digits, '-' and '.'", s.NodeName))
	}
	if s.NodeIP != "" {
		if ip, err := netip.ParseAddr(s.NodeIP); err != nil || !ip.Is4() || ip.IsLoopback() || ip.IsUnspecified() {
			errs = append(errs, fmt.Errorf("--node-ip %q: use an IPv4 address of this host that is not a loopback address", s.NodeIP))
		}
	}
	if s.PoolSize < 0 || s.PoolSize > 64 {
		errs = append(errs, fmt.Errorf("--pool-size %d: use 0 to 64", s.PoolSize))
	}
	if s.MaxPods < 1 || s.MaxPods > 1000 {
		errs = append(errs, fmt.Errorf("--max-pods %d: use 1 to 1000", s.MaxPods))
	}
	if s.PortalPort < 1 || s.PortalPort > 65535 {
		errs = append(errs, fmt.Errorf("--portal-port %d: use 1 to 65535", s.PortalPort))
	}
	if p, err := netip.ParsePrefix(s.LoadBalancerRange); s.LoadBalancerRange != "" && (err != nil || !p.Addr().Is4() || p.Bits() > 30 || p != p.Masked()) {
		errs = append(errs, fmt.Errorf("--load-balancer-range %q: use an IPv4 network of 4 or more addresses, as in 192.0.2.64/28", s.LoadBalancerRange))
	}
	switch s.Accelerator {
	case "auto", "kvm", "tcg":
	default:
		errs = append(errs, fmt.Errorf("--accelerator %q: use auto, kvm or tcg", s.Accelerator))
	}
	if s.Kernel != "" && !filepath.IsAbs(s.Kernel) {
		errs = append(errs, fmt.Errorf("--kernel %q: use an absolute path, or \"\" for the built-in kernel", s.Kernel))
	}
	switch s.LogFormat {
	case "text", "json":
	default:
		errs = append(errs, fmt.Errorf("--log-format %q: use text or json", s.LogFormat))
	}
	return errors.Join(errs...)
}

// Address returns the node's address: the chosen one, or the source address of
// the default route, or the only global address of the host.
func (s Settings) Address() (netip.Addr, error) {
	if s.NodeIP != "" {
		return netip.ParseAddr(s.NodeIP)
	}
	if ip, ok := routeSource(); ok {
		return ip, nil
	}
	links, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("listing the host's interfaces: %w", err)
	}
	for _, link := range links {
		addrs, err := link.Addrs()
		if err != nil || link.Name == bridgeName {
			continue
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
				return p.Addr(), nil
			}
		}
	}
	return netip.Addr{}, errors.New("the host has no IPv4 address but loopback; give it one or name one with --node-ip")
}

// PortalOf is where people log in at the supervisor of a data directory, as they give it to --server.
func PortalOf(t datadir.Tree) string {
	s := Settings{PortalPort: DefaultPortalPort}
	if _, err := LoadSettings(t.Settings(), &s); err != nil {
		return "ADDRESS"
	}
	addr, err := s.Address()
	if err != nil {
		return "ADDRESS"
	}
	if s.PortalPort == DefaultPortalPort {
		return addr.String()
	}
	return netip.AddrPortFrom(addr, uint16(s.PortalPort)).String()
}

// routeSource asks the kernel which address it would use for the world. No
// packet is sent.
func routeSource() (netip.Addr, bool) {
	routes, err := netlink.RouteGet(net.IPv4(192, 0, 2, 1))
	if err != nil {
		return netip.Addr{}, false
	}
	for _, r := range routes {
		if ip, ok := netip.AddrFromSlice(r.Src.To4()); ok && ip.IsGlobalUnicast() {
			return ip, true
		}
	}
	return netip.Addr{}, false
}

// Equal tells whether both are the same choices.
func (s Settings) Equal(o Settings) bool {
	return slices.Equal(s.TLSSANs, o.TLSSANs) && s.NodeName == o.NodeName && s.NodeIP == o.NodeIP &&
		s.LoadBalancerRange == o.LoadBalancerRange && s.PoolSize == o.PoolSize && s.PortalPort == o.PortalPort && s.MaxPods == o.MaxPods && s.Accelerator == o.Accelerator &&
		s.Kernel == o.Kernel && s.LogFormat == o.LogFormat
}
