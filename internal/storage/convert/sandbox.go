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
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/jail"
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
	if err := tree(root, s.Disk); err != nil {
		return fmt.Errorf("making a sandbox: %w", err)
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

// tree makes the file tree of a reader the root of this thread, which is not used again.
func tree(root string, disk *os.File) error {
	if err := jail.Begin(root, 1<<20); err != nil {
		return err
	}
	at := filepath.Join(root, diskPath)
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return err
	}
	if err := jail.Bind(disk.Name(), at, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC); err != nil {
		return err
	}
	want, err := disk.Stat()
	if err != nil {
		return err
	}
	if got, err := os.Stat(at); err != nil || !os.SameFile(want, got) {
		return fmt.Errorf("%s has been replaced meanwhile", disk.Name())
	}
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return err
	}
	return jail.Enter(root)
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
