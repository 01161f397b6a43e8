//go:build integration

package export_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/csi/export"
)

const bytesOf = 64 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func layer(t testing.TB, dir, id string) handover.Layer {
	t.Helper()
	file := filepath.Join(dir, id)
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", file, strconv.Itoa(bytesOf)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	must(t, os.Chmod(file, 0o600))
	return handover.Layer{ID: id, File: file, Format: handover.FormatQCOW2, Size: bytesOf}
}

// newSet waits for its daemons however slow the host is.
func newSet(dir string) *export.Set {
	return export.New(export.Config{Dir: dir, Patience: 5 * time.Minute})
}

// TestExport: a chain as a file, a snapshot and growth while it is written, another set takes over, the end.
func TestExport(t *testing.T) {
	ctx, dir, images := t.Context(), t.TempDir(), t.TempDir()
	s := newSet(dir)
	t.Cleanup(func() { _ = s.RemoveAll() })
	o := attach.Opened{Disk: handover.Disk{Volume: "v", Size: bytesOf, Layers: []handover.Layer{layer(t, images, "a"), layer(t, images, "b")}}}
	file, err := s.Export(ctx, "v", o)
	must(t, err)
	if again, err := s.Export(ctx, "v", o); err != nil || again != file {
		t.Errorf("again: %q, %v", again, err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	write := func(text string, at int64) {
		t.Helper()
		_, err := f.WriteAt([]byte(text), at)
		must(t, errors.Join(err, f.Sync()))
	}
	write("before", 0)
	pid, err := os.ReadFile(filepath.Join(dir, "v", "pid"))
	must(t, err)
	status, err := os.ReadFile(filepath.Join("/proc", string(pid), "status"))
	must(t, err)
	for _, want := range []string{"Uid:\t789999\t789999", "CapEff:\t0000000000000002", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the daemon lacks %q", want)
		}
	}
	if _, err := os.Stat(filepath.Join("/proc", string(pid), "root/etc")); err == nil {
		t.Error("the daemon sees /etc")
	}

	// Another process takes over.
	s = newSet(dir)
	overlay := layer(t, images, "c")
	for range 2 {
		must(t, s.Snapshot(ctx, "v", overlay, nil))
	}
	write("after", 4096)
	got := make([]byte, 6)
	_, err = f.ReadAt(got, 0)
	if err != nil || string(got) != "before" {
		t.Errorf("%q, %v", got, err)
	}
	must(t, s.Resize(ctx, "v", 2*bytesOf))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		st, err := os.Stat(file) // the kernel keeps what it knows for a second
		if err == nil && st.Size() == 2*bytesOf {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("after growing: %v, %v", st, err)
		}
	}
	must(t, s.Resize(ctx, "v", bytesOf)) // a late one changes nothing; see the size below
	must(t, s.Limit(ctx, "v", attach.Limits{Bytes: 1 << 20}))
	start := time.Now()
	_, err = f.WriteAt(bytes.Repeat([]byte{1}, 3<<20), 1<<20)
	must(t, errors.Join(err, f.Sync()))
	if took := time.Since(start); took < time.Second {
		t.Errorf("3 MiB at 1 MiB per second took %v", took)
	}
	must(t, f.Close())
	must(t, s.Remove(ctx, "v"))
	must(t, s.Remove(ctx, "v"))
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file after the end: %v", err)
	}
	for deadline := time.Now().Add(time.Minute); unix.Kill(atoi(t, pid), 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) { // it is a zombie for a moment
			t.Fatal("the daemon lives")
		}
	}
	for _, name := range []string{"b", "c"} {
		if out, err := exec.Command("qemu-img", "check", filepath.Join(images, name)).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
	// The whole chain again, and somebody else who wants it.
	o.Disk.Layers = append(o.Disk.Layers, overlay) // the size is what it was before it grew
	file, err = s.Export(ctx, "v", o)
	must(t, err)
	data, err := os.ReadFile(file)
	if err != nil || len(data) != 2*bytesOf || string(data[:6]) != "before" || string(data[4096:4101]) != "after" {
		t.Errorf("the chain: %v", err)
	}
	if _, err := s.Export(ctx, "w", o); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("a second writer: %v", err)
	}
	must(t, s.RemoveAll())
}

func atoi(t *testing.T, b []byte) int {
	t.Helper()
	n, err := strconv.Atoi(string(b))
	must(t, err)
	return n
}

