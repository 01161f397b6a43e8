//go:build integration

package cgroup

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRemove needs root: it makes groups in every hierarchy of the host.
func TestRemove(t *testing.T) {
	const name = "atoll-test-remove"
	roots, err := Roots()
	if err != nil || len(roots) == 0 {
		t.Fatalf("Roots = %v, %v", roots, err)
	}
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	for _, root := range roots {
		leaf := filepath.Join(root, name, "a", "b")
		if err := os.MkdirAll(leaf, 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(leaf, "cpuset.cpus")); err == nil {
			continue // takes no process before it is given processors
		}
		if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	found, err := Find(name)
	if err != nil || len(found) != len(roots) {
		t.Fatalf("Find = %v, %v; want one in each of %v", found, err, roots)
	}
	for _, path := range found {
		if err := Remove(path); err != nil {
			t.Error(err)
		}
		if err := Remove(path); err != nil {
			t.Errorf("second Remove: %v", err)
		}
	}
	if left, err := Find(name); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := unix.Kill(cmd.Process.Pid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Errorf("the process in the group: %v", err)
	}
}
