// Package kubelet runs the kubelet in the agent process.
//
// It is upstream with a KubeletConfiguration built here (see configuration), and
// with the shim's word for what emptyDirs of micro-VM pods take (see
// measureEmptyDirs). The configuration is also written to a file for people to
// read. The agent role
// calls Run when the node's credentials and the container runtime are there.
// Losing the API server or the runtime later is the kubelet's own business: it
// keeps trying. What can go wrong: cgroups or the runtime are not usable, which
// ends Run, or in places the process, with a message.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"

	utilfeature "k8s.io/apiserver/pkg/util/feature"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"
	kubeletscheme "k8s.io/kubernetes/pkg/kubelet/apis/config/scheme"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"
	"sigs.k8s.io/yaml"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/kubelet/imageservice"
)

// Config of a kubelet.
type Config struct {
	Files pki.Files
	// Dir is the kubelet's root directory, PodLogsDir that of container logs,
	// StateDir that of generated configuration.
	Dir        string
	PodLogsDir string
	StateDir   string
	// Socket is containerd's CRI socket, ImageSocket the one to be made for the image service between.
	Socket      string
	ImageSocket string
	OwnedImages imageservice.Owned

	NodeName   string
	NodeIP     netip.Addr
	NodeLabels map[string]string
	MaxPods    int
	CgroupRoot string
	// CgroupRecord is a file in which is noted what making CgroupRoot has changed.
	CgroupRecord string

	Port       int
	HealthPort int
	// DNSServiceIP and Domain are what pods get to resolve names, ResolvConf what
	// pods with dnsPolicy Default get.
	DNSServiceIP netip.Addr
	Domain       string
	ResolvConf   string

	// CredentialDir holds the image credential provider for the cluster's registry, and RegistryHosts are the names that
	// images have the registry by. Without names there is no provider.
	CredentialDir string
	RegistryHosts []string
}

// Run holds until ctx ends or the kubelet fails.
func Run(ctx context.Context, cfg Config) error {
	versioned := configuration(cfg, detectCgroups(), detectLimits())
	if err := write(cfg, versioned); err != nil {
		return fmt.Errorf("configuring kubelet: %w", err)
	}
	if cfg.CgroupRoot != "" {
		if err := makeCgroupRoot(cfg.CgroupRoot, cfg.CgroupRecord); err != nil {
			return fmt.Errorf("configuring kubelet: %w", err)
		}
	}
	kc, err := internalConfiguration(versioned)
	if err != nil {
		return fmt.Errorf("configuring kubelet: %w", err)
	}
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(kc.FeatureGates); err != nil {
		return fmt.Errorf("configuring kubelet: setting feature gates: %w", err)
	}
	if err := validation.ValidateKubeletConfiguration(kc, utilfeature.DefaultFeatureGate); err != nil {
		return fmt.Errorf("configuring kubelet: %w", err)
	}
	server := &options.KubeletServer{KubeletFlags: *flags(cfg), KubeletConfiguration: *kc}
	deps, err := app.UnsecuredDependencies(ctx, server, utilfeature.DefaultFeatureGate)
	if err != nil {
		return fmt.Errorf("configuring kubelet: %w", err)
	}
	if err := measureEmptyDirs(deps.VolumePlugins); err != nil {
		return fmt.Errorf("configuring kubelet: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	service := imageservice.Config{Socket: cfg.ImageSocket, Containerd: cfg.Socket, Owned: cfg.OwnedImages}
	listener, err := imageservice.Listen(ctx, service)
	if err != nil {
		return fmt.Errorf("running kubelet: %w", err)
	}
	serving := make(chan error, 1)
	go func() {
		defer cancel()
		serving <- imageservice.Serve(ctx, service, listener)
	}()
	if err := app.Run(ctx, server, deps, utilfeature.DefaultFeatureGate); err != nil {
		cancel()
		return fmt.Errorf("running kubelet: %w", errors.Join(err, <-serving))
	}
	cancel()
	if err := <-serving; err != nil {
		return fmt.Errorf("running kubelet: %w", err)
	}
	return nil
}

// flags are the settings that are not part of the configuration file.
func flags(cfg Config) *options.KubeletFlags {
	f := options.NewKubeletFlags()
	f.KubeConfig = cfg.Files.Kubeconfig(pki.Kubelet)
	f.CertDirectory = filepath.Join(cfg.Dir, "pki")
	f.RootDirectory = cfg.Dir
	f.HostnameOverride = cfg.NodeName
	f.NodeIP = cfg.NodeIP.String()
	f.NodeLabels = maps.Clone(cfg.NodeLabels)
	if f.NodeLabels == nil {
		f.NodeLabels = make(map[string]string)
	}
	if len(cfg.RegistryHosts) > 0 {
		f.ImageCredentialProviderConfigPath, f.ImageCredentialProviderBinDir = cfg.credentialConfig(), cfg.CredentialDir
	}
	return f
}

// write makes the kubelet's directories and leaves its configuration in a file.
func write(cfg Config, kc *kubeletv1beta1.KubeletConfiguration) error {
	for dir, mode := range map[string]os.FileMode{cfg.Dir: 0o711, cfg.PodLogsDir: 0o755, cfg.StateDir: 0o700} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return err
		}
	}
	text, err := yaml.Marshal(kc)
	if err != nil {
		return fmt.Errorf("encoding configuration: %w", err)
	}
	if _, err = atomicfile.WriteIfChanged(filepath.Join(cfg.StateDir, "kubelet.yaml"), text, 0o600); err != nil {
		return err
	}
	return writeCredentialConfig(cfg)
}

// internalConfiguration applies upstream's defaults.
func internalConfiguration(versioned *kubeletv1beta1.KubeletConfiguration) (*config.KubeletConfiguration, error) {
	scheme, _, err := kubeletscheme.NewSchemeAndCodecs()
	if err != nil {
		return nil, err
	}
	versioned = versioned.DeepCopy()
	scheme.Default(versioned)
	internal := &config.KubeletConfiguration{}
	if err := scheme.Convert(versioned, internal, nil); err != nil {
		return nil, fmt.Errorf("converting configuration: %w", err)
	}
	return internal, nil
}
