//go:build integration && ceph

package export_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/csi/export"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/datastore/rbd"
	"atoll.dev/atoll/internal/storage/datastore/rbd/cephtest"
)

// TestCephExport: a volume in Ceph as a file, with a snapshot and growth while it is written, with authentication
// and without.
func TestCephExport(t *testing.T) {
	for name, cephx := range map[string]bool{"CephX": true, "None": false} {
		t.Run(name, func(t *testing.T) { exportCeph(t, cephtest.Start(t, cephx)) })
	}
}

// open does what the node service does before it exports a volume.
func open(t *testing.T, s *chain.Store) attach.Opened {
	t.Helper()
	disk, err := s.Attach(t.Context(), "v", "host", datastore.ReadWrite)
	must(t, err)
	ceph, err := s.Admit(t.Context(), disk)
	must(t, err)
	return attach.Opened{Disk: disk, Ceph: ceph}
}

func exportCeph(t *testing.T, c *cephtest.Cluster) {
	ctx, dir := t.Context(), t.TempDir()
	store, err := rbd.New(rbd.Config{Pool: cephtest.Pool, Conf: c.Conf, User: cephtest.User})
	must(t, err)
	_, err = store.Init(ctx)
	must(t, err)
	_, err = store.Create(ctx, datastore.Spec{ID: "v", Size: bytesOf})
	must(t, err)
	s := newSet(dir)
	t.Cleanup(func() { _ = s.RemoveAll() })
	if s.Exported("v") {
		t.Error("it is exported")
	}
	file, err := s.Export(ctx, "v", open(t, store))
	must(t, err)
	if !s.Exported("v") {
		t.Error("it is not exported")
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
	for name, want := range map[string]string{"status": "CapEff:\t0000000000000000", "cmdline": "atoll-volume:" + filepath.Join(dir, "v")} {
		data, err := os.ReadFile(filepath.Join("/proc", string(pid), name))
		must(t, err)
		if !strings.Contains(string(data), want) || strings.Contains(string(data), c.Key()) {
			t.Errorf("%s of the daemon: %s", name, data)
		}
	}
	_, err = store.Snapshot(ctx, "s", "v", live{s})
	must(t, err)
	write("after", 4096)
	_, err = store.Expand(ctx, "v", 2*bytesOf, live{s})
	must(t, err)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		st, err := os.Stat(file) // the kernel keeps what it knows for a second
		if err == nil && st.Size() == 2*bytesOf {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("after growing: %v, %v", st, err)
		}
	}
	must(t, f.Close())
	must(t, s.Remove(ctx, "v"))
	file, err = s.Export(ctx, "v", open(t, store))
	must(t, err)
	data, err := os.ReadFile(file)
	if err != nil || len(data) != 2*bytesOf || string(data[:6]) != "before" || string(data[4096:4101]) != "after" {
		t.Errorf("the chain: %v", err)
	}
	must(t, s.RemoveAll())
	must(t, store.Detach(ctx, "v", "host"))
	report, err := store.Check(ctx, nil)
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("%+v, %v", report.Problems, err)
	}
}

// live changes the exported volume.
type live struct{ set *export.Set }

func (l live) Snapshot(ctx context.Context, overlay handover.Layer, _ *handover.WrappedKey) error {
	return l.set.Snapshot(ctx, "v", overlay, nil)
}

func (l live) Resize(ctx context.Context, bytes int64) error { return l.set.Resize(ctx, "v", bytes) }
