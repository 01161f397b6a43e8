// Package apiserver runs kube-apiserver in the server process.
//
// It is the upstream API server with upstream options, given as the flags a
// kube-apiserver process would get (see flags), plus two things of our own: the
// admission plugins of internal/kube/admission, and the resource metrics API and the consoles of
// virtual machines, which are served by the same process instead of an aggregated one. The server role calls it.
//
// Security: Node and RBAC authorization, NodeRestriction, anonymous requests only
// for the health endpoints, secrets encrypted in etcd, audit log, TLS 1.2 or
// newer, no profiling, kubelets verified against the cluster's authority.
//
// What can go wrong: the port is busy, etcd is away, the encryption key is
// missing although there is data. All end Run with an error.
package apiserver

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/plugin/pkg/admission/runtimeclass"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/admission/machinepods"
	"atoll.dev/atoll/internal/kube/admission/namespacebounds"
	"atoll.dev/atoll/internal/kube/admission/podruntime"
	"atoll.dev/atoll/internal/kube/imagecontent"
	"atoll.dev/atoll/internal/kube/metricsapi"
	"atoll.dev/atoll/internal/kube/subresources"
	"atoll.dev/atoll/internal/storage/library"
)

// Config of an API server.
type Config struct {
	Files pki.Files
	// StateDir holds the generated configuration files.
	StateDir string
	// HasData reports whether etcd already holds a cluster; then a missing
	// encryption key is an error instead of a reason to make one.
	HasData  bool
	AuditLog string

	BindAddress netip.Addr
	Port        int
	// Advertise is the endpoint address of the Service kubernetes.
	Advertise   netip.Addr
	EtcdPort    int
	KubeletPort int
	ServiceCIDR netip.Prefix
	Domain      string
	// ContentDir is the library of images of virtual machines.
	ContentDir string
	// Identity is the port on 127.0.0.1 where tokens of local sessions are known.
	Identity int
	Logger   *slog.Logger
}

// shutdownTimeout is how long connections may stay open when the server stops.
const shutdownTimeout = 3 * time.Second

// tokenCache is how long the API server takes a token for good without looking again; webhookCache is how long it
// keeps an answer about the token of a session. Together they are how long a revoked session may go on.
const (
	tokenCache   = 2 * time.Second
	webhookCache = time.Second
)

// APIServer is one kube-apiserver.
type APIServer struct {
	cfg    Config
	bounds *namespacebounds.Source
}

// New takes a complete configuration.
func New(cfg Config) *APIServer { return &APIServer{cfg: cfg, bounds: namespacebounds.NewSource()} }

// Run writes the configuration files and serves until ctx ends.
func (s *APIServer) Run(ctx context.Context) error {
	if err := s.writeFiles(); err != nil {
		return fmt.Errorf("configuring API server: %w", err)
	}
	opts, err := s.options(ctx)
	if err != nil {
		return fmt.Errorf("configuring API server: %w", err)
	}
	prepared, err := s.build(opts)
	if err != nil {
		return fmt.Errorf("building API server: %w", err)
	}
	if err := prepared.Run(ctx); err != nil {
		return fmt.Errorf("running API server: %w", err)
	}
	return nil
}

// options turns the flags into completed, valid options.
func (s *APIServer) options(ctx context.Context) (options.CompletedOptions, error) {
	opts := options.NewServerRunOptions()
	fs := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, set := range opts.Flags().FlagSets {
		fs.AddFlagSet(set)
	}
	if err := fs.Parse(s.flags()); err != nil {
		return options.CompletedOptions{}, fmt.Errorf("parsing flags: %w", err)
	}
	// A session that is ended must not go on for long.
	opts.Authentication.TokenSuccessCacheTTL = tokenCache
	registerAdmission(opts, s.bounds)
	if err := opts.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return options.CompletedOptions{}, fmt.Errorf("setting feature gates: %w", err)
	}
	completed, err := opts.Complete(ctx)
	if err != nil {
		return options.CompletedOptions{}, fmt.Errorf("completing options: %w", err)
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return options.CompletedOptions{}, fmt.Errorf("validating options: %w", utilerrors.NewAggregate(errs))
	}
	return completed, nil
}

