package export

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/linux/jail"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Descriptors that a daemon inherits.
const (
	fdQMP = 3 + iota
	fdFUSE
)

// ready is the file that a daemon makes in its tree when it serves.
const ready = "/run/pid"

// argumentPrefix begins what a daemon calls itself, by which it is found again.
const argumentPrefix = "atoll-volume:"

func (s *Set) argument(name string) string { return argumentPrefix + s.dir(name) }

// start starts a daemon that has nothing open yet, and returns its id.
func (s *Set) start(name string, dirs []string, ceph *handover.Ceph) (pid int, err error) {
	if _, err := os.Stat(s.cfg.Binary); err != nil {
		return 0, fmt.Errorf("qemu-storage-daemon: %w: %w; install the package qemu-system-common, or qemu-utils", ErrMissing, err)
	}
	if err := os.MkdirAll(s.dir(name), 0o700); err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket(name), Net: "unix"})
	if err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	sock, err := l.File()
	if err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	defer sock.Close()
	fuse, err := s.mountFUSE(name)
	if err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	defer fuse.Close()
	log, err := os.OpenFile(filepath.Join(s.dir(name), "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	defer log.Close()
	root := filepath.Join(s.dir(name), "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	defer null.Close()
	var p *os.Process
	done := make(chan struct{})
	go func() {
		defer close(done)
		p, err = s.spawn(name, root, dirs, ceph, []*os.File{null, log, log, sock, fuse})
	}()
	<-done
	if err != nil {
		return 0, fmt.Errorf("starting storage daemon: %w", err)
	}
	go func() { _, _ = p.Wait() }() // reaps it, for as long as this process lives
	// Nobody may connect before the daemon has set itself up.
	for deadline := time.Now().Add(s.cfg.Patience); time.Now().Before(deadline); time.Sleep(poll) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", p.Pid, ready)); err == nil || unix.Kill(p.Pid, 0) != nil {
			break
		}
	}
	return p.Pid, nil
}

// mountFUSE mounts a file system of one file, whose other end the daemon gets.
func (s *Set) mountFUSE(name string) (*os.File, error) {
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("FUSE: %w: %w", ErrMissing, err)
	}
	file, err := os.OpenFile(s.file(name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	_ = file.Close()
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,allow_other", dev.Fd(), unix.S_IFREG, s.cfg.UID, s.cfg.UID)
	if err := unix.Mount("atoll", s.file(name), "fuse", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return nil, errors.Join(fmt.Errorf("mounting FUSE: %w", err), dev.Close())
	}
	return dev, nil
}

// spawn starts the daemon from a thread that has a file tree of its own. The thread is not used again.
func (s *Set) spawn(name, root string, dirs []string, ceph *handover.Ceph, files []*os.File) (*os.Process, error) {
	if err := makeRoot(root, dirs); err != nil {
		return nil, err
	}
	// The layers are root's files; there are no others in its tree.
	caps := []uintptr{unix.CAP_DAC_OVERRIDE}
	if ceph != nil {
		caps = nil
		if err := addCeph(root, ceph.Conf); err != nil {
			return nil, fmt.Errorf("adding the configuration of Ceph: %w", err)
		}
	}
	if err := jail.Enter(root); err != nil {
		return nil, err
	}
	return os.StartProcess(s.cfg.Binary, []string{
		s.argument(name), "--chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fdQMP), "--monitor", "chardev=qmp",
		"--pidfile", ready,
	}, &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/bin", "MALLOC_ARENA_MAX=1"}, Files: files,
		Sys: &syscall.SysProcAttr{
			Setsid: true, Credential: &syscall.Credential{Uid: s.cfg.UID, Gid: s.cfg.UID},
			AmbientCaps: caps,
		},
	})
}

// makeRoot makes the file tree of a daemon in the mount namespace of this thread.
func makeRoot(root string, dirs []string) error {
	if err := jail.Begin(root, 4<<20); err != nil {
		return err
	}
	slices.Sort(dirs)
	for _, d := range slices.Compact(dirs) {
		to := filepath.Join(root, d)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := jail.Bind(d, to, 0); err != nil {
			return err
		}
	}
	// The daemon wants to see a regular file where it is to export, and the FUSE library takes a name of this
	// form for the number of a descriptor that is mounted already.
	run := filepath.Join(root, filepath.Dir(ready))
	if err := errors.Join(os.Mkdir(run, 0o755), os.Chmod(run, 0o777)); err != nil {
		return err
	}
	fd := filepath.Join(root, "dev/fd")
	if err := os.MkdirAll(fd, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(fd, strconv.Itoa(fdFUSE)), nil, 0o644)
}

// attempts to start a daemon that understands what it is told. One that gets a connection while it sets up its
// monitor in another thread may lose the beginning of what it reads (seen with QEMU 7.2).
const attempts = 4

// errUnclear is wrapped when a daemon has not understood a command.
var errUnclear = errors.New("storage daemon did not understand")

// unclear tells that from other failures.
func unclear(err error) error {
	var q *qmp.Error
	if errors.As(err, &q) && strings.Contains(q.Desc, "JSON parse error") || err != nil && strings.Contains(err.Error(), "second greeting") {
		return fmt.Errorf("%w: %w", errUnclear, err)
	}
	return err
}
