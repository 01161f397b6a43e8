package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/containerd/images"
	"atoll.dev/atoll/internal/kube/dns"
	"atoll.dev/atoll/internal/kube/kubelet"
	"atoll.dev/atoll/internal/kube/logging"
	"atoll.dev/atoll/internal/kube/node"
	"atoll.dev/atoll/internal/kube/proxy"
	"atoll.dev/atoll/internal/kube/snapshots"
	"atoll.dev/atoll/internal/linux/heap"
	"atoll.dev/atoll/internal/linux/textpages"
)

// pollEvery is the pause between two looks at something that must appear.
const pollEvery = 200 * time.Millisecond

// Agent is one node.
type Agent struct {
	cfg   Config
	files pki.Files
}

// New checks the configuration and touches nothing.
func New(cfg Config) (*Agent, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("agent configuration: %w", err)
	}
	return &Agent{cfg: cfg, files: pki.Files{Dir: cfg.PKIDir, KubeconfigDir: cfg.KubeconfigDir}}, nil
}

// Run waits for the node's credentials and the container runtime, starts the
// kubelet, and when the Node exists the proxy and DNS. It holds until ctx ends
// and returns nil, or until a component fails and returns its error. Pods keep
// running when it ends.
func (a *Agent) Run(ctx context.Context) error {
	logging.Install(a.cfg.Logger)
	logging.InstallStd(a.cfg.Logger)
	if err := snapshots.Prepare(); err != nil {
		return fmt.Errorf("preparing snapshots: %w", err)
	}
	for _, path := range a.credentials() {
		if err := a.await(ctx, "credentials", path, exists); err != nil {
			return ended(ctx, err)
		}
	}
	if err := a.await(ctx, "container runtime", a.cfg.ContainerdSocket, answers); err != nil {
		return ended(ctx, err)
	}
	resolver, err := readResolver(a.cfg.Network.ResolvConf, a.cfg.StateDir)
	if err != nil {
		return err
	}

	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var components sync.WaitGroup
	defer components.Wait()
	launch := func(run func(context.Context) error) {
		components.Go(func() {
			if err := run(running); err != nil {
				fail(err)
			}
		})
	}
	launch(heap.Run)
	launch(func(ctx context.Context) error { return a.runKubelet(ctx, resolver) })
	launch(func(ctx context.Context) error { return a.runDNS(ctx, resolver) })
	launch(a.runStorage)
	launch(a.runMachines)
	launch(a.runRegistries)
	launch(a.runPolicies)
	launch(func(ctx context.Context) error {
		if err := a.describeNode(ctx); err != nil {
			return ended(ctx, err)
		}
		return a.runProxy(ctx)
	})
	launch(func(ctx context.Context) error {
		a.reportReady(ctx)
		return textpages.Run(ctx)
	})
	<-running.Done()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(running)
}

// credentials are the files that must exist before anything can start.
func (a *Agent) credentials() []string {
	return []string{
		a.files.CACert(pki.ClusterCA),
		a.files.Kubeconfig(pki.Kubelet), a.files.Cert(pki.Kubelet), a.files.Key(pki.Kubelet),
		a.files.Cert(pki.KubeletServing), a.files.Key(pki.KubeletServing),
		a.files.Kubeconfig(pki.KubeProxy), a.files.Cert(pki.KubeProxy), a.files.Key(pki.KubeProxy),
		a.files.Kubeconfig(pki.CoreDNS), a.files.Cert(pki.CoreDNS), a.files.Key(pki.CoreDNS),
		a.files.Kubeconfig(pki.Storage), a.files.Cert(pki.Storage), a.files.Key(pki.Storage),
		a.files.Kubeconfig(pki.NetworkPolicy), a.files.Cert(pki.NetworkPolicy), a.files.Key(pki.NetworkPolicy),
	}
}

