// Package memfd makes files that live in memory and have no name, and seals them.
//
// It wraps memfd_create(2) and the file seals of fcntl(2). It holds no state. Callers are the
// micro-VM packages: a template's memory and state are memfds that no clone can change.
package memfd

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// seals are what Seal sets: content and size are final, and so are the seals.
const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// ErrNotSealed is returned by Check for a file that could still change.
var ErrNotSealed = errors.New("memory file is not sealed")

// Create makes an empty memfd. name shows in /proc/<pid>/fd and in memory maps only.
func Create(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("creating memory file %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if size > 0 {
		if err := f.Truncate(size); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("sizing memory file %s: %w", name, err)
		}
	}
	return f, nil
}

// Seal makes the content final. It fails with EBUSY while any process has a shared writable
// mapping of the file.
func Seal(f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("sealing memory file %s: %w", f.Name(), err)
	}
	return nil
}

// Check returns ErrNotSealed unless the content of f is final.
func Check(f *os.File) error {
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("reading the seals of %s: %w", f.Name(), err)
	}
	if got&seals != seals {
		return fmt.Errorf("%s: %w", f.Name(), ErrNotSealed)
	}
	return nil
}

// Reopen opens the file again, read-only and with its own file offset.
func Reopen(f *os.File) (*os.File, error) {
	r, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		return nil, fmt.Errorf("reopening memory file %s: %w", f.Name(), err)
	}
	return r, nil
}
