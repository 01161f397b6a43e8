//go:build integration

package shim_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"atoll.dev/atoll/internal/datadir/handover"
)

// container is a container with its standard streams collected.
type container struct {
	*pod
	id     string
	exec   string
	stdin  string // path of the FIFO
	output sync.WaitGroup
	keep   []*os.File // the FIFOs' writing ends, until the shim has certainly opened its own
	stdout transcript
	stderr transcript
}

// ended waits for the end of output, once nothing that writes it can still begin.
func (c *container) ended() {
	for _, f := range c.keep {
		_ = f.Close()
	}
	c.keep = nil
	c.output.Wait()
}

// collect makes a FIFO and copies what is written to it. It is open before the shim hears of it:
// one that ends early, or never opens it, leaves nobody waiting.
func (c *container) collect(name string, to *transcript) error {
	if err := unix.Mkfifo(name, 0o600); err != nil {
		return err
	}
	keep, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c.keep = append(c.keep, keep)
	c.t.Cleanup(func() { _ = keep.Close() })
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	c.output.Go(func() {
		defer f.Close()
		_, _ = io.Copy(to, f)
	})
	return nil
}

// transcript is what a process has written so far.
type transcript struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

// spec is an ordinary container's.
func (p *pod) spec(args ...string) *specs.Spec {
	ns := func(kind specs.LinuxNamespaceType, name string) specs.LinuxNamespace {
		return specs.LinuxNamespace{Type: kind, Path: fmt.Sprintf("/proc/%d/ns/%s", p.pid, name)}
	}
	return &specs.Spec{
		Version: "1.3.0",
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin", "HOME=/"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.MountNamespace},
				ns(specs.NetworkNamespace, "net"), ns(specs.IPCNamespace, "ipc"), ns(specs.UTSNamespace, "uts"),
			},
			Resources: &specs.LinuxResources{},
		},
	}
}

// fifos makes the FIFOs of a process and collects what comes out.
func (c *container) fifos(stdin bool) (in, out, errs string) {
	dir, err := os.MkdirTemp(c.dir, "fifo")
	if err != nil {
		c.t.Fatal(err)
	}
	if stdin {
		in = filepath.Join(dir, "in")
		if err := unix.Mkfifo(in, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	out, errs = filepath.Join(dir, "out"), filepath.Join(dir, "err")
	if err := errors.Join(c.collect(out, &c.stdout), c.collect(errs, &c.stderr)); err != nil {
		c.t.Fatal(err)
	}
	c.stdin = in
	return in, out, errs
}

// create takes a container on.
func (p *pod) create(id string, s *specs.Spec) (*container, error) {
	p.t.Helper()
	bundle := filepath.Join(p.dir, "containerd", id)
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		p.t.Fatal(err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	c := &container{pod: p, id: id}
	in, out, errs := c.fifos(false)
	_, err = p.task.Create(p.t.Context(), &taskapi.CreateTaskRequest{
		ID: id, Bundle: bundle, Stdin: in, Stdout: out, Stderr: errs,
		Rootfs: []*types.Mount{{Type: "bind", Source: filepath.Join(bundle, "meta"), Options: []string{"rbind", "ro", handover.ImageOption + p.image}}},
	})
	return c, err
}

func (p *pod) mustCreate(id string, s *specs.Spec) *container {
	p.t.Helper()
	c, err := p.create(id, s)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// refusal is the error of a container that cannot be started; nothing of it is left.
func (p *pod) refusal(id string, s *specs.Spec) error {
	p.t.Helper()
	c := p.mustCreate(id, s)
	_, err := c.task.Start(p.t.Context(), &taskapi.StartRequest{ID: id})
	c.delete()
	return err
}

func (c *container) start() {
	c.t.Helper()
	if _, err := c.task.Start(c.t.Context(), &taskapi.StartRequest{ID: c.id, ExecID: c.exec}); err != nil {
		c.t.Fatal(err)
	}
}

// wait waits for the exit and the end of output.
func (c *container) wait() uint32 {
	c.t.Helper()
	resp, err := c.task.Wait(c.t.Context(), &taskapi.WaitRequest{ID: c.id, ExecID: c.exec})
	if err != nil {
		c.t.Fatal(err)
	}
	c.ended()
	return resp.ExitStatus
}

func (c *container) delete() {
	c.t.Helper()
	if _, err := c.task.Delete(c.t.Context(), &taskapi.DeleteRequest{ID: c.id, ExecID: c.exec}); err != nil {
		c.t.Fatal(err)
	}
}

// run runs a container to its end.
func (p *pod) run(id string, s *specs.Spec) *container {
	p.t.Helper()
	c := p.mustCreate(id, s)
	c.start()
	if status := c.wait(); status != 0 {
		p.t.Errorf("%s ended with %d: %s", id, status, c.stderr.String())
	}
	c.delete()
	return c
}

// sh runs a command in a running container.
func (c *container) sh(script string) string {
	c.t.Helper()
	e := c.newExec(fmt.Sprintf("e%d", time.Now().UnixNano()), false, "/bin/sh", "-c", script)
	e.start()
	if status := e.wait(); status != 0 {
		c.t.Errorf("%s: status %d: %s", script, status, e.stderr.String())
	}
	e.delete()
	return e.stdout.String()
}

func (c *container) newExec(id string, stdin bool, args ...string) *container {
	c.t.Helper()
	e := &container{pod: c.pod, id: c.id, exec: id}
	in, out, errs := e.fifos(stdin)
	value, err := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		c.t.Fatal(err)
	}
	_, err = c.task.Exec(c.t.Context(), &taskapi.ExecProcessRequest{
		ID: c.id, ExecID: id, Stdin: in, Stdout: out, Stderr: errs,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: value},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return e
}

// createTerminal makes a container with a terminal.
func (p *pod) createTerminal(id string, s *specs.Spec) (*container, error) {
	p.t.Helper()
	c := &container{pod: p, id: id}
	dir, err := os.MkdirTemp(p.dir, "fifo")
	if err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "out")
	c.stdin = filepath.Join(dir, "in")
	if err := errors.Join(unix.Mkfifo(c.stdin, 0o600), c.collect(out, &c.stdout)); err != nil {
		return nil, err
	}
	bundle := filepath.Join(p.dir, "containerd", id)
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		return nil, err
	}
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		return nil, err
	}
	_, err = p.task.Create(p.t.Context(), &taskapi.CreateTaskRequest{
		ID: id, Bundle: bundle, Stdin: c.stdin, Stdout: out, Terminal: true,
		Rootfs: []*types.Mount{{Type: "bind", Source: filepath.Join(bundle, "meta"), Options: []string{handover.ImageOption + p.image}}},
	})
	return c, err
}
