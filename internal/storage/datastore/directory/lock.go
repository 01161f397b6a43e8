package directory

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
)

// fileLocks locks bytes of one file, one byte per name, for as long as the file is open (open file
// description locks). They hold between goroutines, processes and, on network file systems, hosts, and end
// with their process however that ends.
type fileLocks struct {
	path string
	file *os.File
}

// Byte 0 is the lock of the store, the others are names by their hash. Two names with the same hash wait for
// each other for no reason, which does no harm.
const hashes = 1 << 40

// lockOffset is the byte of a name.
func lockOffset(name string) int64 {
	if name == chain.StoreLock {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(name))
	return 1 + int64(h.Sum64()%hashes)
}

func (l *fileLocks) Lock(ctx context.Context, names ...string) error {
	if l.file == nil {
		f, err := os.OpenFile(l.path, os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return chain.Unavailable(err)
		}
		l.file = f
	}
	offsets := make([]int64, 0, len(names))
	for _, name := range names {
		offsets = append(offsets, lockOffset(name))
	}
	slices.Sort(offsets) // so that nobody waits for each other in a circle
	for _, offset := range offsets {
		if err := l.wait(ctx, offset); err != nil {
			return err
		}
	}
	return nil
}

// wait takes the lock of a byte. There is no waiting for it in the kernel that a context could end.
func (l *fileLocks) wait(ctx context.Context, offset int64) error {
	pause := time.Millisecond
	for {
		err := unix.FcntlFlock(l.file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: offset, Len: 1})
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("%w: locking %s: %w", datastore.ErrUnavailable, l.path, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
			pause = min(2*pause, 20*time.Millisecond)
		}
	}
}

func (l *fileLocks) Unlock(name string) {
	if l.file == nil {
		return
	}
	// It can fail only for a bad descriptor, and release ends the lock in any case.
	_ = unix.FcntlFlock(l.file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart, Start: lockOffset(name), Len: 1})
}

func (l *fileLocks) Release() {
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
}
