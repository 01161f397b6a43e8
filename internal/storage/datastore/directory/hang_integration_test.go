//go:build integration

package directory

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/storage/datastore"
)

// TestHungDirectory: the directory is on a file system that never answers (FUSE without anybody behind it, as
// NFS without its server). Calls end in time, later ones at once, and it works again when it answers.
func TestHungDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	store(t, Config{Path: path})
	s, err := New(Config{Path: path, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse.Fd())
	if err := unix.Mount("hung", path, "fuse", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })

	for n, call := range []func(context.Context) error{
		func(ctx context.Context) error { return s.Status(ctx).Err },
		func(ctx context.Context) error { _, err := s.Attach(ctx, "v", "h", datastore.ReadWrite); return err },
		func(ctx context.Context) error { return s.Delete(ctx, "v") },
		func(ctx context.Context) error { _, err := s.List(ctx); return err },
	} {
		err := call(t.Context())
		if !errors.Is(err, datastore.ErrUnavailable) || n > 0 && !strings.Contains(err.Error(), "earlier operations still hang") {
			t.Errorf("call %d: %v", n, err)
		}
	}
	if err := fuse.Close(); err != nil { // what hangs fails now
		t.Fatal(err)
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); ; {
		st := s.Status(t.Context())
		if st.Err == nil {
			break
		}
		if time.Since(begun) > time.Minute {
			t.Fatal(st.Err)
		}
	}
	if s, err = New(Config{Path: path}); err != nil { // which waits longer
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), datastore.Spec{ID: "v", Size: 1 << 30}); err != nil {
		t.Error(err)
	}
}

// TestFullDirectory: the file system is full in the middle of operations. They are refused, nothing is
// damaged, and they work when there is room again.
func TestFullDirectory(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("small", mount, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	s := store(t, Config{Path: filepath.Join(mount, "store"), Keys: crashKeys(""), Limits: datastore.Limits{RefuseAt: 1}})
	make1(t, s, "v")
	ballast := filepath.Join(mount, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	room := int64(0)
	for chunk := int64(1 << 20); chunk >= 4096; { // all but nothing
		switch err := unix.Fallocate(int(f.Fd()), 0, room, chunk); {
		case err == nil:
			room += chunk
		case errors.Is(err, unix.ENOSPC):
			chunk /= 2
		default:
			t.Fatal(err)
		}
	}
	for left := int64(0); left < 3<<20; left += 256 << 10 { // each step of each operation fails once
		if err := f.Truncate(room - left); err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("n%d", left>>10)
		for _, step := range []struct {
			name string
			do   func() error
		}{
			{"create", func() error {
				_, err := s.Create(t.Context(), datastore.Spec{ID: id, Size: 1 << 30, Encryption: "gold"})
				return err
			}},
			{"snapshot", func() error {
				// Detaching v may have failed in the round before.
				if _, err := s.Snapshot(t.Context(), id, "v", nil); !errors.Is(err, datastore.ErrAttached) {
					return err
				}
				return nil
			}},
			{"attach", func() error {
				_, err := s.Attach(t.Context(), "v", "h", datastore.ReadWrite)
				return err
			}},
		} {
			if err := step.do(); err != nil && !errors.Is(err, datastore.ErrFull) {
				t.Errorf("%s with %d bytes: %v", step.name, left, err)
			}
		}
		for _, do := range []func() error{
			func() error { return s.Detach(t.Context(), "v", "h") },
			func() error { return s.DeleteSnapshot(t.Context(), id) },
			func() error { return s.Delete(t.Context(), id) },
		} {
			if err := do(); err != nil && !errors.Is(err, datastore.ErrFull) {
				t.Errorf("with %d bytes: %v", left, err)
			}
		}
	}
	if err := errors.Join(f.Close(), os.Remove(ballast)); err != nil {
		t.Fatal(err)
	}
	if err := s.Tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	disk, err := s.Attach(t.Context(), "v", "h", datastore.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := qemuIO(t, s, disk, "read -P 1 0 1M", "write -P 2 0 1M"); err != nil {
		t.Error(err)
	}
	if err := s.Detach(t.Context(), "v", "h"); err != nil {
		t.Error(err)
	}
	(&crashBench{TB: t, path: filepath.Join(mount, "store"), s: s}).empty()
	if found := kinds(t, s); found != "" {
		t.Error(found)
	}
}
