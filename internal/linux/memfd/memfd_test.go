package memfd

import (
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSeal(t *testing.T) {
	f, err := Create("test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("final"), 0); err != nil {
		t.Fatal(err)
	}
	if err := Check(f); !errors.Is(err, ErrNotSealed) {
		t.Errorf("before: %v", err)
	}
	if err := Seal(f); err != nil {
		t.Fatal(err)
	}
	if err := Check(f); err != nil {
		t.Errorf("after: %v", err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("writing: %v", err)
	}
	if err := f.Truncate(1); !errors.Is(err, unix.EPERM) {
		t.Errorf("shrinking: %v", err)
	}
	r, err := Reopen(f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	buf := make([]byte, 5)
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "final" {
		t.Errorf("read %q, %v", buf, err)
	}
}

func TestSealWaitsForWriters(t *testing.T) {
	f, err := Create("test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	if err := Seal(f); !errors.Is(err, unix.EBUSY) {
		t.Errorf("with a writable mapping: %v", err)
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	if err := Seal(f); err != nil {
		t.Error(err)
	}
}
