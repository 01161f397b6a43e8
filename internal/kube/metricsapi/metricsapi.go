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
	"maps"
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
	openapicommon "k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"sigs.k8s.io/metrics-server/pkg/api"
	generatedopenapi "sigs.k8s.io/metrics-server/pkg/api/generated/openapi"
	"sigs.k8s.io/metrics-server/pkg/scraper"
	"sigs.k8s.io/metrics-server/pkg/storage"
)

const (
	// resolution is the scrape interval. kubelet collects every ten seconds.
	resolution = 15 * time.Second
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

// AddOpenAPI adds the types of the metrics API to the OpenAPI definitions of an
// API server's configuration. It must be called before the server is made.
func AddOpenAPI(cfg *genericapiserver.Config) {
	namer := openapinamer.NewDefinitionNamer(api.Scheme)
	extra := generatedopenapi.GetOpenAPIDefinitions(func(string) spec.Ref { return spec.Ref{} })
	for name := range cfg.OpenAPIV3Config.Definitions {
		delete(extra, name)
	}

	v2 := *cfg.OpenAPIConfig
	v2.GetDefinitions = merged(v2.GetDefinitions, extra)
	v2.GetDefinitionName = names(v2.GetDefinitionName, namer.GetDefinitionName, extra)
	cfg.OpenAPIConfig = &v2

	v3 := *cfg.OpenAPIV3Config
	v3.GetDefinitions = merged(v3.GetDefinitions, extra)
	v3.GetDefinitionName = names(v3.GetDefinitionName, namer.GetDefinitionName, extra)
	v3.Definitions = maps.Clone(v3.Definitions)
	reference := func(name string) spec.Ref {
		defName, _ := v3.GetDefinitionName(name)
		return spec.MustCreateRef("#/components/schemas/" + openapicommon.EscapeJsonPointer(defName))
	}
	for name, def := range generatedopenapi.GetOpenAPIDefinitions(reference) {
		if _, ours := extra[name]; ours {
			v3.Definitions[name] = def
		}
	}
	cfg.OpenAPIV3Config = &v3
}

// merged adds the definitions named in extra to what base returns.
func merged(base openapicommon.GetOpenAPIDefinitions, extra map[string]openapicommon.OpenAPIDefinition) openapicommon.GetOpenAPIDefinitions {
	return func(ref openapicommon.ReferenceCallback) map[string]openapicommon.OpenAPIDefinition {
		all := base(ref)
		for name, def := range generatedopenapi.GetOpenAPIDefinitions(ref) {
			if _, ours := extra[name]; ours {
				all[name] = def
			}
		}
		return all
	}
}

// names uses ours for the definitions in extra and base for all others.
func names(base, ours func(string) (string, spec.Extensions), extra map[string]openapicommon.OpenAPIDefinition) func(string) (string, spec.Extensions) {
	return func(name string) (string, spec.Extensions) {
		if _, ok := extra[name]; ok {
			return ours(name)
		}
		return base(name)
	}
}
