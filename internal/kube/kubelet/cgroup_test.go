package kubelet

import (
	"os"
	"path/filepath"
	"testing"
)

// TestMakeGroup uses a directory in place of a hierarchy.
func TestMakeGroup(t *testing.T) {
	root := t.TempDir()
	for file, text := range map[string]string{"cgroup.controllers": "cpu memory\n", "cgroup.subtree_control": ""} {
		if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := makeGroup(root, "/a/b", false, ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "a", "b")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(root, "cgroup.subtree_control")); err != nil || string(got) != "" {
		t.Errorf("beside version 1: %q, %v", got, err)
	}
	record := filepath.Join(t.TempDir(), "record")
	if err := makeGroup(root, "/a", true, record); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(root, "cgroup.subtree_control")); err != nil || string(got) != "+memory" {
		t.Errorf("version 2: %q, %v", got, err)
	}
	if _, err := os.Stat(record); err != nil {
		t.Error(err)
	}
}

func TestWeigh(t *testing.T) {
	for file, want := range map[string]string{"cpu.shares": "4096", "cpu.weight": "303"} {
		group := t.TempDir()
		if err := os.WriteFile(filepath.Join(group, file), []byte("1"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := weigh(group, 4); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(group, file)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", file, got, err)
		}
		if all, err := os.ReadDir(group); err != nil || len(all) != 1 {
			t.Errorf("%s: %v, %v", file, all, err)
		}
	}
}

func TestInherit(t *testing.T) {
	parent, group := t.TempDir(), t.TempDir()
	for path, text := range map[string]string{
		filepath.Join(parent, "cpuset.cpus"): "0-1\n",
		filepath.Join(group, "cpuset.cpus"):  "\n",
		filepath.Join(parent, "cpuset.mems"): "0\n",
		filepath.Join(group, "cpuset.mems"):  "1\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]string{"cpuset.cpus": "0-1\n", "cpuset.mems": "1\n"} {
		if err := inherit(parent, group, file); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(group, file)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", file, got, err)
		}
	}
	if err := inherit(parent, group, "none"); err != nil {
		t.Error(err)
	}
}
