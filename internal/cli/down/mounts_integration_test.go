//go:build integration

package down

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/netns"
)

// TestUnmountBelow needs root: it mounts file systems, one of them busy and one
// hidden below another.
func TestUnmountBelow(t *testing.T) {
	root := t.TempDir()
	beside := root + "-beside"
	inner := filepath.Join(root, "a b", "inner")
	for _, dir := range []string{filepath.Dir(inner), inner, beside, filepath.Join(root, "busy")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount := func(dir string) {
		t.Helper()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mount(inner)
	mount(inner)
	mount(filepath.Dir(inner)) // hides the two
	mount(filepath.Join(root, "busy"))
	mount(beside)
	f, err := os.Create(filepath.Join(root, "busy", "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := removeTree(root); err == nil {
		t.Error("removeTree removed a directory with mounts in it")
	}
	n, err := unmountBelow(root)
	if err != nil || n != 4 {
		t.Errorf("unmountBelow = %d, %v, want 4", n, err)
	}
	if mounted, err := isMountPoint(beside); err != nil || !mounted {
		t.Errorf("a mount beside the directory is gone: %v, %v", mounted, err)
	}
	if err := removeTree(root); err != nil {
		t.Error(err)
	}
}

// TestUnmountPoolNetns needs root: the pool's network namespace is a mount in the run directory.
func TestUnmountPoolNetns(t *testing.T) {
	tree, err := datadir.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	tree = tree.WithRun(t.TempDir())
	path := filepath.Join(tree.PoolNetns(), "pool")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	d := &Down{cfg: Config{Tree: tree}}
	if did, err := d.unmount(t.Context()); err != nil || did != "1 mounts removed" {
		t.Errorf("unmount: %q, %v", did, err)
	}
	if mounted, err := isMountPoint(path); err != nil || mounted {
		t.Errorf("still mounted: %v, %v", mounted, err)
	}
	if _, err := d.removeRun(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(tree.Run()); !os.IsNotExist(err) {
		t.Errorf("the run directory: %v", err)
	}
}
