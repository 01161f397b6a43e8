package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"atoll.dev/atoll/bench/report"
)

const (
	settleEvery = 15 * time.Second
	settleLeast = 90 * time.Second // the server gives back what its start took a minute later
	settleMost  = 4 * time.Minute
)

// residentMemory reports what the services keep in memory when they have nothing to do, part by part: once the sum
// does not shrink any more, since a start leaves them with more than they need.
func residentMemory(ctx context.Context, h *host) ([]Row, error) {
	total, parts, err := h.resident(ctx)
	for begun := time.Now(); err == nil && time.Since(begun) < settleMost; {
		time.Sleep(settleEvery)
		before := total
		if total, parts, err = h.resident(ctx); total > 0.98*before && time.Since(begun) > settleLeast {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	rows := []Row{{Measure: "resident memory, all services", Unit: "MiB", Atoll: Value{P50: total}}}
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		rows = append(rows, Row{Measure: "  " + name, Unit: "MiB", Atoll: Value{P50: parts[name]}})
	}
	return rows, nil
}

// resident adds up what the services have in memory now, in MiB. Pages that several of them share, such as those of
// the program, count once.
func (h *host) resident(ctx context.Context) (total float64, parts map[string]float64, err error) {
	out, err := exec.CommandContext(ctx, "pgrep", "-f", "-a", h.o.dataDir).Output()
	if err != nil {
		return 0, nil, fmt.Errorf("looking for the services: %w", err)
	}
	parts = map[string]float64{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || !strings.HasPrefix(filepath.Base(fields[1]), "atoll") || strings.Contains(line, "shim-daemon") {
			continue
		}
		mib := statusField("/proc/"+fields[0]+"/smaps_rollup", "Pss:") / 1024
		parts[filepath.Base(fields[1])+" "+fields[2]] += mib
		total += mib
	}
	return total, parts, nil
}

// statusField reads a "Name:   123 kB" line.
func statusField(path, name string) float64 { return report.StatusField(path, name) }

// idleMemory runs many idle pods at once and takes the slope of the host's available memory.
func idleMemory(ctx context.Context, h *host) ([]Row, error) {
	available := func() float64 { return statusField("/proc/meminfo", "MemAvailable:") / 1024 }
	if err := h.fullPool(ctx); err != nil {
		return nil, err
	}
	before, begin := available(), time.Now()
	pods := h.kube.CoreV1().Pods(benchNamespace)
	for i := range h.o.idle {
		if _, err := pods.Create(ctx, benchPod(fmt.Sprintf("idle-%d", i), "atoll"), metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	}
	running := 0
	for deadline := time.Now().Add(30 * time.Minute); running < h.o.idle && time.Now().Before(deadline); time.Sleep(2 * time.Second) {
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
		fmt.Fprintf(os.Stderr, "bench: idle: %d of %d run, %.0f MiB available\n", running, h.o.idle, available())
	}
	took := time.Since(begin)
	if err := h.fullPool(ctx); err != nil {
		return nil, err
	}
	after := available()
	rows := []Row{
		{Measure: "idle pods running at once", Unit: "pods", Atoll: Value{P50: float64(running)}, Note: fmt.Sprintf("all created at once, in %.0f s", took.Seconds())},
		{Measure: "host memory per idle pod, all in", Unit: "MiB", N: running, Atoll: Value{P50: (before - after) / float64(max(1, running))}, Note: "slope of MemAvailable"},
	}
	return rows, h.deletePods(ctx)
}
