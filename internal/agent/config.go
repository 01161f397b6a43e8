package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"atoll.dev/atoll/internal/network/policy"
)

// Config says where one agent keeps its files, how it reaches the API server
// and the container runtime, and what it tells the cluster about its node.
// Paths are absolute.
type Config struct {
	// PKIDir and KubeconfigDir are the directories internal/datadir/pki keeps
	// certificates and kubeconfigs in. The agent reads its node's credentials
	// from them and waits for them to appear.
	PKIDir        string
	KubeconfigDir string
	// KubeletDir is the kubelet's root: pod volumes, plugins, checkpoints.
	KubeletDir string
	// PodLogsDir holds the container logs.
	PodLogsDir string
	// StateDir holds generated configuration.
	StateDir string
	// RunDir is the directory of sockets and of what shims write; it ends with the
	// boot.
	RunDir string
	// MachinesDir is where virtual machines keep firmware variables and the like, LeaseDir where the CNI plugin keeps
	// their addresses.
	MachinesDir string
	LeaseDir    string
	// DeniedDir is where traffic that network policies deny is logged; PolicyStatus is the file that says how they are
	// enforced.
	DeniedDir    string
	PolicyStatus string
	// Policy enforces network policies.
	Policy *policy.Engine
	// ContentDir holds the images of virtual machines as they came.
	ContentDir string
	// ContainerdSocket is the CRI socket, without a scheme.
	ContainerdSocket string
	// RegistriesDir is containerd's directory of registries, CredentialDir that of the kubelet's image credential
	// providers.
	RegistriesDir string
	CredentialDir string
	// Portal is the address and port of the server's portal, where the registry is; NodeIP and 443 when zero.
	Portal netip.AddrPort

	// NodeName is the name of the Node object; it must be the name the
	// credentials were issued for.
	NodeName string
	// NodeIP is the node's InternalIP.
	NodeIP netip.Addr
	// NodeLabels are set on the Node when it registers, for example
	// atoll.dev/accelerator. See AcceleratorLabel.
	NodeLabels map[string]string
	// MaxPods is 500 when zero.
	MaxPods int
	// CgroupRoot is the cgroup pods live under, "" for the root; it is made when
	// missing. Two agents on one host must not share it: each removes the groups
	// of pods it does not know.
	CgroupRoot string
	// CgroupRecord is where the kubelet notes what making that has changed.
	CgroupRecord string

	// Ports are the listening ports; zero fields take their defaults.
	Ports Ports
	// Network is the address plan; zero fields take their defaults.
	Network Network

	// Version is Atoll's own version, set as the node annotation
	// atoll.dev/version.
	Version string
	// Logger receives everything the agent and the upstream code in it say.
	Logger *slog.Logger
	// OnReady, when set, is called once when the kubelet, the proxy and the DNS
	// server answer.
	OnReady func()
}

// AcceleratorLabel is the node label that says what runs the guests' CPUs:
// "kvm" or "tcg".
const AcceleratorLabel = "atoll.dev/accelerator"

// Ports of an agent. Kubelet is reachable from other hosts (TLS, authenticated
// by client certificate or token and authorized by the API server); the others
// are bound to 127.0.0.1.
type Ports struct {
	Kubelet       int // 10250
	KubeletHealth int // 10248
	ProxyHealth   int // 10256
	ProxyMetrics  int // 10249
	DNSReady      int // 8181
	// DNS is the port CoreDNS serves at Network.BridgeAddress.
	DNS int // 53
}

// Network is what an agent must know of the cluster's address plan.
type Network struct {
	PodCIDR     netip.Prefix // 10.244.0.0/16
	ServiceCIDR netip.Prefix // 10.96.0.0/16
	// LoadBalancers are addresses for load balancers that cannot have the node's own.
	LoadBalancers netip.Prefix // 10.97.0.0/24
	// BridgeAddress is the pod bridge's gateway address; CoreDNS listens there
	// as soon as the address exists.
	BridgeAddress netip.Addr // 10.244.0.1
	// DNSServiceIP is what pods get as name server.
	DNSServiceIP netip.Addr // 10.96.0.10
	Domain       string     // cluster.local
	// ResolvConf is the host's resolver configuration, /etc/resolv.conf when
	// empty. Its name servers are the upstreams of CoreDNS.
	ResolvConf string
}