// registerAdmission puts AtollPodRuntime in front of RuntimeClass, which reads
// what it decided, and AtollMachinePods and AtollNamespaceBounds before it.
func registerAdmission(opts *options.ServerRunOptions, bounds *namespacebounds.Source) {
	generic := opts.Admission.GenericAdmission
	podruntime.Register(generic.Plugins)
	machinepods.Register(generic.Plugins)
	namespacebounds.Register(generic.Plugins, bounds)
	order := slices.Clone(generic.RecommendedPluginOrder)
	at := slices.Index(order, runtimeclass.PluginName)
	generic.RecommendedPluginOrder = slices.Insert(order, max(at, 0), machinepods.PluginName, namespacebounds.PluginName, podruntime.PluginName)
	generic.Decorators = slices.Insert(slices.Clone(generic.Decorators), 0, namespacebounds.Explain(bounds))
}

// preparedServer is a chain of API servers that is ready to run.
type preparedServer interface {
	Run(ctx context.Context) error
}

// build makes the chain of API servers.
func (s *APIServer) build(opts options.CompletedOptions) (preparedServer, error) {
	config, err := app.NewConfig(opts)
	if err != nil {
		return nil, err
	}
	metricsapi.AddOpenAPI(config.KubeAPIs.ControlPlane.Generic)
	for _, c := range []*genericapiserver.Config{config.KubeAPIs.ControlPlane.Generic, &config.ApiExtensions.GenericConfig.Config, &config.Aggregator.GenericConfig.Config} {
		subresources.LongRunning(c)
	}
	imagecontent.LongRunning(config.KubeAPIs.ControlPlane.Generic)
	imagecontent.LongRunning(&config.Aggregator.GenericConfig.Config)
	config.ApiExtensions.ExtraConfig.CRDRESTOptionsGetter = withoutWatchCache{config.ApiExtensions.ExtraConfig.CRDRESTOptionsGetter}
	completed, err := config.Complete()
	if err != nil {
		return nil, err
	}
	chain, err := app.CreateServerChain(completed)
	if err != nil {
		return nil, err
	}
	builtin, ok := chain.GenericAPIServer.NextDelegate().(*genericapiserver.GenericAPIServer)
	if !ok {
		return nil, fmt.Errorf("the aggregator delegates to %T", chain.GenericAPIServer.NextDelegate())
	}
	if err := s.addMetrics(chain.GenericAPIServer, builtin); err != nil {
		return nil, err
	}
	if err := subresources.Install(subresources.Config{Server: builtin, Loopback: chain.GenericAPIServer.LoopbackClientConfig, Logger: s.cfg.Logger}); err != nil {
		return nil, err
	}
	if err := s.addContent(chain.GenericAPIServer); err != nil {
		return nil, err
	}
	err = chain.GenericAPIServer.AddPostStartHook("atoll-namespace-bounds", func(hook genericapiserver.PostStartHookContext) error {
		go s.bounds.Run(hook.Context)
		return nil
	})
	if err != nil {
		return nil, err
	}
	// Open watches hold their connections; clients open them anew elsewhere or
	// later, so there is nothing to wait a minute for.
	chain.GenericAPIServer.ShutdownTimeout = shutdownTimeout
	prepared, err := chain.PrepareRun()
	if err != nil {
		return nil, err
	}
	// The OpenAPI documents are built now. What they were built from is made
	// again when it is needed, and is too large to keep until then.
	config.KubeAPIs.ControlPlane.Generic.OpenAPIV3Config.Definitions = nil
	config.ApiExtensions.GenericConfig.OpenAPIV3Config.Definitions = nil
	return prepared, nil
}

// addContent adds the bytes of images of virtual machines to the aggregator itself.
func (s *APIServer) addContent(aggregator *genericapiserver.GenericAPIServer) error {
	content, err := library.New(library.Config{Dir: s.cfg.ContentDir})
	if err != nil {
		return err
	}
	return imagecontent.Install(imagecontent.Config{
		Server: aggregator, Loopback: aggregator.LoopbackClientConfig, Library: content, Logger: s.cfg.Logger,
	})
}

// addMetrics adds the resource metrics API to the server behind the aggregator,
// the one that serves the built-in types.
func (s *APIServer) addMetrics(aggregator, builtin *genericapiserver.GenericAPIServer) error {
	metrics, err := metricsapi.Install(metricsapi.Config{
		Server:            builtin,
		Loopback:          aggregator.LoopbackClientConfig,
		KubeletCA:         s.cfg.Files.CACert(pki.ClusterCA),
		KubeletClientCert: s.cfg.Files.Cert(pki.APIServerKubeletClient),
		KubeletClientKey:  s.cfg.Files.Key(pki.APIServerKubeletClient),
		KubeletPort:       s.cfg.KubeletPort,
	})
	if err != nil {
		return err
	}
	return aggregator.AddPostStartHook("atoll-resource-metrics", func(hook genericapiserver.PostStartHookContext) error {
		metrics.Start(hook.Context)
		return nil
	})
}
