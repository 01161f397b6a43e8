package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/apiserver"
	"atoll.dev/atoll/internal/kube/bootstrap"
	"atoll.dev/atoll/internal/kube/controllermanager"
	"atoll.dev/atoll/internal/kube/etcd"
	"atoll.dev/atoll/internal/kube/logging"
	"atoll.dev/atoll/internal/kube/scheduler"
	"atoll.dev/atoll/internal/kube/snapshots"
	"atoll.dev/atoll/internal/linux/heap"
	"atoll.dev/atoll/internal/linux/textpages"
)

// Server is one control plane.
type Server struct {
	cfg    Config
	pki    *pki.PKI
	files  pki.Files
	images *imageRegistry
}

// New checks the configuration and touches nothing.
func New(cfg Config) (*Server, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("server configuration: %w", err)
	}
	addrs, err := hostAddrs()
	if err != nil {
		return nil, fmt.Errorf("server configuration: %w", err)
	}
	certs, err := pki.New(pki.Config{
		Dir:             cfg.PKIDir,
		KubeconfigDir:   cfg.KubeconfigDir,
		AdminKubeconfig: cfg.AdminKubeconfig,
		NodeName:        cfg.NodeName,
		NodeAddrs:       append(addrs, cfg.NodeIP),
		ExtraSANs:       cfg.ExtraSANs,
		ServiceIP:       cfg.Network.ServiceCIDR.Masked().Addr().Next(),
		Domain:          cfg.Network.Domain,
		APIServer:       apiURL("127.0.0.1", cfg.Ports.API),
		AdminURL:        apiURL(cfg.NodeIP.String(), cfg.Ports.API),
		Logger:          cfg.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("server configuration: %w", err)
	}
	return &Server{cfg: cfg, pki: certs, files: pki.Files{Dir: cfg.PKIDir, KubeconfigDir: cfg.KubeconfigDir}}, nil
}

// Run starts everything in order and holds until ctx ends, then stops it in the
// reverse order and returns nil. When a component fails it stops the rest and
// returns that component's error.
func (s *Server) Run(ctx context.Context) error {
	logging.Install(s.cfg.Logger)
	if err := snapshots.Prepare(); err != nil {
		return fmt.Errorf("preparing snapshots: %w", err)
	}
	if err := os.MkdirAll(s.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("making state directory: %w", err)
	}
	made, err := s.pki.Ensure()
	if err != nil {
		return fmt.Errorf("preparing certificates: %w", err)
	}
	if len(made) > 0 {
		s.cfg.Logger.Info("certificates made", "names", made)
	}

	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	defer s.launch(fail, "heap", heap.Run)()
	defer s.launch(fail, "certificates", s.pki.Run)()

	marker := filepath.Join(s.cfg.StateDir, "etcd.created")
	_, statErr := os.Stat(marker)
	database, err := s.newEtcd(marker)
	if err != nil {
		return err
	}
	defer s.launch(fail, "etcd", database.Run)()
	if !waitFor(running, database.Ready()) {
		return s.reason(ctx, running)
	}

	defer s.launch(fail, "apiserver", s.newAPIServer(statErr == nil).Run)()
	people, err := s.newIdentity()
	if err != nil {
		return err
	}
	client := s.adminClient()
	if err := waitReady(running, client); err != nil {
		return s.reason(ctx, running)
	}
	defer s.launch(fail, "controllerManager", s.runControllerManager)()
	defer s.launch(fail, "scheduler", s.runScheduler)()

	if err := s.applyObjects(running, client); err != nil {
		fail(err)
		return s.reason(ctx, running)
	}
	defer s.launch(fail, "snapshotController", s.runSnapshotController)()
	if s.images, err = s.newRegistry(people); err != nil {
		return err
	}
	ready := make(chan struct{})
	defer s.launch(fail, "controllers", s.controllersRunner(ready))()
	if !waitFor(running, ready) {
		return s.reason(ctx, running)
	}
	defer s.launch(fail, "registry", s.images.run)()
	known := make(chan struct{})
	defer s.launch(fail, "identity", identityRunner(people, known))()
	defer s.launch(fail, "portal", s.portalRunner(people))()
	if !waitFor(running, known) {
		return s.reason(ctx, running)
	}
	defer s.launch(fail, "memory", textpages.Run)()
	s.cfg.Logger.Info("server ready", "url", apiURL(s.cfg.NodeIP.String(), s.cfg.Ports.API))
	if s.cfg.OnReady != nil {
		s.cfg.OnReady()
	}
	<-running.Done()
	return s.reason(ctx, running)
}

