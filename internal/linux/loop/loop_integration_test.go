//go:build integration

package loop_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/loop"
)

// TestDevice needs root and loop devices.
func TestDevice(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(f, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = loop.Detach(d.Path) }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if dev, inode, ok := loop.Backing(d.Path); !ok || dev != st.Dev || inode != st.Ino {
		t.Errorf("backing %d:%d, want %d:%d", dev, inode, st.Dev, st.Ino)
	}
	if err := errors.Join(f.Truncate(2<<20), loop.Resize(d.Path)); err != nil {
		t.Fatal(err)
	}
	dev, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := dev.Seek(0, 2); n != 2<<20 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	_, err = dev.WriteAt([]byte("here"), 1<<20)
	if err := errors.Join(err, dev.Sync(), dev.Close()); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := f.ReadAt(got, 1<<20); err != nil || string(got) != "here" {
		t.Errorf("%q, %v", got, err)
	}
	for range 2 {
		if err := loop.Detach(d.Path); err != nil {
			t.Error(err)
		}
	}
	if _, _, ok := loop.Backing(d.Path); ok {
		t.Error("still a device of the file")
	}
	ro, err := loop.Attach(f, true)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = loop.Detach(ro.Path) }()
	if w, err := os.OpenFile(ro.Path, os.O_WRONLY, 0); err == nil {
		if _, err := w.Write([]byte("there")); err == nil {
			t.Error("a read-only device was written to")
		}
		_ = w.Close()
	}
}
