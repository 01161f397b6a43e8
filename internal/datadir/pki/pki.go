// Package pki makes and renews the certificates of one cluster.
//
// It holds three authorities (cluster, etcd, front proxy), one client or serving
// certificate per component, the key that signs service account tokens, and the
// kubeconfigs that name them. Keys are ECDSA P-256 (the service account key is
// RSA 2048, the algorithm OpenID Connect relying parties must support).
// Authorities live ten years, certificates one year. A certificate is made anew
// (with a new key) when less than 30% of its life is left, when it is not valid
// yet, when its authority changed or when a name it must carry is missing;
// Ensure does so at start and Run every hour. Every component takes up a renewed
// certificate without a restart: the API server and the kubelet watch their
// files, etcd reads them at each handshake, and clients get a kubeconfig that
// names files, which client-go reads again. Only the administrator's kubeconfig
// embeds its certificate, so that it can be copied; copies end with the year.
//
// It is not a general certificate tool and does not talk to the API server.
// The server role calls it; the agent role only reads files through Files. It
// must not import Kubernetes.
//
// What can go wrong: an authority that is damaged or half missing is an error
// and is never replaced, because replacing it would lock out every client. A
// damaged certificate is replaced.
package pki

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 365 * 24 * time.Hour
	// backdate tolerates a clock that is set back a little after start.
	backdate = time.Hour
	// renewAt is the part of a certificate's life that must be left.
	renewAt = 0.3
	// checkEvery is how often Run looks at all certificates.
	checkEvery = time.Hour
)

// Config is the cluster the certificates are for.
type Config struct {
	// Dir holds authorities, certificates and keys; KubeconfigDir the
	// kubeconfigs of components. Both are made with mode 0700.
	Dir           string
	KubeconfigDir string
	// AdminKubeconfig is the path of the administrator's kubeconfig.
	AdminKubeconfig string

	// NodeName and NodeAddrs name the host: its API server, etcd and kubelet
	// serve under them.
	NodeName  string
	NodeAddrs []netip.Addr
	// ExtraSANs are more host names or addresses of the API server and the portal.
	ExtraSANs []string
	// ServiceIP is the cluster IP of the Service kubernetes.
	ServiceIP netip.Addr
	// Domain is the cluster domain.
	Domain string
	// APIServer is the URL local components use, AdminURL the one in the
	// administrator's kubeconfig.
	APIServer string
	AdminURL  string

	Logger *slog.Logger
	// Now is the clock, time.Now when nil.
	Now func() time.Time
}

// PKI keeps the certificates of a Config in order.
type PKI struct {
	cfg   Config
	files Files
}

// New checks cfg. It touches no file.
func New(cfg Config) (*PKI, error) {
	var errs []error
	for _, p := range []struct{ name, path string }{
		{"Dir", cfg.Dir},
		{"KubeconfigDir", cfg.KubeconfigDir},
		{"AdminKubeconfig", cfg.AdminKubeconfig},
	} {
		if !filepath.IsAbs(p.path) {
			errs = append(errs, fmt.Errorf("%s must be an absolute path, got %q", p.name, p.path))
		}
	}
	if cfg.NodeName == "" || cfg.Domain == "" || cfg.APIServer == "" || cfg.AdminURL == "" || !cfg.ServiceIP.IsValid() {
		errs = append(errs, errors.New("NodeName, Domain, APIServer, AdminURL and ServiceIP must be set"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &PKI{cfg: cfg, files: Files{Dir: cfg.Dir, KubeconfigDir: cfg.KubeconfigDir}}, nil
}

// Ensure makes what is missing and renews what is due. It returns the names of
// the certificates it made, which is empty when nothing had to be done. A second
// call right after it changes nothing; a call that was cut short is completed by
// the next one.
func (p *PKI) Ensure() (made []string, err error) {
	for _, dir := range []string{p.files.Dir, p.files.KubeconfigDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("making certificate directory: %w", err)
		}
	}
	authorities := make(map[Authority]*authority)
	for _, name := range []Authority{ClusterCA, EtcdCA, FrontProxyCA} {
		a, err := p.ensureAuthority(name)
		if err != nil {
			return nil, err
		}
		authorities[name] = a
	}
	if err := p.ensureServiceAccountKey(); err != nil {
		return nil, err
	}
	for _, s := range p.specs() {
		renewed, err := p.ensureLeaf(authorities[s.authority], s)
		if err != nil {
			return made, fmt.Errorf("certificate %s: %w", s.name, err)
		}
		if renewed {
			made = append(made, s.name)
		}
	}
	return made, p.ensureKubeconfigs(authorities[ClusterCA])
}

// Run renews certificates while they are in use. It returns when ctx ends; a
// failed round is logged and tried again.
func (p *PKI) Run(ctx context.Context) error {
	ticker := time.NewTicker(checkEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		made, err := p.Ensure()
		if err != nil {
			p.cfg.Logger.Error("renewing certificates failed", "error", err)
		}
		if len(made) > 0 {
			p.cfg.Logger.Info("certificates renewed", "names", made)
		}
	}
}
