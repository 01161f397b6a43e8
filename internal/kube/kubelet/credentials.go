package kubelet

import (
	"fmt"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubeletv1 "k8s.io/kubelet/config/v1"
	"sigs.k8s.io/yaml"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// credentialProvider is the executable in CredentialDir; see internal/registry/credentials.
const credentialProvider = "atoll-registry-credentials"

func (c Config) credentialConfig() string {
	return filepath.Join(c.StateDir, "credential-providers.yaml")
}

// credentials has images of the cluster's registry pulled as the pod's service account: the kubelet makes a token that
// is bound to the pod and for the registry alone. Nothing is kept between pulls: a token that is the password is no other
// pod's, so the kubelet asks the registry again before it gives an image that is there to another pod
// (KubeletEnsureSecretPulledImages, on by default). Images that it has not pulled itself, such as those of
// "atoll image load", are for all.
func credentials(hosts []string) *kubeletv1.CredentialProviderConfig {
	required := true
	return &kubeletv1.CredentialProviderConfig{
		TypeMeta: metav1.TypeMeta{APIVersion: kubeletv1.SchemeGroupVersion.String(), Kind: "CredentialProviderConfig"},
		Providers: []kubeletv1.CredentialProvider{{
			Name:                 credentialProvider,
			MatchImages:          hosts,
			DefaultCacheDuration: &metav1.Duration{Duration: time.Duration(0)},
			APIVersion:           "credentialprovider.kubelet.k8s.io/v1",
			TokenAttributes: &kubeletv1.ServiceAccountTokenAttributes{
				ServiceAccountTokenAudience: atoll.RegistryAudience,
				CacheType:                   kubeletv1.TokenServiceAccountTokenCacheType,
				RequireServiceAccount:       &required,
			},
		}},
	}
}

func writeCredentialConfig(cfg Config) error {
	if len(cfg.RegistryHosts) == 0 {
		return nil
	}
	text, err := yaml.Marshal(credentials(cfg.RegistryHosts))
	if err != nil {
		return fmt.Errorf("encoding the configuration of credential providers: %w", err)
	}
	_, err = atomicfile.WriteIfChanged(cfg.credentialConfig(), text, 0o600)
	return err
}
