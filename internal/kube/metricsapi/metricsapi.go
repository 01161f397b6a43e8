// Package metricsapi serves metrics.k8s.io/v1beta1, the API behind
// `kubectl top` and the horizontal pod autoscaler.
//
// It is metrics-server's scraper and storage, installed into the API server that
// serves the built-in types: no second process, no second port, no aggregation.
// Every 15 seconds it reads /metrics/resource of each node's kubelet. It keeps
// the last two points only; it is not a monitoring system. internal/kube/apiserver
// calls it.
//
// What can go wrong: a kubelet that does not answer has no metrics until it does.
package metricsapi

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"sigs.k8s.io/metrics-server/pkg/api"
	"sigs.k8s.io/metrics-server/pkg/scraper"
	"sigs.k8s.io/metrics-server/pkg/storage"
)

const (
	// resolution is the scrape interval. kubelet collects every ten seconds.
	resolution = 15 * time.Second
	// definitionPrefix starts the OpenAPI name of every type of the API.
	definitionPrefix = "io.k8s.metrics.pkg.apis.metrics."
	// scrapeTimeout bounds one kubelet's answer.
	scrapeTimeout = 10 * time.Second
)

// Config of the metrics API.
type Config struct {
	// Server gets the API group; it must not have been prepared to run yet.
	Server *genericapiserver.GenericAPIServer
	// Loopback is the API server's client for itself.
	Loopback *rest.Config

	KubeletCA         string
	KubeletClientCert string
	KubeletClientKey  string
	// KubeletPort is used for nodes that do not report theirs.
	KubeletPort int
}

// Metrics collects what the API serves.
type Metrics struct {
	store   storage.Storage
	scraper scraper.Scraper
	pods    metadatainformer.SharedInformerFactory
	nodes   informers.SharedInformerFactory
}

// Install adds the API group to the server. The group serves no metrics until
// Start was called.
func Install(cfg Config) (*Metrics, error) {
	clientset, err := kubernetes.NewForConfig(cfg.Loopback)
	if err != nil {
		return nil, fmt.Errorf("resource metrics: %w", err)
	}
	// The metadata client speaks JSON and protobuf by itself.
	metaConfig := rest.CopyConfig(cfg.Loopback)
	metaConfig.ContentType = ""
	metaClient, err := metadata.NewForConfig(metaConfig)
	if err != nil {
		return nil, fmt.Errorf("resource metrics: %w", err)
	}
	kubelets, err := newKubelets(cfg)
	if err != nil {
		return nil, fmt.Errorf("resource metrics: %w", err)
	}
	m := &Metrics{
		store: storage.NewStorage(resolution),
		nodes: informers.NewSharedInformerFactory(clientset, 0),
		pods: metadatainformer.NewFilteredSharedInformerFactory(metaClient, 0, corev1.NamespaceAll, func(o *metav1.ListOptions) {
			o.FieldSelector = "status.phase=Running"
		}),
	}
	nodes := m.nodes.Core().V1().Nodes()
	pods := m.pods.ForResource(corev1.SchemeGroupVersion.WithResource("pods"))
	m.scraper = scraper.NewScraper(nodes.Lister(), kubelets, scrapeTimeout, nil)
	// Ask for the informers now, so that Start finds them.
	nodes.Informer()
	pods.Informer()
	if err := api.Install(m.store, pods.Lister(), nodes.Lister(), cfg.Server, nil); err != nil {
		return nil, fmt.Errorf("resource metrics: %w", err)
	}
	return m, nil
}

// Start collects in the background until ctx ends.
func (m *Metrics) Start(ctx context.Context) {
	m.nodes.Start(ctx.Done())
	m.pods.Start(ctx.Done())
	go func() {
		nodes := m.nodes.Core().V1().Nodes().Informer()
		if !cache.WaitForCacheSync(ctx.Done(), nodes.HasSynced) {
			return
		}
		wait.UntilWithContext(ctx, m.collect, resolution)
	}()
}

// collect scrapes all kubelets once.
func (m *Metrics) collect(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, resolution)
	defer cancel()
	m.store.Store(m.scraper.Scrape(ctx))
}

// AddOpenAPI tells an API server's OpenAPI documents the kinds of the metrics
// API; their definitions are among upstream's own. It must be called before the
// server is made.
func AddOpenAPI(cfg *genericapiserver.Config) {
	ours := openapinamer.NewDefinitionNamer(api.Scheme).GetDefinitionName
	v2 := *cfg.OpenAPIConfig
	v2.GetDefinitionName = names(v2.GetDefinitionName, ours)
	cfg.OpenAPIConfig = &v2
	v3 := *cfg.OpenAPIV3Config
	v3.GetDefinitionName = names(v3.GetDefinitionName, ours)
	cfg.OpenAPIV3Config = &v3
}

// namer returns the name of a definition and what to add to it.
type namer = func(string) (string, spec.Extensions)

// names uses ours for the types of the metrics API and base for all others.
func names(base, ours namer) namer {
	return func(name string) (string, spec.Extensions) {
		if strings.HasPrefix(name, definitionPrefix) {
			return ours(name)
		}
		return base(name)
	}
}
