package datadir

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrLocked says that another process works on the same data directory.
var ErrLocked = errors.New("the data directory is in use")

// Held is a lock on a data directory. The kernel drops it when the process
// ends, however it ends.
type Held struct {
	file *os.File
}

// Acquire takes the lock of the data directory, which must exist. When another
// process holds it, the error wraps ErrLocked and names that process.
func (t Tree) Acquire() (*Held, error) {
	f, err := os.OpenFile(t.Lock(), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock file: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking %s: %w", t.Lock(), err)
		}
		holder := readPID(f)
		return nil, fmt.Errorf("%w: process %s runs on %s", ErrLocked, holder, t.root)
	}
	if err := writePID(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("writing %s: %w", t.Lock(), err)
	}
	return &Held{file: f}, nil
}

// Release gives the lock back.
func (h *Held) Release() error {
	if err := h.file.Close(); err != nil {
		return fmt.Errorf("releasing the lock: %w", err)
	}
	return nil
}

// Holder returns the pid of the process that holds the lock, or 0 when nobody
// does. A missing data directory counts as nobody.
func (t Tree) Holder() (int, error) {
	f, err := os.OpenFile(t.Lock(), os.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("opening the lock file: %w", err)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return 0, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return 0, fmt.Errorf("probing the lock %s: %w", t.Lock(), err)
	}
	pid, err := strconv.Atoi(readPID(f))
	if err != nil {
		return 0, fmt.Errorf("reading the holder of %s: %w", t.Lock(), err)
	}
	return pid, nil
}

// readPID returns the first line of f, or "?" when there is none.
func readPID(f *os.File) string {
	b, err := io.ReadAll(io.LimitReader(io.NewSectionReader(f, 0, 64), 64))
	text := strings.TrimSpace(string(b))
	if err != nil || text == "" {
		return "?"
	}
	return text
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}
