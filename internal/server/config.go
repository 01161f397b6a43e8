package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
)

// Config says where one server keeps its files, which addresses and ports it
// uses and what cluster it runs. Paths are absolute; the server creates
// directories that are missing (mode 0700).
type Config struct {
	// PKIDir holds the certificate authorities, certificates and keys,
	// KubeconfigDir the kubeconfigs of components; see internal/datadir/pki. The
	// agent on the same host reads both.
	PKIDir        string
	KubeconfigDir string
	// EtcdDir is the data directory of the embedded etcd.
	EtcdDir string
	// StateDir holds generated configuration: the encryption key of secrets,
	// the audit policy, admission and authentication configuration.
	StateDir string
	// AuditLog is the file the API server appends audit events to. It is
	// rotated beside itself: 5 files of 20 MiB.
	AuditLog string
	// AdminKubeconfig is written (0600) with a cluster-admin identity.
	AdminKubeconfig string

	// DatastorePath is the directory of the datastore "default" of the host this
	// server runs on.
	DatastorePath string
	// ContentDir is the library of images of virtual machines.
	ContentDir string
	// RegistryDir holds the images of the registry.
	RegistryDir string

	// NodeName names the host this server runs on. The credentials of the
	// agent on the same host are issued for it.
	NodeName string
	// NodeIP is the address other hosts and pods reach this server at; it is
	// the endpoint of the Service kubernetes.
	NodeIP netip.Addr
	// ExtraSANs are more names or addresses for the certificates of the API server and the portal.
	ExtraSANs []string

	// BindAddress is the listen address of the API server and the portal, 0.0.0.0 when unset.
	BindAddress netip.Addr
	// Ports are the listening ports; zero fields take their defaults.
	Ports Ports
	// Network is the address plan; zero fields take their defaults.
	Network Network

	// EtcdQuotaBytes bounds the etcd database, 4 GiB when zero.
	EtcdQuotaBytes int64
	// Version is Atoll's own version, published in the ConfigMap
	// kube-public/atoll.
	Version string
	// Logger receives everything the server and the upstream code in it say.
	Logger *slog.Logger `json:"-"`
	// OnReady, when set, is called once when the API server is ready and all
	// bootstrap objects are in place.
	OnReady func() `json:"-"`
}

// Ports of a server. API and Portal are reachable from other hosts; the others
// are bound to 127.0.0.1 and speak TLS.
type Ports struct {
	API               int // 6443
	EtcdClient        int // 2379
	EtcdPeer          int // 2380
	Scheduler         int // 10259
	ControllerManager int // 10257
	// Webhook is where the API server reaches the webhooks of virtual machines.
	Webhook int // 9443
	// Identity is where the API server asks whose a token is.
	Identity int // 9444
	// Portal is where people log in and images are pushed to.
	Portal int // 443
	// Kubelet is the port the API server reaches the agents' kubelets at.
	Kubelet int // 10250
}

// Network is the address plan of a cluster.
type Network struct {
	PodCIDR      netip.Prefix // 10.244.0.0/16
	NodeMaskSize int          // 22: the size of each node's part of PodCIDR
	ServiceCIDR  netip.Prefix // 10.96.0.0/16
	// DNSServiceIP is the cluster IP of kube-system/kube-dns.
	DNSServiceIP netip.Addr // 10.96.0.10
	// DNSEndpoint is the address CoreDNS listens at: the pod bridge's gateway.
	DNSEndpoint netip.Addr // 10.244.0.1
	DNSPort     int        // 53
	Domain      string     // cluster.local
	// LoadBalancers are addresses for load balancers that cannot have the node's own.
	LoadBalancers netip.Prefix // 10.97.0.0/24
}

