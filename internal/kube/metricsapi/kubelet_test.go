package metricsapi

import (
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

const sample = `# HELP container_cpu_usage_seconds_total Cumulative cpu time consumed by the container in core-seconds
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container="web",namespace="default",pod="web-1"} 12.5 1700000000000
container_cpu_usage_seconds_total{container="log",namespace="default",pod="web-1"} 0.25 1700000001000
container_cpu_usage_seconds_total{container="idle",namespace="default",pod="new"} 0 1700000001000
# TYPE container_memory_working_set_bytes gauge
container_memory_working_set_bytes{container="web",namespace="default",pod="web-1"} 1.048576e+06 1700000000000
container_memory_working_set_bytes{container="log",namespace="default",pod="web-1"} 4096 1700000001000
container_memory_working_set_bytes{container="idle",namespace="default",pod="new"} 4096 1700000001000
# TYPE container_start_time_seconds gauge
container_start_time_seconds{container="web",namespace="default",pod="web-1"} 1.6e+09
# TYPE node_cpu_usage_seconds_total counter
node_cpu_usage_seconds_total 100 1700000002000
# TYPE node_memory_working_set_bytes gauge
node_memory_working_set_bytes 2.5e+09 1700000002000
`

func TestParse(t *testing.T) {
	batch, err := parse(strings.NewReader(sample), "n1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	node := batch.Nodes["n1"]
	if node.CumulativeCPUUsed != 100e9 || node.MemoryUsage != 2.5e9 || !node.Timestamp.Equal(time.Unix(1700000002, 0)) {
		t.Errorf("node %+v", node)
	}
	web := batch.Pods[types.NamespacedName{Namespace: "default", Name: "web-1"}].Containers["web"]
	if web.CumulativeCPUUsed != 12.5e9 || web.MemoryUsage != 1<<20 || !web.StartTime.Equal(time.Unix(1.6e9, 0)) {
		t.Errorf("container %+v", web)
	}
	if len(batch.Pods) != 1 {
		t.Errorf("pods %+v: one without CPU time must be left out", batch.Pods)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, text := range []string{
		"container_cpu_usage_seconds_total{namespace=\"a\"} 1\n",
		"not a metric at all {{{\n",
	} {
		if _, err := parse(strings.NewReader(text), "n1", time.Now()); err == nil {
			t.Errorf("no error for %q", text)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample)
	f.Fuzz(func(t *testing.T, text string) {
		if batch, err := parse(strings.NewReader(text), "n1", time.Now()); err == nil && batch == nil {
			t.Fatal("no batch and no error")
		}
	})
}