// await polls until ok(path), saying once what it waits for.
func (a *Agent) await(ctx context.Context, what, path string, ok func(string) bool) error {
	if ok(path) {
		return nil
	}
	a.cfg.Logger.Info("waiting", "for", what, "path", path)
	return wait.PollUntilContextCancel(ctx, pollEvery, false, func(context.Context) (bool, error) {
		return ok(path), nil
	})
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func answers(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

func (a *Agent) runKubelet(ctx context.Context, r resolver) error {
	local, err := images.New(images.Config{Address: a.cfg.ContainerdSocket})
	if err != nil {
		return err
	}
	defer func() { _ = local.Close() }()
	return kubelet.Run(ctx, kubelet.Config{
		Files:        a.files,
		Dir:          a.cfg.KubeletDir,
		PodLogsDir:   a.cfg.PodLogsDir,
		StateDir:     a.cfg.StateDir,
		Socket:       a.cfg.ContainerdSocket,
		ImageSocket:  filepath.Join(a.cfg.RunDir, "images.sock"),
		OwnedImages:  local,
		NodeName:     a.cfg.NodeName,
		NodeIP:       a.cfg.NodeIP,
		NodeLabels:   a.cfg.NodeLabels,
		MaxPods:      a.cfg.MaxPods,
		CgroupRoot:   a.cfg.CgroupRoot,
		CgroupRecord: a.cfg.CgroupRecord,
		Port:         a.cfg.Ports.Kubelet,
		HealthPort:   a.cfg.Ports.KubeletHealth,
		DNSServiceIP: a.cfg.Network.DNSServiceIP,
		Domain:       a.cfg.Network.Domain,
		ResolvConf:   r.path,

		CredentialDir: a.cfg.CredentialDir,
		RegistryHosts: []string{atoll.RegistryHost, a.registryAddress()},
	})
}

func (a *Agent) runDNS(ctx context.Context, r resolver) error {
	return dns.Run(ctx, dns.Config{
		Kubeconfig: a.files.Kubeconfig(pki.CoreDNS),
		Address:    a.cfg.Network.BridgeAddress,
		Port:       a.cfg.Ports.DNS,
		ReadyPort:  a.cfg.Ports.DNSReady,
		Domain:     a.cfg.Network.Domain,
		Upstreams:  r.upstreams,
		Logger:     a.cfg.Logger,
	})
}

func (a *Agent) runProxy(ctx context.Context) error {
	return proxy.Run(ctx, proxy.Config{
		Files:       a.files,
		StateDir:    a.cfg.StateDir,
		NodeName:    a.cfg.NodeName,
		PodCIDR:     a.cfg.Network.PodCIDR,
		HealthPort:  a.cfg.Ports.ProxyHealth,
		MetricsPort: a.cfg.Ports.ProxyMetrics,
	})
}

// describeNode waits for the Node the kubelet registers and keeps its labels and
// version true. The kubelet sets labels only when it registers.
func (a *Agent) describeNode(ctx context.Context) error {
	return node.Describe(ctx, node.Config{
		Kubeconfig: a.files.Kubeconfig(pki.Kubelet),
		Name:       a.cfg.NodeName,
		Labels:     a.cfg.NodeLabels,
		Version:    a.cfg.Version,
	})
}

// reportReady calls OnReady when kubelet and proxy answer.
func (a *Agent) reportReady(ctx context.Context) {
	urls := []string{
		fmt.Sprintf("http://127.0.0.1:%d/healthz", a.cfg.Ports.KubeletHealth),
		fmt.Sprintf("http://127.0.0.1:%d/healthz", a.cfg.Ports.ProxyHealth),
	}
	client := &http.Client{Timeout: time.Second}
	err := wait.PollUntilContextCancel(ctx, pollEvery, true, func(ctx context.Context) (bool, error) {
		for _, url := range urls {
			if !healthy(ctx, client, url) {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return
	}
	a.cfg.Logger.Info("agent ready", "node", a.cfg.NodeName)
	if a.cfg.OnReady != nil {
		a.cfg.OnReady()
	}
}

func healthy(ctx context.Context, client *http.Client, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	answer, err := client.Do(req)
	if err != nil {
		return false
	}
	_ = answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

// ended turns the error of a wait that was cut short by ctx into nil.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
