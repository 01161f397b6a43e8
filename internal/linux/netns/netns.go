// Package netns makes, removes and enters network namespaces that are kept
// alive by a file they are bind-mounted on.
//
// It is not a network library: what is done inside a namespace is the caller's
// business. It is used by internal/network and by tests.
//
// A network namespace belongs to an operating-system thread, not to a
// goroutine. Everything here runs on a thread that is locked for the time and
// put back; a thread that cannot be put back is thrown away, never reused.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNotNetNS says that a path exists but is no network namespace: the
// bind mount is gone, or never was.
var ErrNotNetNS = errors.New("not a network namespace")

// NS is an open network namespace.
type NS struct {
	f *os.File
}

// Open opens the network namespace at path. The error wraps os.ErrNotExist
// when there is no such file and ErrNotNetNS when the file is something else.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening network namespace: %w", err)
	}
	if _, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("opening network namespace %s: %w", path, ErrNotNetNS)
	}
	return &NS{f: f}, nil
}

// Current opens the namespace of the calling thread.
func Current() (*NS, error) {
	return Open("/proc/thread-self/ns/net")
}

// FD is the descriptor of the namespace; it stays owned by n.
func (n *NS) FD() int { return int(n.f.Fd()) }

// Close closes the descriptor; the namespace lives on.
func (n *NS) Close() error { return n.f.Close() }

// Same reports whether both are the same namespace.
func (n *NS) Same(o *NS) bool {
	var a, b unix.Stat_t
	return unix.Fstat(n.FD(), &a) == nil && unix.Fstat(o.FD(), &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// Do runs fn on a thread that is inside the namespace and waits for it.
// Sockets fn opens stay in the namespace; goroutines it starts do not run there.
func (n *NS) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering network namespace %s: %w", n.f.Name(), err)
		}
		return fn()
	})
}

// Do opens the namespace at path, runs fn inside it and closes it.
func Do(path string, fn func() error) error {
	n, err := Open(path)
	if err != nil {
		return err
	}
	defer n.Close()
	return n.Do(fn)
}

// Create makes a new network namespace and binds it to path, which is created
// with its directory. An existing namespace at path is left as it is.
func Create(path string) error {
	n, err := Open(path)
	if err == nil {
		return n.Close()
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("creating directory of network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return fmt.Errorf("creating file of network namespace: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("creating file of network namespace: %w", err)
	}
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("creating network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("binding network namespace to %s: %w", path, err)
		}
		return nil
	})
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}

// Remove unbinds path and deletes the file. The kernel frees the namespace
// when nothing else holds it. A path that does not exist is no error.
func Remove(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue // mounted more than once
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		return fmt.Errorf("unbinding network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing network namespace: %w", err)
	}
	return nil
}

// onThread runs fn on its own thread and restores the thread's namespace.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			home, err := Current()
			if err != nil {
				runtime.UnlockOSThread()
				return err
			}
			defer home.Close()
			err = fn()
			// When this fails the goroutine ends with its thread locked, and
			// the runtime ends the thread with it.
			if unix.Setns(home.FD(), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			return err
		}()
	}()
	return <-done
}