// launch runs a component in the background. The component has its own context,
// so that layers stop one after the other; the returned function ends it and
// waits. A component that ends before that fails the server.
func (s *Server) launch(fail context.CancelCauseFunc, name string, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := run(ctx)
		switch {
		case ctx.Err() != nil && err != nil:
			s.cfg.Logger.Warn("component stopped with an error", "component", name, "error", err)
		case ctx.Err() != nil:
			s.cfg.Logger.Info("component stopped", "component", name)
		case err == nil:
			fail(fmt.Errorf("%s ended by itself", name))
		default:
			fail(err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// reason is why running ended: nil when the caller ended ctx.
func (s *Server) reason(ctx, running context.Context) error {
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(running)
}

func (s *Server) newEtcd(marker string) (*etcd.Etcd, error) {
	return etcd.New(etcd.Config{
		Dir:        s.cfg.EtcdDir,
		MarkerFile: marker,
		Name:       s.cfg.NodeName,
		ClientPort: s.cfg.Ports.EtcdClient,
		PeerPort:   s.cfg.Ports.EtcdPeer,
		QuotaBytes: s.cfg.EtcdQuotaBytes,
		CACert:     s.files.CACert(pki.EtcdCA),
		ServerCert: s.files.Cert(pki.EtcdServer),
		ServerKey:  s.files.Key(pki.EtcdServer),
		PeerCert:   s.files.Cert(pki.EtcdPeer),
		PeerKey:    s.files.Key(pki.EtcdPeer),
		Logger:     s.cfg.Logger,
	})
}

func (s *Server) newAPIServer(hasData bool) *apiserver.APIServer {
	return apiserver.New(apiserver.Config{
		Files:       s.files,
		StateDir:    s.cfg.StateDir,
		HasData:     hasData,
		AuditLog:    s.cfg.AuditLog,
		BindAddress: s.cfg.BindAddress,
		Port:        s.cfg.Ports.API,
		Advertise:   s.cfg.NodeIP,
		EtcdPort:    s.cfg.Ports.EtcdClient,
		KubeletPort: s.cfg.Ports.Kubelet,
		ServiceCIDR: s.cfg.Network.ServiceCIDR,
		Domain:      s.cfg.Network.Domain,
		ContentDir:  s.cfg.ContentDir,
		Identity:    s.cfg.Ports.Identity,
		Logger:      s.cfg.Logger,
	})
}

func (s *Server) runControllerManager(ctx context.Context) error {
	return controllermanager.Run(ctx, controllermanager.Config{
		Files:       s.files,
		Port:        s.cfg.Ports.ControllerManager,
		PodCIDR:     s.cfg.Network.PodCIDR,
		NodeMask:    s.cfg.Network.NodeMaskSize,
		ServiceCIDR: s.cfg.Network.ServiceCIDR,
	})
}

func (s *Server) runScheduler(ctx context.Context) error {
	return scheduler.Run(ctx, scheduler.Config{Files: s.files, Port: s.cfg.Ports.Scheduler})
}

func (s *Server) applyObjects(ctx context.Context, client *rest.Config) error {
	authority, err := os.ReadFile(s.files.CACert(pki.ClusterCA))
	if err != nil {
		return fmt.Errorf("bootstrap objects: reading the authority: %w", err)
	}
	return bootstrap.Apply(ctx, bootstrap.Config{
		Client:        client,
		DNSServiceIP:  s.cfg.Network.DNSServiceIP,
		DNSEndpoint:   s.cfg.Network.DNSEndpoint,
		DNSPort:       s.cfg.Network.DNSPort,
		NodeName:      s.cfg.NodeName,
		NodeIP:        s.cfg.NodeIP,
		Portal:        s.cfg.Ports.Portal,
		DatastorePath: s.cfg.DatastorePath,
		Version:       s.cfg.Version,
		WebhookPort:   s.cfg.Ports.Webhook,
		WebhookCA:     authority,
		Logger:        s.cfg.Logger,
	})
}

// runSnapshotController binds snapshots to what the agents have taken.
func (s *Server) runSnapshotController(ctx context.Context) error {
	return snapshots.Run(ctx, s.files.Kubeconfig(pki.SnapshotController))
}

// adminClient reaches the API server of this process.
func (s *Server) adminClient() *rest.Config {
	return &rest.Config{
		Host: apiURL("127.0.0.1", s.cfg.Ports.API),
		QPS:  -1,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile:   s.files.CACert(pki.ClusterCA),
			CertFile: s.files.Cert(pki.Admin),
			KeyFile:  s.files.Key(pki.Admin),
		},
	}
}

// waitReady polls the API server's readiness endpoint.
func waitReady(ctx context.Context, cfg *rest.Config) error {
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return err
	}
	return wait.PollUntilContextCancel(ctx, 100*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, cfg.Host+"/readyz", nil)
		if err != nil {
			return false, err
		}
		answer, err := client.Do(req)
		if err != nil {
			return false, nil
		}
		_ = answer.Body.Close()
		return answer.StatusCode == http.StatusOK, nil
	})
}

// waitFor reports whether ready was closed before ctx ended.
func waitFor(ctx context.Context, ready <-chan struct{}) bool {
	select {
	case <-ready:
		return true
	case <-ctx.Done():
		return false
	}
}

func apiURL(host string, port int) string {
	return "https://" + net.JoinHostPort(host, strconv.Itoa(port))
}

// hostAddrs lists the addresses of this host that others may use.
func hostAddrs() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("listing host addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		prefix, err := netip.ParsePrefix(a.String())
		if err != nil {
			return nil, errors.Join(errors.New("listing host addresses"), err)
		}
		if addr := prefix.Addr().Unmap(); addr.IsGlobalUnicast() {
			out = append(out, addr)
		}
	}
	return out, nil
}
