package pki

import "path/filepath"

// Authority names one of the certificate authorities.
type Authority string

// The authorities. They are separate so that a client of one is not a client of
// another: a pod's service account cannot be turned into etcd access.
const (
	ClusterCA    Authority = "cluster-ca"
	EtcdCA       Authority = "etcd-ca"
	FrontProxyCA Authority = "front-proxy-ca"
)

// Names of the certificates.
const (
	APIServer                = "apiserver"
	APIServerKubeletClient   = "apiserver-kubelet-client"
	APIServerEtcdClient      = "apiserver-etcd-client"
	FrontProxyClient         = "front-proxy-client"
	EtcdServer               = "etcd-server"
	EtcdPeer                 = "etcd-peer"
	Admin                    = "admin"
	ControllerManager        = "controller-manager"
	ControllerManagerServing = "controller-manager-serving"
	Scheduler                = "scheduler"
	SchedulerServing         = "scheduler-serving"
	Kubelet                  = "kubelet"
	KubeletServing           = "kubelet-serving"
	KubeProxy                = "kube-proxy"
	CoreDNS                  = "coredns"
	// Storage is the storage part of a host's agent.
	Storage            = "storage"
	SnapshotController = "snapshot-controller"
	// NetworkPolicy is the part of a host's agent that enforces network policies.
	NetworkPolicy = "network-policy"
	// VMController is the manager of virtual machines, VMWebhook its port for the API server.
	VMController = "vm-controller"
	VMWebhook    = "vm-webhook"
	// Registry is the registry of images, as a client of the API server.
	Registry = "registry"
	// NamespaceController is the controller of SupervisorNamespaces.
	NamespaceController = "namespace-controller"
	// Identity knows people, IdentityWebhook is its port for the API server.
	Identity        = "identity"
	IdentityWebhook = "identity-webhook"
	// Portal is the listener of people and of the registry.
	Portal = "portal"
)

// Who components of ours are to the API server.
const (
	StorageGroup           = "atoll:storage-agents"
	SnapshotControllerUser = "atoll:snapshot-controller"
	NetworkPolicyGroup     = "atoll:network-policy-agents"
	// VMControllerUser alone makes, changes and deletes the pods of virtual machines.
	VMControllerUser = "system:atoll:vm-controller"
	// RegistryUser asks who may do what with images.
	RegistryUser = "system:atoll:registry"
	// NamespaceControllerUser makes namespaces and their bounds.
	NamespaceControllerUser = "system:atoll:namespace-controller"
)

// IdentityUser is who checks passwords and tokens. It may read their hashes.
const IdentityUser = "system:atoll:identity"

// RegistryHost is the name of the registry that is the same on every host: nodes map it to the portal.
const RegistryHost = "registry.atoll.local"

// Files tells where each certificate, key and kubeconfig is. It does no I/O.
type Files struct {
	Dir           string
	KubeconfigDir string
}

// Cert is the PEM file of the certificate called name.
func (f Files) Cert(name string) string { return filepath.Join(f.Dir, name+".crt") }

// Key is the PEM file (0600) of the private key of the certificate called name.
func (f Files) Key(name string) string { return filepath.Join(f.Dir, name+".key") }

// CACert is the PEM file of an authority.
func (f Files) CACert(a Authority) string { return filepath.Join(f.Dir, string(a)+".crt") }

// CAKey is the PEM file (0600) of the private key of an authority.
func (f Files) CAKey(a Authority) string { return filepath.Join(f.Dir, string(a)+".key") }

// ServiceAccountKey signs service account tokens (0600).
func (f Files) ServiceAccountKey() string { return filepath.Join(f.Dir, "service-account.key") }

// ServiceAccountPub verifies service account tokens.
func (f Files) ServiceAccountPub() string { return filepath.Join(f.Dir, "service-account.pub") }

// Kubeconfig is the kubeconfig of the component called name; it names the files
// of its certificate rather than holding them.
func (f Files) Kubeconfig(name string) string {
	return filepath.Join(f.KubeconfigDir, name+".kubeconfig")
}
