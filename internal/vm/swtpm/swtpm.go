// Package swtpm runs the TPM of a virtual machine: a swtpm process with a socket that QEMU inherits.
//
// It holds the state of the TPM in a directory that the caller keeps for the life of the machine. The process
// has the machine's own unprivileged user, its own seccomp filter and no socket but the one to QEMU, and ends with
// QEMU or with the process that started it. Package hardware gives the socket to QEMU; the shim of virtual machines
// calls both. What can go wrong: swtpm is not installed (ErrMissing), or it does not like the state.
package swtpm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/qemu"
)

// ErrMissing is wrapped when swtpm is not installed.
var ErrMissing = errors.New("swtpm is missing; install the package swtpm")

// DefaultBinary is where Debian's package swtpm puts it.
const DefaultBinary = "/usr/bin/swtpm"

// readyTimeout bounds how long a TPM may take until it answers, and how long it may take to end.
const readyTimeout = 30 * time.Second

// Config is one TPM.
type Config struct {
	Binary   string // default DefaultBinary
	UID, GID uint32 // whom it runs as; never 0
	// Dir is the directory with the state, which is made and given to the user if it is not there. An empty one
	// makes a new TPM.
	Dir string
}

// TPM is a running TPM.
type TPM struct {
	proc *qemu.Process
	qemu *os.File
}

// Start starts a TPM 2.0 and returns when the process runs. Whether it likes its state shows when QEMU starts, which
// then fails; Err tells.
func Start(_ context.Context, cfg Config) (*TPM, error) {
	t, err := start(cfg)
	if err != nil {
		return nil, fmt.Errorf("starting the TPM: %w", err)
	}
	return t, nil
}

func start(cfg Config) (*TPM, error) {
	if cfg.Binary == "" {
		cfg.Binary = DefaultBinary
	}
	if cfg.UID == 0 || cfg.GID == 0 {
		return nil, fmt.Errorf("it must not run as uid %d gid %d", cfg.UID, cfg.GID)
	}
	if _, err := os.Stat(cfg.Binary); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	dir, err := stateDir(cfg)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	ours, theirs, err := qemu.SocketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	end, err := ours.File()
	if err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("taking the socket: %w", err)
	}
	// QEMU must have the only copy, so that swtpm notices its end.
	if err := ours.Close(); err != nil {
		_ = end.Close()
		return nil, fmt.Errorf("taking the socket: %w", err)
	}
	proc, err := qemu.Spawn(qemu.Spec{
		Args: args(cfg), Files: []*os.File{theirs, dir},
		Credential: qemu.Credential{UID: cfg.UID, GID: cfg.GID}, SmallPages: true,
	})
	if err != nil {
		_ = end.Close()
		return nil, err
	}
	return &TPM{proc: proc, qemu: end}, nil
}

// args is the command line. The directory is reached by its descriptor, whatever the way to it allows.
func args(cfg Config) []string {
	return []string{
		cfg.Binary, "socket", "--tpm2",
		"--ctrl", "type=unixio,clientfd=3",
		"--tpmstate", "dir=/proc/self/fd/4,mode=0600",
		"--seccomp", "action=kill",
		"--terminate",
	}
}

// stateDir makes the directory and opens it.
func stateDir(cfg Config) (*os.File, error) {
	if err := os.Mkdir(cfg.Dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("making the directory of the state: %w", err)
	}
	fd, err := unix.Open(cfg.Dir, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the directory of the state %s: %w", cfg.Dir, err)
	}
	dir := os.NewFile(uintptr(fd), cfg.Dir)
	if err := own(dir, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("giving the state to the user of the machine: %w", err), dir.Close())
	}
	return dir, nil
}

// own gives the directory and the files in it to the user, who may be another one than last time. Its owner could have
// put links there, which are not followed.
func own(dir *os.File, cfg Config) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	uid, gid := int(cfg.UID), int(cfg.GID)
	for _, n := range names {
		if err := unix.Fchownat(int(dir.Fd()), n, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if err := dir.Chmod(0o700); err != nil {
		return err
	}
	return dir.Chown(uid, gid)
}

// Socket is for QEMU to inherit (hardware.Config.TPM). It must be closed (Release) once QEMU has started.
func (t *TPM) Socket() *os.File { return t.qemu }

// Release closes the socket here, so that QEMU has the only one and the TPM ends with it.
func (t *TPM) Release() error { return t.qemu.Close() }

// PID is the process id.
func (t *TPM) PID() int { return t.proc.PID() }

// Done is closed when the process has ended.
func (t *TPM) Done() <-chan struct{} { return t.proc.Done() }

// Err is what the process has complained about last, "" for nothing.
func (t *TPM) Err() string { return qemu.LastLines(t.proc.Stderr(), 3) }

// Close waits until the process has ended with QEMU, which must have ended, or never have begun, and ends it if that
// takes too long. What the guest has stored is on disk.
func (t *TPM) Close() error {
	_ = t.qemu.Close()
	select {
	case <-t.proc.Done():
	case <-time.After(readyTimeout):
	}
	err := t.proc.Kill()
	<-t.proc.Done()
	return errors.Join(err, t.proc.Close())
}
