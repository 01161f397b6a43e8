package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	authnv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/registryhosts"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/registry/credentials"
	"atoll.dev/atoll/internal/registry/hosts"
	"atoll.dev/atoll/internal/storage/library"
)

// httpsPort is left out of the names of images.
const httpsPort = 443

// portal is where the server's portal is connected to.
func (a *Agent) portal() string {
	return net.JoinHostPort(a.cfg.Portal.Addr().String(), strconv.Itoa(int(a.cfg.Portal.Port())))
}

// registryAddress is what images name the registry by, beside registry.atoll.local.
func (a *Agent) registryAddress() string {
	if a.cfg.Portal.Port() == httpsPort {
		return a.cfg.Portal.Addr().String()
	}
	return a.portal()
}

// runRegistries keeps containerd's configuration of registries as the RegistryConfiguration says. It reads the files at
// each pull.
func (a *Agent) runRegistries(ctx context.Context) error {
	client, err := clientcmd.BuildConfigFromFlags("", a.files.Kubeconfig(pki.Kubelet))
	if err != nil {
		return fmt.Errorf("configuring registries: %w", err)
	}
	client.UserAgent = "atoll-registries"
	where := hosts.Config{
		Dir: a.cfg.RegistriesDir, Portal: a.portal(), Address: a.registryAddress(), CA: a.files.CACert(pki.ClusterCA),
		ExternalMark: filepath.Join(a.cfg.CredentialDir, credentials.ExternalMark),
	}
	f, err := registryhosts.New(registryhosts.Config{
		Client: client, Logger: a.cfg.Logger,
		Apply: func(spec atoll.RegistryConfigurationSpec) error { return hosts.Write(where, spec) },
	})
	if err != nil {
		return fmt.Errorf("configuring registries: %w", err)
	}
	return f.Run(ctx)
}

const (
	// registryReader and registryPublisher are the service accounts of kube-system that hosts read images of virtual
	// machines as, and push those that are published.
	registryReader    = "atoll-registry-reader"
	registryPublisher = "atoll-registry-publisher"
	registryLife      = int64(600)
)

// ownRegistry is how images of virtual machines are read from the cluster's registry, and how who pushes them logs in.
func (a *Agent) ownRegistry(client *rest.Config) (*library.OwnRegistry, registryLogin, error) {
	kube, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, nil, err
	}
	ca, err := os.ReadFile(a.files.CACert(pki.ClusterCA))
	if err != nil {
		return nil, nil, fmt.Errorf("reading the authority: %w", err)
	}
	as := func(account string) registryLogin {
		return func(ctx context.Context) (string, string, error) {
			answer, err := kube.CoreV1().ServiceAccounts(metav1.NamespaceSystem).CreateToken(ctx, account, &authnv1.TokenRequest{
				Spec: authnv1.TokenRequestSpec{Audiences: []string{atoll.RegistryAudience}, ExpirationSeconds: new(registryLife)},
			}, metav1.CreateOptions{})
			if err != nil {
				return "", "", err
			}
			return credentials.User, answer.Status.Token, nil
		}
	}
	return &library.OwnRegistry{Address: a.portal(), CA: string(ca), Login: as(registryReader)}, as(registryPublisher), nil
}

// registryLogin returns credentials.
type registryLogin = func(ctx context.Context) (user, password string, err error)
