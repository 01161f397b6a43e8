package main

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// residentMemory reports what the services keep in memory, part by part.
func residentMemory(ctx context.Context, h *host) ([]Row, error) {
	out, err := exec.CommandContext(ctx, "pgrep", "-f", "-a", h.o.dataDir).Output()
	if err != nil {
		return nil, fmt.Errorf("looking for the services: %w", err)
	}
	parts := map[string]float64{}
	var total float64
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || !strings.HasPrefix(filepath.Base(fields[1]), "atoll") || strings.Contains(line, "shim-daemon") {
			continue
		}
		mib := rssMiB(fields[0])
		parts[filepath.Base(fields[1])+" "+fields[2]] += mib
		total += mib
	}
	rows := []Row{{Measure: "resident memory, all services", Unit: "MiB", Atoll: Value{P50: total}}}
	for name, mib := range parts {
		rows = append(rows, Row{Measure: "  " + name, Unit: "MiB", Atoll: Value{P50: mib}})
	}
	return rows, nil
}

func rssMiB(pid string) float64 {
	return statusField("/proc/"+pid+"/status", "VmRSS:") / 1024
}

// statusField reads a "Name:   123 kB" line.
func statusField(path, name string) float64 {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), name); ok {
			v, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return v
		}
	}
	return 0
}

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

// hostState counts what a leaking pod would leave behind.
func hostState(h *host) map[string]int {
	count := func(script string) int {
		out, _ := exec.Command("sh", "-c", script).Output()
		n, _ := strconv.Atoi(strings.TrimSpace(string(out)))
		return n
	}
	return map[string]int{
		"processes":  count("ps -e --no-headers | grep -c -E 'qemu|atoll|runc' || true"),
		"links":      count("ip -o link | wc -l"),
		"loops":      count("cat /sys/block/loop*/loop/backing_file 2>/dev/null | grep -c -e " + h.o.dataDir + " -e " + h.o.runDir + " || true"),
		"mounts":     count("wc -l < /proc/self/mounts"),
		"netns":      count("find /run/netns /var/run/netns " + h.o.runDir + " -path '*netns/*' 2>/dev/null | sort -u | wc -l"),
		"cgroups":    count("find /sys/fs/cgroup -type d -path '*kubepods*' | wc -l"),
		"files":      count("find " + h.o.dataDir + " " + h.o.runDir + " -type f -not -path '*/logs/*' -not -path '*/etcd/*' 2>/dev/null | wc -l"),
		"nft rules":  count("nft list ruleset 2>/dev/null | grep -c ' counter\\| dnat\\| masquerade' || true"),
		"memory MiB": int(statusField("/proc/meminfo", "MemAvailable:") / 1024),
	}
}

// leakCycles creates and deletes pods one after another and compares the host before and after.
func leakCycles(ctx context.Context, h *host) ([]Row, error) {
	cycle := func() error {
		s, _, err := h.startCRI(ctx, "atoll")
		if err == nil {
			h.stopCRI(s)
		}
		return err
	}
	for range 5 {
		if err := cycle(); err != nil {
			return nil, err
		}
	}
	if err := h.fullPool(ctx); err != nil {
		return nil, err
	}
	before := hostState(h)
	for i := range h.o.cycles {
		if err := cycle(); err != nil {
			return nil, fmt.Errorf("cycle %d: %w", i, err)
		}
	}
	if err := h.fullPool(ctx); err != nil {
		return nil, err
	}
	note := changes(before, hostState(h))
	return []Row{{Measure: "create/delete cycles without a leak", Unit: "cycles", Atoll: Value{P50: float64(h.o.cycles)}, Note: note}}, nil
}

// changes tells what a host has more or less than before.
func changes(before, after map[string]int) string {
	var note strings.Builder
	for _, what := range slices.Sorted(maps.Keys(after)) {
		n := after[what]
		if what == "memory MiB" {
			fmt.Fprintf(&note, "available memory %+d MiB; ", n-before[what])
		} else if n != before[what] {
			fmt.Fprintf(&note, "%s %+d; ", what, n-before[what])
		}
	}
	return note.String()
}