// WithDefaults returns the configuration with every zero field that has a
// default set to it.
func (c Config) WithDefaults() Config {
	if !c.BindAddress.IsValid() {
		c.BindAddress = netip.IPv4Unspecified()
	}
	if c.EtcdQuotaBytes == 0 {
		c.EtcdQuotaBytes = 4 << 30
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	c.Ports = c.Ports.withDefaults()
	c.Network = c.Network.withDefaults()
	return c
}

func (p Ports) withDefaults() Ports {
	for _, d := range []struct {
		port *int
		def  int
	}{
		{&p.API, 6443},
		{&p.EtcdClient, 2379},
		{&p.EtcdPeer, 2380},
		{&p.Scheduler, 10259},
		{&p.ControllerManager, 10257},
		{&p.Webhook, 9443},
		{&p.Identity, 9444},
		{&p.Portal, 443},
		{&p.Kubelet, 10250},
	} {
		if *d.port == 0 {
			*d.port = d.def
		}
	}
	return p
}

func (n Network) withDefaults() Network {
	if !n.PodCIDR.IsValid() {
		n.PodCIDR = netip.MustParsePrefix("10.244.0.0/16")
	}
	if n.NodeMaskSize == 0 {
		n.NodeMaskSize = 22
	}
	if !n.ServiceCIDR.IsValid() {
		n.ServiceCIDR = netip.MustParsePrefix("10.96.0.0/16")
	}
	if !n.DNSServiceIP.IsValid() {
		n.DNSServiceIP = netip.MustParseAddr("10.96.0.10")
	}
	if !n.DNSEndpoint.IsValid() {
		n.DNSEndpoint = netip.MustParseAddr("10.244.0.1")
	}
	if n.DNSPort == 0 {
		n.DNSPort = 53
	}
	if !n.LoadBalancers.IsValid() {
		n.LoadBalancers = netip.MustParsePrefix("10.97.0.0/24")
	}
	if n.Domain == "" {
		n.Domain = "cluster.local"
	}
	return n
}

// Validate says what is missing or contradictory, all of it at once.
func (c Config) Validate() error {
	var errs []error
	for _, p := range []struct{ name, path string }{
		{"PKIDir", c.PKIDir},
		{"KubeconfigDir", c.KubeconfigDir},
		{"EtcdDir", c.EtcdDir},
		{"StateDir", c.StateDir},
		{"AuditLog", c.AuditLog},
		{"AdminKubeconfig", c.AdminKubeconfig},
		{"DatastorePath", c.DatastorePath},
		{"ContentDir", c.ContentDir},
		{"RegistryDir", c.RegistryDir},
	} {
		if len(p.path) == 0 || p.path[0] != '/' {
			errs = append(errs, fmt.Errorf("%s must be an absolute path, got %q", p.name, p.path))
		}
	}
	if c.NodeName == "" {
		errs = append(errs, errors.New("NodeName must be set"))
	}
	if !c.NodeIP.Is4() || c.NodeIP.IsUnspecified() || c.NodeIP.IsLoopback() {
		errs = append(errs, fmt.Errorf("NodeIP must be an IPv4 address of this host other than loopback, got %q", c.NodeIP))
	}
	n := c.Network
	if !n.ServiceCIDR.Contains(n.DNSServiceIP) {
		errs = append(errs, fmt.Errorf("DNSServiceIP %s is not in ServiceCIDR %s", n.DNSServiceIP, n.ServiceCIDR))
	}
	if n.PodCIDR.Overlaps(n.ServiceCIDR) {
		errs = append(errs, fmt.Errorf("PodCIDR %s and ServiceCIDR %s overlap", n.PodCIDR, n.ServiceCIDR))
	}
	if n.LoadBalancers.Overlaps(n.ServiceCIDR) || n.LoadBalancers.Overlaps(n.PodCIDR) || n.LoadBalancers.Contains(c.NodeIP) {
		errs = append(errs, fmt.Errorf("LoadBalancers %s overlaps PodCIDR %s, ServiceCIDR %s or NodeIP %s", n.LoadBalancers, n.PodCIDR, n.ServiceCIDR, c.NodeIP))
	}
	if n.NodeMaskSize < n.PodCIDR.Bits() || n.NodeMaskSize > 30 {
		errs = append(errs, fmt.Errorf("NodeMaskSize %d does not fit PodCIDR %s", n.NodeMaskSize, n.PodCIDR))
	}
	return errors.Join(errs...)
}
