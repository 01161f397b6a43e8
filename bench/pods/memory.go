package pods

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"atoll.dev/atoll/bench/rig"
)

const (
	settleEvery = 15 * time.Second
	settleLeast = 90 * time.Second // the server gives back what its start took a minute later
	settleMost  = 4 * time.Minute
)

// ResidentMemory reports what the services keep in memory when they have nothing to do, part by part: once the sum
// does not shrink any more, since a start leaves them with more than they need.
func ResidentMemory(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	total, parts, err := h.Resident(ctx)
	for begun := time.Now(); err == nil && time.Since(begun) < settleMost; {
		time.Sleep(settleEvery)
		before := total
		if total, parts, err = h.Resident(ctx); total > 0.98*before && time.Since(begun) > settleLeast {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	rows := []rig.Row{{Measure: "resident memory, all services", Unit: "MiB", Atoll: rig.Value{P50: total}}}
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		rows = append(rows, rig.Row{Measure: "  " + name, Unit: "MiB", Atoll: rig.Value{P50: parts[name]}})
	}
	return rows, nil
}

// IdleMemory runs many idle pods at once and takes the slope of the host's available memory.
func IdleMemory(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	available := func() float64 { return rig.StatusField("/proc/meminfo", "MemAvailable:") / 1024 }
	if err := h.FullPool(ctx); err != nil {
		return nil, err
	}
	before, begin := available(), time.Now()
	pods := h.Kube.CoreV1().Pods(rig.Namespace)
	for i := range h.Options.Idle {
		if _, err := pods.Create(ctx, rig.Pod(fmt.Sprintf("idle-%d", i), "atoll"), metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	}
	running := 0
	for deadline := time.Now().Add(30 * time.Minute); running < h.Options.Idle && time.Now().Before(deadline); time.Sleep(2 * time.Second) {
		list, err := pods.List(ctx, metav1.ListOptions{})
		if err != nil {
			continue
		}
		running = 0
		for _, pod := range list.Items {
			if pod.Status.Phase == corev1.PodRunning {
				running++
			}
		}
		fmt.Fprintf(os.Stderr, "bench: idle: %d of %d run, %.0f MiB available\n", running, h.Options.Idle, available())
	}
	took := time.Since(begin)
	if err := h.FullPool(ctx); err != nil {
		return nil, err
	}
	after := available()
	rows := []rig.Row{
		{Measure: "idle pods running at once", Unit: "pods", Atoll: rig.Value{P50: float64(running)}, Note: fmt.Sprintf("all created at once, in %.0f s", took.Seconds())},
		{Measure: "host memory per idle pod, all in", Unit: "MiB", N: running, Atoll: rig.Value{P50: (before - after) / float64(max(1, running))}, Note: "slope of MemAvailable"},
	}
	return rows, h.DeletePods(ctx)
}
