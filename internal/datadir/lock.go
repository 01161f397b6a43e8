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

// ErrUnnamed says that a lock is held by a process that has not written down yet which one it is.
var ErrUnnamed = errors.New("its holder is not known yet")

// Held is a lock on a data directory. The kernel drops it when the process
// ends, however it ends.
type Held struct {
	file *os.File
}

// Acquire takes the lock of the data directory, which must exist. When another
// process holds it, the error wraps ErrLocked and names that process.
func (t Tree) Acquire() (*Held, error) { return acquire(t.Lock()) }

// AcquireKeeper takes the lock that makes sure there is one keeper only.
func (t Tree) AcquireKeeper() (*Held, error) { return acquire(t.KeeperLock()) }

// Holder returns the pid of the process that holds the lock of the data
// directory, or 0 when nobody does. A missing directory counts as nobody.
// ErrUnnamed for a moment after it was taken, or the pid of who had it before.
func (t Tree) Holder() (int, error) { return holder(t.Lock()) }

// KeeperHolder returns the pid of the keeper, or 0. ErrUnnamed as Holder.
func (t Tree) KeeperHolder() (int, error) { return holder(t.KeeperLock()) }

func acquire(path string) (*Held, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock file: %w", err)
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, wholeFile()); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		return nil, fmt.Errorf("%w: process %s holds %s", ErrLocked, readPID(f), path)
	}
	if err := writePID(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("writing %s: %w", path, err)
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

func holder(path string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("opening the lock file: %w", err)
	}
	defer f.Close()
	lock := wholeFile()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, lock); err != nil {
		return 0, fmt.Errorf("probing the lock %s: %w", path, err)
	}
	if lock.Type == unix.F_UNLCK {
		return 0, nil
	}
	pid, err := strconv.Atoi(readPID(f))
	if err != nil {
		return 0, fmt.Errorf("reading the holder of %s: %w", path, ErrUnnamed)
	}
	return pid, nil
}

// wholeFile is an exclusive lock on a file. It belongs to the open file, not to
// the process, so that Holder can look without disturbing anybody.
func wholeFile() *unix.Flock_t {
	return &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
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
