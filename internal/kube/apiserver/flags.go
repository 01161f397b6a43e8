package apiserver

import (
	"fmt"
	"path/filepath"

	"atoll.dev/atoll/internal/datadir/pki"
)

// flags are the options of kube-apiserver, in the words of its documentation.
func (s *APIServer) flags() []string {
	c, f := s.cfg, s.cfg.Files
	issuer := "https://kubernetes.default.svc." + c.Domain
	return []string{
		// Serving.
		"--bind-address=" + c.BindAddress.String(),
		fmt.Sprintf("--secure-port=%d", c.Port),
		"--advertise-address=" + c.Advertise.String(),
		"--tls-cert-file=" + f.Cert(pki.APIServer),
		"--tls-private-key-file=" + f.Key(pki.APIServer),
		"--tls-min-version=VersionTLS12",
		"--profiling=false",
		"--allow-privileged=true",
		"--service-cluster-ip-range=" + c.ServiceCIDR.String(),

		// Who may do what.
		"--client-ca-file=" + f.CACert(pki.ClusterCA),
		"--authentication-config=" + s.authenticationFile(),
		"--authentication-token-webhook-config-file=" + s.webhookFile(),
		"--authentication-token-webhook-version=v1",
		"--authentication-token-webhook-cache-ttl=" + webhookCache.String(),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=" + issuer,
		"--service-account-key-file=" + f.ServiceAccountPub(),
		"--service-account-signing-key-file=" + f.ServiceAccountKey(),

		// Audit.
		"--audit-policy-file=" + s.auditPolicyFile(),
		"--audit-log-path=" + c.AuditLog,
		"--audit-log-maxsize=20",
		"--audit-log-maxbackup=5",

		// Storage.
		fmt.Sprintf("--etcd-servers=https://127.0.0.1:%d", c.EtcdPort),
		"--etcd-cafile=" + f.CACert(pki.EtcdCA),
		"--etcd-certfile=" + f.Cert(pki.APIServerEtcdClient),
		"--etcd-keyfile=" + f.Key(pki.APIServerEtcdClient),
		"--encryption-provider-config=" + s.encryptionFile(),

		// Kubelets.
		"--kubelet-certificate-authority=" + f.CACert(pki.ClusterCA),
		"--kubelet-client-certificate=" + f.Cert(pki.APIServerKubeletClient),
		"--kubelet-client-key=" + f.Key(pki.APIServerKubeletClient),
		"--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",

		// Aggregated API servers. They are reached at their endpoints, because
		// this process may run where no kube-proxy does.
		"--requestheader-client-ca-file=" + f.CACert(pki.FrontProxyCA),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + f.Cert(pki.FrontProxyClient),
		"--proxy-client-key-file=" + f.Key(pki.FrontProxyClient),
		"--enable-aggregator-routing=true",
	}
}

// AuthenticationFile is what the API server reads issuers from whenever it changes. At each start it has none.
func AuthenticationFile(stateDir string) string {
	return filepath.Join(stateDir, "authentication.yaml")
}

func (s *APIServer) authenticationFile() string { return AuthenticationFile(s.cfg.StateDir) }

func (s *APIServer) webhookFile() string {
	return filepath.Join(s.cfg.StateDir, "identity-webhook.kubeconfig")
}

func (s *APIServer) auditPolicyFile() string {
	return filepath.Join(s.cfg.StateDir, "audit-policy.yaml")
}

func (s *APIServer) encryptionFile() string {
	return filepath.Join(s.cfg.StateDir, "encryption.yaml")
}
