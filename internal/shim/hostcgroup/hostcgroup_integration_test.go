//go:build integration

package hostcgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestJoin needs root.
func TestJoin(t *testing.T) {
	hs, err := hierarchies("/proc/self/mountinfo")
	if err != nil || len(hs) == 0 {
		t.Fatalf("hierarchies: %v, %v", hs, err)
	}
	parent := fmt.Sprintf("/atoll-test-%d/pod", os.Getpid())
	for _, h := range hs {
		up := filepath.Join(h.point, parent)
		if err := os.MkdirAll(up, 0o755); err != nil {
			t.Fatal(err)
		}
		if h.cpuset {
			if err := inherit(h.point, filepath.Dir(up)); err != nil {
				t.Fatal(err)
			}
			if err := inherit(filepath.Dir(up), up); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { _ = os.Remove(up); _ = os.Remove(filepath.Dir(up)) })
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	g, err := Join(parent, "vm-1", cmd.Process.Pid)
	t.Logf("%d hierarchies in %s", len(g.Dirs), time.Since(start))
	if err != nil {
		t.Fatal(err)
	}
	member, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(member), parent+"/vm-1"); got != len(hs) {
		t.Errorf("in %d of %d hierarchies:\n%s", got, len(hs), member)
	}
	raised := 0
	for _, dir := range g.Dirs {
		for name, limit := range map[string][2]string{
			"cpu.max": {"1200 100000", "25000 100000"}, "cpu.cfs_quota_us": {"1200", "25000"},
			"memory.max": {"218103808", "738197504"}, "memory.limit_in_bytes": {"218103808", "738197504"},
		} {
			file := filepath.Join(filepath.Dir(dir), name)
			if os.WriteFile(file, []byte(limit[0]), 0) != nil {
				continue // not this version of cgroups, or another controller
			}
			if err := g.Sustain(512 << 20); err != nil {
				t.Error(err)
			}
			if got, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(got)) != limit[1] {
				t.Errorf("%s is %q, %v", file, got, err)
			}
			raised++
		}
	}
	if raised != 2 {
		t.Errorf("%d limits, want one of processors and one of memory", raised)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := Remove(ctx, g.Dirs[:1]); err == nil {
		t.Error("removed a group with a process in it")
	}
	if err := g.Leave(cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	if err := Remove(t.Context(), g.Dirs); err != nil {
		t.Error(err)
	}
	if err := Remove(t.Context(), g.Dirs); err != nil {
		t.Error(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}
