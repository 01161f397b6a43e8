package pool

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/pool/config"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/storage/layers/erofs"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/podkernel"
	"atoll.dev/atoll/internal/vm/scratch"
)

// rehearsals is how many pod starts the template goes through before it is saved. The first finds everything
// to be made, the second goes the way that those in clones will go.
const rehearsals = 2

// Template is what all members inherit.
type Template struct {
	Meta   vm.Meta
	Reason string // for the accelerator
	Kernel string // release

	files   []*os.File // in the order of wire's descriptors, from wire.FDRAM on
	closers []io.Closer
}

// Close releases the files; members have their own copies.
func (t *Template) Close() {
	for _, c := range t.closers {
		_ = c.Close()
	}
}

// Builder makes templates and members for real.
type Builder struct {
	cfg config.Config
	log *slog.Logger

	accel  vm.Accel // "" until it was probed; the answer holds for as long as the host is up
	reason string
}

// Build formats the scratch disk and boots the template with it.
func (b *Builder) Build(ctx context.Context) (_ *Template, err error) {
	t := &Template{}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	cfg, err := b.machine()
	if err != nil {
		return nil, err
	}
	if t.Kernel, err = podkernel.Release(cfg.Kernel); err != nil {
		t.Kernel = "unknown" // BuildTemplate says what is wrong with it, if anything
	}
	b.probe(ctx, cfg)
	cfg.Accel, t.Reason = b.accel, b.reason
	disk, err := scratch.Format(ctx, scratch.Config{Dir: b.cfg.DataDir, Bytes: b.cfg.ScratchBytes})
	if err != nil {
		return nil, err
	}
	t.closers = append(t.closers, disk)
	image, err := warmImage(b.cfg.DataDir, b.cfg.ExecHelper)
	if err != nil {
		return nil, err
	}
	t.closers = append(t.closers, image)
	// The disk is the template's own until it is saved, and then what clones copy.
	cfg.Scratch, cfg.Image = disk.File(), image
	cfg.Cmdline = channel.RehearseEnv + "=" + strconv.Itoa(rehearsals)
	template, err := vm.BuildTemplate(ctx, cfg)
	if err != nil {
		return nil, err
	}
	t.closers = append(t.closers, template)
	t.Meta = template.Meta()
	t.files = append(template.Files(), disk.File(), image)
	return t, nil
}

// machine is the micro-VM of which the template is made.
func (b *Builder) machine() (vm.Config, error) {
	files := []initramfs.Entry{
		{Path: "/init", Mode: 0o755, File: b.cfg.Binary},
		{Path: "/exec", Mode: 0o755, File: b.cfg.ExecHelper},
		{Path: "/dev/console", Mode: 0o600, Device: &initramfs.Device{Major: 5, Minor: 1}},
	}
	reserved := 0
	if b.cfg.Modules != "" {
		reserved = podkernel.ReservedMiB
		more, err := podkernel.Entries(b.cfg.Modules)
		if err != nil {
			return vm.Config{}, fmt.Errorf("collecting modules of the pod kernel: %w", err)
		}
		files = append(files, more...)
	}
	return vm.Config{
		QEMU: b.cfg.QEMU, Kernel: b.cfg.Kernel, Initramfs: files,
		MemoryMiB: b.cfg.MemoryMiB + reserved, ReservedMiB: reserved, MaxMemoryMiB: b.cfg.MaxMemoryMiB + reserved,
		MaxCPUs:      b.cfg.MaxCPUs,
		ScratchBytes: b.cfg.ScratchBytes, UID: b.cfg.UIDBase, GID: b.cfg.UIDBase,
	}, nil
}

// probe chooses the accelerator, once.
func (b *Builder) probe(ctx context.Context, cfg vm.Config) {
	if b.accel != "" {
		return
	}
	switch b.cfg.Accelerator {
	case config.Auto:
		b.accel, b.reason = vm.ProbeAccelerator(ctx, cfg)
	default:
		b.accel, b.reason = vm.Accel(b.cfg.Accelerator), "configured"
	}
}