// TestStuckDaemon: one that does not answer holds up no other volume.
func TestStuckDaemon(t *testing.T) {
	ctx, dir, images := t.Context(), t.TempDir(), t.TempDir()
	s := export.New(export.Config{Dir: dir, Patience: 10 * time.Minute})
	t.Cleanup(func() { _ = s.RemoveAll() })
	opened := func(id string) attach.Opened {
		return attach.Opened{Disk: handover.Disk{Volume: id, Size: bytesOf, Layers: []handover.Layer{layer(t, images, id)}}}
	}
	other := opened("w")
	_, err := s.Export(ctx, "v", opened("v"))
	must(t, err)
	pid, err := os.ReadFile(filepath.Join(dir, "v", "pid"))
	must(t, err)
	must(t, unix.Kill(atoi(t, pid), unix.SIGSTOP))
	stuck, giveUp := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Limit(stuck, "v", attach.Limits{IOPS: 1}) }()
	exported := make(chan error, 1)
	go func() {
		time.Sleep(100 * time.Millisecond) // for Limit to be on its way; nothing fails if it is not
		_, err := s.Export(ctx, "w", other)
		exported <- err
	}()
	select {
	case err := <-exported:
		must(t, err)
	case err := <-done:
		t.Fatalf("the stuck daemon answered: %v", err)
	case <-time.After(5 * time.Minute):
		t.Error("another volume waits for the stuck daemon")
	}
	// Limit may not have begun yet. A resize that finds the volume free waits for the daemon, too, and leaves it alone.
	probe := func(f func(context.Context) error) error {
		waiting, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		return f(waiting)
	}
	held := func() bool {
		err := probe(func(ctx context.Context) error { return s.Resize(ctx, "v", bytesOf) })
		return err != nil && strings.Contains(err.Error(), "waiting for another change")
	}
	for deadline := time.Now().Add(5 * time.Minute); !held(); {
		if time.Now().After(deadline) {
			t.Fatal("the change of the stuck daemon does not begin")
		}
	}
	if err := probe(func(ctx context.Context) error { return s.Remove(ctx, "v") }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("removing while a change is under way: %v", err)
	}
	giveUp()
	if err := <-done; err == nil {
		t.Error("a change through a stuck daemon succeeded")
	}
	must(t, unix.Kill(atoi(t, pid), unix.SIGCONT))
}

// TestSweep: whatever whoever started a daemon died in the middle of.
func TestSweep(t *testing.T) {
	ctx, dir, images := t.Context(), t.TempDir(), t.TempDir()
	s := newSet(dir)
	t.Cleanup(func() { _ = s.RemoveAll() })
	pids := map[string]int{}
	for _, name := range []string{"needed", "noted", "not-noted", "no-directory", "unmounted"} {
		o := attach.Opened{Disk: handover.Disk{Volume: name, Size: bytesOf, Layers: []handover.Layer{layer(t, images, name)}}}
		_, err := s.Export(ctx, name, o)
		must(t, err)
		pid, err := os.ReadFile(filepath.Join(dir, name, "pid"))
		must(t, err)
		pids[name] = atoi(t, pid)
	}
	must(t, os.Remove(filepath.Join(dir, "not-noted", "pid")))
	for _, name := range []string{"no-directory", "unmounted"} {
		must(t, unix.Unmount(filepath.Join(dir, name, "volume"), unix.MNT_DETACH))
	}
	must(t, os.RemoveAll(filepath.Join(dir, "no-directory")))
	must(t, os.Mkdir(filepath.Join(dir, "no-daemon"), 0o700))
	s = newSet(dir)
	other := export.New(export.Config{Dir: t.TempDir()}) // has nothing to do with them
	must(t, other.RemoveAll())
	must(t, s.Sweep(ctx, func(name string, mounted bool) bool { return mounted && (name == "needed" || name == "unmounted") }))
	for name, pid := range pids {
		status, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
		if lives := len(status) > 0 && !strings.Contains(string(status), "State:\tZ"); lives != (name == "needed") {
			t.Errorf("%s: the daemon lives: %t", name, lives)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := s.Limit(ctx, "needed", attach.Limits{}); err != nil {
		t.Error(err)
	}
	// One that is not noted may have nothing open yet: it is started anew.
	must(t, os.Remove(filepath.Join(dir, "needed", "pid")))
	if err := s.Limit(ctx, "needed", attach.Limits{}); !errors.Is(err, export.ErrNotExported) {
		t.Errorf("changing one that is not noted: %v", err)
	}
	o := attach.Opened{Disk: handover.Disk{Volume: "needed", Size: bytesOf, Layers: []handover.Layer{{
		ID: "needed", File: filepath.Join(images, "needed"), Format: handover.FormatQCOW2, Size: bytesOf,
	}}}}
	_, err = s.Export(ctx, "needed", o)
	must(t, err)
	if pid, err := os.ReadFile(filepath.Join(dir, "needed", "pid")); err != nil || atoi(t, pid) == pids["needed"] {
		t.Errorf("daemon %s, %v", pid, err)
	}
}
