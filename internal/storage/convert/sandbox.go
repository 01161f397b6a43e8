package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errMissing: a program is not there.
var errMissing = errors.New("program is not installed")

// sandboxUID is nobody's user and group id but that of readers of images.
const sandboxUID = 789_998

// Limits of a reader.
const (
	maxMemory = 4 << 20 // KiB of address space, most of which is stacks and arenas that are not used
	maxFiles  = 64
)

// diskPath is where a reader finds the image.
const diskPath = "/disk"

// sandboxed is a process that reads one image.
type sandboxed struct {
	Program string   // without a path
	Args    []string // may name diskPath
	Disk    *os.File
	// Listen, if set, is a listening socket that the program finds as systemd passes it on.
	Listen *os.File
	Stdout io.Writer
}

// run runs it until it ends. What it printed as errors is in the error.
func (s sandboxed) run(ctx context.Context) error {
	path, err := exec.LookPath(s.Program)
	if err != nil || !strings.HasPrefix(path, "/usr/") {
		return fmt.Errorf("%w: %s; install the packages qemu-utils and xz-utils", errMissing, s.Program)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("making a sandbox: %w", err)
	}
	defer null.Close()
	if s.Stdout == nil {
		s.Stdout = null
	}
	root, err := os.MkdirTemp("", "atoll-image-")
	if err != nil {
		return fmt.Errorf("making a sandbox: %w", err)
	}
	defer os.Remove(root)
	stderr := &tail{}
	done := make(chan error, 1)
	go func() { // whose thread keeps the file tree, is what the child dies with, and is not used again
		done <- s.spawn(ctx, path, root, null, stderr)
	}()
	err = <-done
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("running %s: %w: %s", s.Program, err, stderr.last())
	}
	return nil
}

func (s sandboxed) spawn(ctx context.Context, path, root string, null *os.File, stderr io.Writer) error {
	runtime.LockOSThread() // for good
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if err := tree(root, s.Disk); err != nil {
		return fmt.Errorf("making a sandbox: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("setting no_new_privs: %w", err)
	}
	limits := fmt.Sprintf(`ulimit -c 0; ulimit -f 0; ulimit -n %d; ulimit -v %d; exec "$@"`, maxFiles, maxMemory)
	cmd := &exec.Cmd{
		Path: "/bin/sh", Args: slices.Concat([]string{"sh", "-c", limits, "sh", path}, s.Args), Dir: "/",
		Env:   []string{"LC_ALL=C", "PATH=/usr/bin:/bin", "MALLOC_ARENA_MAX=2"},
		Stdin: null, Stdout: s.Stdout, Stderr: stderr, WaitDelay: 5 * time.Second,
		SysProcAttr: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: sandboxUID, Gid: sandboxUID}, Pdeathsig: syscall.SIGKILL, Setsid: true,
			Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		},
	}
	if s.Listen != nil { // the first process of a namespace has the id 1
		cmd.ExtraFiles, cmd.Env = []*os.File{s.Listen}, append(cmd.Env, "LISTEN_PID=1", "LISTEN_FDS=1")
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	return cmd.Wait()
}

// tree makes the file tree of a reader the root of this thread's mount namespace.
func tree(root string, disk *os.File) error {
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("separating mounts: %w", err)
	}
	if err := unix.Mount("root", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m"); err != nil {
		return fmt.Errorf("mounting the root: %w", err)
	}
	binds := []string{"/usr"}
	for _, d := range []string{"/lib", "/lib64", "/bin"} {
		if target, err := os.Readlink(d); err == nil {
			if err := os.Symlink(target, filepath.Join(root, d)); err != nil {
				return err
			}
		} else {
			binds = append(binds, d)
		}
	}
	for _, d := range binds {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
		if err := bind(d, filepath.Join(root, d), unix.MS_NOSUID|unix.MS_NODEV); err != nil {
			return err
		}
	}
	at := filepath.Join(root, diskPath)
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return err
	}
	if err := bind(disk.Name(), at, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC); err != nil {
		return err
	}
	want, err := disk.Stat()
	if err != nil {
		return err
	}
	if got, err := os.Stat(at); err != nil || !os.SameFile(want, got) {
		return fmt.Errorf("%s has been replaced meanwhile", disk.Name())
	}
	if err := errors.Join(unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""), unix.Chdir(root)); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("entering the root: %w", err)
	}
	return errors.Join(unix.Unmount(".", unix.MNT_DETACH), unix.Chdir("/"))
}

// bind shows something at another place, read-only.
func bind(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s: %w", from, err)
	}
	if err := unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("binding %s: %w", from, err)
	}
	return nil
}

// tail keeps the end of what is written.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-4096):]
	return len(p), nil
}

// last is the last line, without what does not help.
func (t *tail) last() string {
	lines := bytes.Split(bytes.TrimSpace(t.b), []byte("\n"))
	text := strings.ToValidUTF8(string(lines[len(lines)-1]), "?")
	for _, prefix := range []string{"qemu-nbd: ", "qemu-img: ", "xz: ", "Failed to blk_new_open ", "Could not open "} {
		text = strings.TrimPrefix(text, prefix)
	}
	return text[:min(len(text), 500)]
}