// warmImage makes the image that members warm up with, in memory: a program, found by way of a symbolic
// link as most are, and the file with the users.
func warmImage(dir, program string) (_ *os.File, err error) {
	const doing = "making the warm-up image: %w"
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf(doing, err)
	}
	defer f.Close()
	var uuid [16]byte
	_, _ = rand.Read(uuid[:]) // never fails
	w, err := erofs.NewWriter(f, dir, uuid)
	if err != nil {
		return nil, fmt.Errorf(doing, err)
	}
	defer w.Close()
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf(doing, err)
	}
	root := erofs.NewDir(0o755)
	add := func(dir, name string, mode uint32, content []byte) (err error) {
		node := &erofs.Node{Mode: unix.S_IFREG | mode}
		if node.Data, err = w.WriteFile(bytes.NewReader(content), int64(len(content))); err != nil {
			return fmt.Errorf(doing, err)
		}
		d := erofs.NewDir(0o755)
		d.Children[name] = node
		root.Children[dir] = d
		return nil
	}
	if err := add("etc", "passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")); err != nil {
		return nil, err
	}
	if err := add("bin", "exec", 0o755, binary); err != nil {
		return nil, err
	}
	root.Children["bin"].Children["sh"] = &erofs.Node{Mode: unix.S_IFLNK | 0o777, Target: "exec"}
	if err := w.Finish(root); err != nil {
		return nil, fmt.Errorf(doing, err)
	}
	// The template takes the size of its slot from it; the rest is a hole.
	if err := f.Truncate(vm.SlotBytes); err != nil {
		return nil, fmt.Errorf(doing, err)
	}
	// Read-only, as QEMU is to have it.
	r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf(doing, err)
	}
	return r, nil
}

// Spawn starts a shim daemon that clones the template.
func (b *Builder) Spawn(t *Template, init wire.Init) (Member, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("starting a shim daemon: %w", err)
	}
	defer theirs.Close()
	cmd := &exec.Cmd{
		Path: b.cfg.Binary, Args: []string{"atoll-pod", registry.Role, init.Member},
		Env:        []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Dir:        "/",
		Stdout:     os.Stderr,
		Stderr:     os.Stderr,
		ExtraFiles: append([]*os.File{theirs}, t.files...),
		// A session of its own: signals for the pool's group are not for pods.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("starting a shim daemon: %w", err)
	}
	p := &process{cmd: cmd, conn: ours, orders: json.NewEncoder(ours), reports: make(chan wire.Report, 8)}
	go p.run()
	if err := p.orders.Encode(init); err != nil {
		p.Release()
		return nil, fmt.Errorf("starting a shim daemon: %w", err)
	}
	return p, nil
}

func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	mine, theirs := os.NewFile(uintptr(fds[0]), "member"), os.NewFile(uintptr(fds[1]), "pool")
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

// process is a shim daemon as a Member.
type process struct {
	cmd     *exec.Cmd
	conn    *net.UnixConn
	orders  *json.Encoder
	reports chan wire.Report
}

// run reads reports and then reaps the process.
func (p *process) run() {
	dec := json.NewDecoder(p.conn)
	for {
		var r wire.Report
		if dec.Decode(&r) != nil {
			break
		}
		p.reports <- r
	}
	_ = p.cmd.Wait() // how it ended is in its log
	close(p.reports)
	_ = p.conn.Close()
}

func (p *process) Assign(a wire.Assignment) error { return p.order(wire.Order{Assign: &a}) }

func (p *process) Aside(yes bool) error { return p.order(wire.Order{Aside: &yes}) }

func (p *process) order(o wire.Order) error {
	_ = p.conn.SetWriteDeadline(time.Now().Add(time.Second))
	if err := p.orders.Encode(o); err != nil {
		return fmt.Errorf("talking to a shim daemon: %w", err)
	}
	return nil
}

func (p *process) Reports() <-chan wire.Report { return p.reports }

func (p *process) PID() int { return p.cmd.Process.Pid }

// Release ends the connection, at which a daemon without a pod ends.
func (p *process) Release() { _ = p.conn.Close() }
