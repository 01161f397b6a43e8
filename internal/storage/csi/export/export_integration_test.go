//go:build integration

package export_test

import (
	"bytes"
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

// TestExport: a chain as a file, a snapshot and growth while it is written, another set takes over, the end.
func TestExport(t *testing.T) {
	ctx, dir, images := t.Context(), t.TempDir(), t.TempDir()
	s := export.New(export.Config{Dir: dir})
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
	s = export.New(export.Config{Dir: dir})
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
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
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
	for deadline := time.Now().Add(10 * time.Second); unix.Kill(atoi(t, pid), 0) == nil; time.Sleep(5 * time.Millisecond) {
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