// cluster are the networks of pods and of what leads to them, where the host gets past every policy.
func (n Network) cluster() []netip.Prefix {
	return []netip.Prefix{n.PodCIDR, n.ServiceCIDR, n.LoadBalancers}
}

// WithDefaults returns the configuration with every zero field that has a
// default set to it.
func (c Config) WithDefaults() Config {
	if c.MaxPods == 0 {
		c.MaxPods = 500
	}
	if c.Portal.Port() == 0 {
		c.Portal = netip.AddrPortFrom(c.NodeIP, httpsPort)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	for _, d := range []struct {
		port *int
		def  int
	}{
		{&c.Ports.Kubelet, 10250},
		{&c.Ports.KubeletHealth, 10248},
		{&c.Ports.ProxyHealth, 10256},
		{&c.Ports.ProxyMetrics, 10249},
		{&c.Ports.DNSReady, 8181},
		{&c.Ports.DNS, 53},
	} {
		if *d.port == 0 {
			*d.port = d.def
		}
	}
	n := &c.Network
	if !n.PodCIDR.IsValid() {
		n.PodCIDR = netip.MustParsePrefix("10.244.0.0/16")
	}
	if !n.ServiceCIDR.IsValid() {
		n.ServiceCIDR = netip.MustParsePrefix("10.96.0.0/16")
	}
	if !n.LoadBalancers.IsValid() {
		n.LoadBalancers = netip.MustParsePrefix("10.97.0.0/24")
	}
	if !n.BridgeAddress.IsValid() {
		n.BridgeAddress = netip.MustParseAddr("10.244.0.1")
	}
	if !n.DNSServiceIP.IsValid() {
		n.DNSServiceIP = netip.MustParseAddr("10.96.0.10")
	}
	if n.Domain == "" {
		n.Domain = "cluster.local"
	}
	if n.ResolvConf == "" {
		n.ResolvConf = "/etc/resolv.conf"
	}
	return c
}

// Validate says what is missing or contradictory, all of it at once.
func (c Config) Validate() error {
	var errs []error
	for _, p := range []struct{ name, path string }{
		{"PKIDir", c.PKIDir},
		{"KubeconfigDir", c.KubeconfigDir},
		{"KubeletDir", c.KubeletDir},
		{"PodLogsDir", c.PodLogsDir},
		{"StateDir", c.StateDir},
		{"RunDir", c.RunDir},
		{"MachinesDir", c.MachinesDir},
		{"LeaseDir", c.LeaseDir},
		{"ContentDir", c.ContentDir},
		{"DeniedDir", c.DeniedDir},
		{"PolicyStatus", c.PolicyStatus},
		{"ContainerdSocket", c.ContainerdSocket},
		{"RegistriesDir", c.RegistriesDir},
		{"CredentialDir", c.CredentialDir},
		{"Network.ResolvConf", c.Network.ResolvConf},
	} {
		if len(p.path) == 0 || p.path[0] != '/' {
			errs = append(errs, fmt.Errorf("%s must be an absolute path, got %q", p.name, p.path))
		}
	}
	if c.Policy == nil {
		errs = append(errs, errors.New("Policy must be set"))
	}
	if c.NodeName == "" {
		errs = append(errs, errors.New("NodeName must be set"))
	}
	if !c.NodeIP.Is4() || c.NodeIP.IsUnspecified() || c.NodeIP.IsLoopback() {
		errs = append(errs, fmt.Errorf("NodeIP must be an IPv4 address of this host other than loopback, got %q", c.NodeIP))
	}
	return errors.Join(errs...)
}
