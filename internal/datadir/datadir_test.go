package datadir

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestNew(t *testing.T) {
	tests := []struct {
		root, wantRun, wantErr string
	}{
		{root: DefaultRoot, wantRun: `^/run/atoll$`},
		{root: DefaultRoot + "/", wantRun: `^/run/atoll$`},
		{root: "/srv/lab", wantRun: `^/run/atoll-[0-9a-f]{8}$`},
		{root: "", wantErr: "empty"},
		{root: "lab", wantErr: "absolute"},
		{root: "//", wantErr: "cannot be"},
	}
	for _, tt := range tests {
		tree, err := New(tt.root)
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("New(%q) error = %v, want %q", tt.root, err, tt.wantErr)
			}
			continue
		}
		if err != nil {
			t.Errorf("New(%q): %v", tt.root, err)
			continue
		}
		if !regexp.MustCompile(tt.wantRun).MatchString(tree.Run()) {
			t.Errorf("New(%q).Run() = %q, want %s", tt.root, tree.Run(), tt.wantRun)
		}
	}
}

// testTree is a tree whose run directory is also below a test directory.
func testTree(t *testing.T) Tree {
	t.Helper()
	dir := t.TempDir()
	return Tree{root: filepath.Join(dir, "data"), run: filepath.Join(dir, "run")}
}

func TestCreateSetsModes(t *testing.T) {
	tree := testTree(t)
	if err := os.MkdirAll(tree.PKI(), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := tree.Create(); err != nil {
		t.Fatal(err)
	}
	for _, d := range tree.dirs() {
		info, err := os.Stat(d.path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != d.mode {
			t.Errorf("%s has mode %o, want %o", d.path, info.Mode().Perm(), d.mode)
		}
	}
}

func TestLock(t *testing.T) {
	tree := testTree(t)
	if pid, err := tree.Holder(); pid != 0 || err != nil {
		t.Fatalf("Holder without a directory = %d, %v", pid, err)
	}
	if err := tree.Create(); err != nil {
		t.Fatal(err)
	}
	held, err := tree.Acquire()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tree.Acquire(); !errors.Is(err, ErrLocked) {
		t.Fatalf("second Acquire: %v, want ErrLocked", err)
	}
	if pid, err := tree.Holder(); pid != os.Getpid() || err != nil {
		t.Fatalf("Holder = %d, %v, want %d", pid, err, os.Getpid())
	}
	if err := os.Truncate(tree.Lock(), 0); err != nil { // as before the pid is written
		t.Fatal(err)
	}
	if pid, err := tree.Holder(); pid != 0 || !errors.Is(err, ErrUnnamed) {
		t.Fatalf("Holder of a lock without a pid = %d, %v", pid, err)
	}
	if err := held.Release(); err != nil {
		t.Fatal(err)
	}
	if pid, err := tree.Holder(); pid != 0 || err != nil {
		t.Fatalf("Holder after Release = %d, %v", pid, err)
	}
}

// TestCgroupRoot: two kubelets must not share one.
func TestCgroupRoot(t *testing.T) {
	roots := map[string]bool{}
	for _, dir := range []string{DefaultRoot, "/srv/a", "/srv/b"} {
		tree, err := New(dir)
		if err != nil {
			t.Fatal(err)
		}
		root := tree.CgroupRoot()
		if root == "" != (dir == DefaultRoot) || roots[root] {
			t.Errorf("%s: %q", dir, root)
		}
		roots[root] = true
	}
}
