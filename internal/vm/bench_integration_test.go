//go:build integration

package vm_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// series is a set of durations, reported as median and minimum in milliseconds.
type series map[string][]time.Duration

func (s series) add(name string, since time.Time) { s[name] = append(s[name], time.Since(since)) }

func (s series) report(b *testing.B) {
	for name, d := range s {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, name+"-ms")
		b.ReportMetric(float64(d[0].Microseconds())/1000, name+"-min-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// cpu is the processor time that all threads of a process have used.
func cpu(b *testing.B, pid int) time.Duration {
	b.Helper()
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	must(b, err)
	var sum time.Duration
	for _, n := range names {
		data, err := os.ReadFile(n)
		must(b, err)
		ns, err := strconv.ParseInt(strings.Fields(string(data))[0], 10, 64)
		must(b, err)
		sum += time.Duration(ns)
	}
	return sum
}

// BenchmarkClone measures from the call of Clone to its return, and to the guest's first answer.
// The cpu figures are QEMU's processor time, which a busy host does not stretch.
func BenchmarkClone(b *testing.B) {
	tmpl := build(b)
	s := series{}
	for b.Loop() {
		start := time.Now()
		m, err := tmpl.Clone(context.Background(), vm.CloneConfig{UID: vmtest.UID, GID: vmtest.UID})
		must(b, err)
		s.add("clone", start)
		s["clone-cpu"] = append(s["clone-cpu"], cpu(b, m.PID()))
		g := vmtest.NewGuest(m)
		g.Want(b, "x", "echo x")
		s.add("answer", start)
		s["answer-cpu"] = append(s["answer-cpu"], cpu(b, m.PID()))
		must(b, m.Close())
	}
	s.report(b)
}

// BenchmarkResume measures a stopped machine that has run before: Resume alone, to the guest's
// answer, and with an image attached on the way.
func BenchmarkResume(b *testing.B) {
	ctx := context.Background()
	m := vmtest.Clone(b, build(b), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	image := pattern(b, 0xaa)
	s := series{}
	for range 3 { // translate the path once
		g.Want(b, "0000", "slot img0 0 2")
	}
	for b.Loop() {
		must(b, m.Pause(ctx))
		start := time.Now()
		must(b, m.Resume(ctx))
		s.add("resume", start)
		g.Want(b, "x", "echo x")
		s.add("answer", start)
		must(b, m.Pause(ctx))
		start = time.Now()
		must(b, m.AttachImage(ctx, "img0", image))
		s.add("attach", start)
		must(b, m.Resume(ctx))
		g.Want(b, "aaaa", "slot img0 0 2")
		s.add("attach-resume-read", start)
		start = time.Now()
		must(b, m.DetachImage(ctx, "img0"))
		s.add("detach", start)
	}
	s.report(b)
}

// BenchmarkMemory reports the proportional set size of one of twenty idle clones, and what this
// process needs for each.
func BenchmarkMemory(b *testing.B) {
	const count = 20
	tmpl := build(b)
	own := private(b, os.Getpid())
	var pids []int
	for range count {
		m := vmtest.Clone(b, tmpl, vm.CloneConfig{})
		vmtest.NewGuest(m).Want(b, "x", "echo x")
		pids = append(pids, m.PID())
	}
	for b.Loop() {
		var sum int64
		for _, pid := range pids {
			sum += rollup(b, pid, "Pss:")
		}
		b.ReportMetric(float64(sum)/count/1024, "pss-MiB")
		b.ReportMetric(float64(private(b, os.Getpid())-own)/count, "parent-KiB")
	}
}

func private(b *testing.B, pid int) int64 {
	b.Helper()
	runtime.GC()
	return rollup(b, pid, "Private_Dirty:")
}

// rollup is one figure, in KiB, of a process's memory.
func rollup(b *testing.B, pid int, name string) int64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	must(b, err)
	for line := range strings.Lines(string(data)) {
		if w := strings.Fields(line); len(w) == 3 && w[0] == name {
			n, err := strconv.ParseInt(w[1], 10, 64)
			must(b, err)
			return n
		}
	}
	b.Fatalf("no %s", name)
	return 0
}
