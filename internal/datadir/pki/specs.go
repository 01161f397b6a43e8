package pki

import (
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
)

// spec is one certificate that must exist.
type spec struct {
	name      string
	authority Authority
	// user and groups are what the certificate says to the API server.
	user   string
	groups []string
	client bool
	server bool
	dns    []string
	addrs  []netip.Addr
}

// specs is the table of all certificates.
func (p *PKI) specs() []spec {
	c := p.cfg
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	local := []string{"localhost"}
	node := "system:node:" + c.NodeName
	nodeGroup := []string{"system:nodes"}
	hostNames := append([]string{c.NodeName}, local...)
	hostAddrs := slices.Concat(loopback, c.NodeAddrs)
	apiNames, apiAddrs := splitSANs(c.ExtraSANs)
	portalNames := slices.Concat(hostNames, []string{RegistryHost}, apiNames)
	portalAddrs := slices.Concat(hostAddrs, apiAddrs)
	apiNames = slices.Concat(hostNames, []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + c.Domain,
	}, apiNames)
	apiAddrs = slices.Concat(hostAddrs, []netip.Addr{c.ServiceIP}, apiAddrs)

	return []spec{
		{name: APIServer, authority: ClusterCA, user: "kube-apiserver", server: true, dns: apiNames, addrs: apiAddrs},
		{name: APIServerKubeletClient, authority: ClusterCA, user: "kube-apiserver-kubelet-client", client: true},
		{name: APIServerEtcdClient, authority: EtcdCA, user: "kube-apiserver-etcd-client", client: true},
		{name: FrontProxyClient, authority: FrontProxyCA, user: "front-proxy-client", client: true},
		// etcd's gRPC gateway dials etcd itself with the serving certificate.
		{name: EtcdServer, authority: EtcdCA, user: c.NodeName, server: true, client: true, dns: hostNames, addrs: hostAddrs},
		{name: EtcdPeer, authority: EtcdCA, user: c.NodeName, server: true, client: true, dns: hostNames, addrs: hostAddrs},
		{name: Admin, authority: ClusterCA, user: "atoll-admin", groups: []string{"system:masters"}, client: true},
		{name: ControllerManager, authority: ClusterCA, user: "system:kube-controller-manager", client: true},
		{name: ControllerManagerServing, authority: ClusterCA, user: "kube-controller-manager", server: true, dns: local, addrs: loopback},
		{name: Scheduler, authority: ClusterCA, user: "system:kube-scheduler", client: true},
		{name: SchedulerServing, authority: ClusterCA, user: "kube-scheduler", server: true, dns: local, addrs: loopback},
		{name: Kubelet, authority: ClusterCA, user: node, groups: nodeGroup, client: true},
		{name: KubeletServing, authority: ClusterCA, user: node, groups: nodeGroup, server: true, dns: hostNames, addrs: hostAddrs},
		{name: KubeProxy, authority: ClusterCA, user: "system:kube-proxy", client: true},
		{name: CoreDNS, authority: ClusterCA, user: "system:coredns", client: true},
		{name: Storage, authority: ClusterCA, user: "atoll:storage-agent:" + c.NodeName, groups: []string{StorageGroup}, client: true},
		{name: NetworkPolicy, authority: ClusterCA, user: "atoll:network-policy-agent:" + c.NodeName, groups: []string{NetworkPolicyGroup}, client: true},
		{name: SnapshotController, authority: ClusterCA, user: SnapshotControllerUser, client: true},
		{name: VMController, authority: ClusterCA, user: VMControllerUser, client: true},
		{name: Registry, authority: ClusterCA, user: RegistryUser, client: true},
		{name: NamespaceController, authority: ClusterCA, user: NamespaceControllerUser, client: true},
		{name: Identity, authority: ClusterCA, user: IdentityUser, client: true},
		{name: IdentityWebhook, authority: ClusterCA, user: "atoll-identity-webhook", server: true, dns: local, addrs: loopback},
		{name: Portal, authority: ClusterCA, user: "atoll-portal", server: true, dns: portalNames, addrs: portalAddrs},
		{name: VMWebhook, authority: ClusterCA, user: "atoll-vm-webhook", server: true, dns: local, addrs: loopback},
	}
}

// splitSANs sorts subject alternative names into host names and addresses.
func splitSANs(sans []string) (names []string, addrs []netip.Addr) {
	for _, s := range sans {
		if a, err := netip.ParseAddr(s); err == nil {
			addrs = append(addrs, a)
			continue
		}
		names = append(names, s)
	}
	return names, addrs
}

// extKeyUsage is what TLS peers may use the certificate for.
func (s spec) extKeyUsage() []x509.ExtKeyUsage {
	var usage []x509.ExtKeyUsage
	if s.server {
		usage = append(usage, x509.ExtKeyUsageServerAuth)
	}
	if s.client {
		usage = append(usage, x509.ExtKeyUsageClientAuth)
	}
	return usage
}

// ips are the addresses without duplicates.
func (s spec) ips() []net.IP {
	var out []net.IP
	seen := make(map[netip.Addr]bool)
	for _, a := range s.addrs {
		a = a.Unmap().WithZone("")
		if !seen[a] {
			seen[a] = true
			out = append(out, net.IP(a.AsSlice()))
		}
	}
	return out
}

// covers reports whether cert already says everything the spec asks for. A
// certificate with more addresses than asked for is kept: addresses of a host
// come and go, and each change must not cost a new certificate.
func (s spec) covers(cert *x509.Certificate) bool {
	if cert.Subject.CommonName != s.user || !sameSet(cert.Subject.Organization, s.groups) {
		return false
	}
	if !sameSet(cert.ExtKeyUsage, s.extKeyUsage()) {
		return false
	}
	for _, name := range s.dns {
		if !slices.Contains(cert.DNSNames, name) {
			return false
		}
	}
	for _, ip := range s.ips() {
		if !slices.ContainsFunc(cert.IPAddresses, ip.Equal) {
			return false
		}
	}
	return true
}

// sameSet reports whether a and b hold the same values in any order.
func sameSet[T comparable](a, b []T) bool {
	if len(a) != len(b) {
		return false
	}
	for _, v := range a {
		if !slices.Contains(b, v) {
			return false
		}
	}
	return true
}
