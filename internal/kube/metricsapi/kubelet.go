package metricsapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/metrics-server/pkg/storage"
	"sigs.k8s.io/metrics-server/pkg/utils"
)

// maxAnswer bounds what is read from one kubelet: about 1 KiB for each of the
// containers a node can hold, many times over.
const maxAnswer = 32 << 20

// kubelets reads resource metrics from kubelets.
type kubelets struct {
	client      *http.Client
	addresses   utils.NodeAddressResolver
	defaultPort int
}

func newKubelets(cfg Config) (*kubelets, error) {
	client, err := rest.HTTPClientFor(&rest.Config{
		Timeout: scrapeTimeout,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile:   cfg.KubeletCA,
			CertFile: cfg.KubeletClientCert,
			KeyFile:  cfg.KubeletClientKey,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("kubelet client: %w", err)
	}
	return &kubelets{
		client:      client,
		addresses:   utils.NewPriorityNodeAddressResolver([]corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP, corev1.NodeHostName}),
		defaultPort: cfg.KubeletPort,
	}, nil
}

// GetMetrics implements client.KubeletMetricsGetter.
func (k *kubelets) GetMetrics(ctx context.Context, node *corev1.Node) (*storage.MetricsBatch, error) {
	host, err := k.addresses.NodeAddress(node)
	if err != nil {
		return nil, err
	}
	port := k.defaultPort
	if reported := int(node.Status.DaemonEndpoints.KubeletEndpoint.Port); reported != 0 {
		port = reported
	}
	target := url.URL{Scheme: "https", Host: net.JoinHostPort(host, strconv.Itoa(port)), Path: "/metrics/resource"}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	answer, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("reading %s: %s", target.String(), answer.Status)
	}
	return parse(io.LimitReader(answer.Body, maxAnswer), node.Name, time.Now())
}

// parse reads the text format of /metrics/resource. Samples without a time of
// their own get the given one. Containers and nodes whose CPU or memory is not
// known are left out.
func parse(r io.Reader, node string, now time.Time) (*storage.MetricsBatch, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(r)
	if err != nil {
		return nil, fmt.Errorf("parsing metrics of node %s: %w", node, err)
	}
	var nodePoint storage.MetricsPoint
	containers := make(map[types.NamespacedName]map[string]storage.MetricsPoint)
	for _, series := range []struct {
		name string
		set  func(point *storage.MetricsPoint, value float64, at time.Time)
	}{
		{"cpu_usage_seconds_total", func(p *storage.MetricsPoint, v float64, at time.Time) {
			p.CumulativeCPUUsed, p.Timestamp = uint64(v*1e9), at
		}},
		{"memory_working_set_bytes", func(p *storage.MetricsPoint, v float64, _ time.Time) { p.MemoryUsage = uint64(v) }},
		{"start_time_seconds", func(p *storage.MetricsPoint, v float64, _ time.Time) { p.StartTime = time.Unix(0, int64(v*1e9)) }},
	} {
		for _, sample := range families["node_"+series.name].GetMetric() {
			series.set(&nodePoint, value(sample), sampleTime(sample, now))
		}
		for _, sample := range families["container_"+series.name].GetMetric() {
			pod, container, err := owner(sample)
			if err != nil {
				return nil, fmt.Errorf("parsing metrics of node %s: %w", node, err)
			}
			if containers[pod] == nil {
				containers[pod] = make(map[string]storage.MetricsPoint)
			}
			point := containers[pod][container]
			series.set(&point, value(sample), sampleTime(sample, now))
			containers[pod][container] = point
		}
	}
	return batch(node, nodePoint, containers), nil
}

// batch keeps what is complete.
func batch(node string, nodePoint storage.MetricsPoint, containers map[types.NamespacedName]map[string]storage.MetricsPoint) *storage.MetricsBatch {
	complete := func(p storage.MetricsPoint) bool { return p.CumulativeCPUUsed != 0 && p.MemoryUsage != 0 }
	out := &storage.MetricsBatch{
		Nodes: make(map[string]storage.MetricsPoint),
		Pods:  make(map[types.NamespacedName]storage.PodMetricsPoint),
	}
	if complete(nodePoint) {
		out.Nodes[node] = nodePoint
	}
	for pod, points := range containers {
		all := true
		for _, p := range points {
			all = all && complete(p)
		}
		if all {
			out.Pods[pod] = storage.PodMetricsPoint{Containers: points}
		}
	}
	return out
}

func value(sample *dto.Metric) float64 {
	switch {
	case sample.Counter != nil:
		return sample.GetCounter().GetValue()
	case sample.Gauge != nil:
		return sample.GetGauge().GetValue()
	default:
		return sample.GetUntyped().GetValue()
	}
}

func sampleTime(sample *dto.Metric, now time.Time) time.Time {
	if sample.TimestampMs != nil {
		return time.UnixMilli(sample.GetTimestampMs())
	}
	return now
}

// owner reads which container a sample is about.
func owner(sample *dto.Metric) (pod types.NamespacedName, container string, err error) {
	for _, label := range sample.GetLabel() {
		switch label.GetName() {
		case "namespace":
			pod.Namespace = label.GetValue()
		case "pod":
			pod.Name = label.GetValue()
		case "container":
			container = label.GetValue()
		}
	}
	if pod.Name == "" || pod.Namespace == "" || container == "" {
		return pod, "", errors.New("a container sample lacks its labels")
	}
	return pod, container, nil
}
