package pki

import (
	"encoding/base64"
	"fmt"
	"os"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// kubeconfigComponents are the clients that get a kubeconfig.
func kubeconfigComponents() []string {
	return []string{ControllerManager, Scheduler, Kubelet, KubeProxy, CoreDNS, Storage, SnapshotController, NetworkPolicy, VMController, NamespaceController, Identity, Registry}
}

// ensureKubeconfigs writes the kubeconfigs that differ from what they must be.
func (p *PKI) ensureKubeconfigs(cluster *authority) error {
	for _, name := range kubeconfigComponents() {
		user := fmt.Sprintf("client-certificate: %q\n    client-key: %q", p.files.Cert(name), p.files.Key(name))
		ca := fmt.Sprintf("certificate-authority: %q", p.files.CACert(ClusterCA))
		text := kubeconfig(p.cfg.APIServer, ca, name, user)
		if _, err := atomicfile.WriteIfChanged(p.files.Kubeconfig(name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("kubeconfig of %s: %w", name, err)
		}
	}
	cert, err := os.ReadFile(p.files.Cert(Admin))
	if err != nil {
		return fmt.Errorf("kubeconfig of %s: %w", Admin, err)
	}
	key, err := os.ReadFile(p.files.Key(Admin))
	if err != nil {
		return fmt.Errorf("kubeconfig of %s: %w", Admin, err)
	}
	enc := base64.StdEncoding.EncodeToString
	user := fmt.Sprintf("client-certificate-data: %s\n    client-key-data: %s", enc(cert), enc(key))
	text := kubeconfig(p.cfg.AdminURL, "certificate-authority-data: "+enc(cluster.pem), Admin, user)
	if _, err := atomicfile.WriteIfChanged(p.cfg.AdminKubeconfig, []byte(text), 0o600); err != nil {
		return fmt.Errorf("kubeconfig of %s: %w", Admin, err)
	}
	return nil
}

func kubeconfig(server, ca, name, user string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: atoll
  cluster:
    server: %s
    %s
users:
- name: %s
  user:
    %s
contexts:
- name: atoll
  context:
    cluster: atoll
    user: %s
current-context: atoll
`, server, ca, name, user, name)
}
