//go:build integration

package guest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/flatspec"
	"atoll.dev/atoll/internal/guest/rehearsal"
	"atoll.dev/atoll/internal/linux/tsc"
	"atoll.dev/atoll/internal/vm/qemu"
)

// vm is a micro-VM with a client of its init.
type vm struct {
	t       testing.TB
	qemu    *exec.Cmd
	exited  chan struct{}
	console string
	session *yamux.Session
	guest   guestv1.GuestService
	ids     *atomic.Int64
}

// patience is far above what a guest needs under emulation on a busy host.
const patience = 5 * time.Minute

// boot starts a micro-VM and passes the barrier. Set-up is the caller's.
func boot(t testing.TB) *vm {
	t.Helper()
	a, err := built()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	scratch := filepath.Join(dir, "scratch")
	run(t, "truncate", "-s", "1G", scratch)
	run(t, "mkfs.ext4", mkfsArgs(scratch)...)
	v := &vm{t: t, exited: make(chan struct{}), console: filepath.Join(dir, "console"), ids: &atomic.Int64{}}
	sock := filepath.Join(dir, "ctl")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	argv := []string{
		"-M", "q35", "-accel", "tcg", "-m", "256", "-smp", "1,maxcpus=2", "-nodefaults", "-no-reboot", "-display", "none",
		"-bios", "qboot.rom", "-kernel", a.kernel, "-initrd", a.initrd,
		"-append", "console=ttyS0 loglevel=5 panic=-1 rcupdate.rcu_expedited=1 tsc=reliable" + rate(t), "-serial", "file:" + v.console,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=c,path=" + sock,
		"-device", "virtserialport,chardev=c,name=" + channel.PortName,
		"-drive", "if=none,id=s,format=raw,cache=unsafe,file=" + scratch, "-device", "virtio-blk-pci,drive=s,serial=scratch",
		"-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n" + qemu.NoControlQueue,
	}
	for i, image := range []string{a.image, a.image, a.warm} {
		argv = append(argv, "-drive", fmt.Sprintf("if=none,id=i%d,format=raw,readonly=on,file=%s", i, image),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=i%d,serial=img%d", i, i))
	}
	argv = append(argv, strings.Fields(os.Getenv("ATOLL_TEST_QEMU_ARGS"))...)
	v.qemu = exec.Command("qemu-system-x86_64", argv...)
	v.qemu.Stderr = os.Stderr
	if err := v.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = v.qemu.Wait(); close(v.exited) }()
	t.Cleanup(v.close)
	_ = l.(*net.UnixListener).SetDeadline(time.Now().Add(patience))
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	_ = conn.SetReadDeadline(start.Add(patience))
	if err := channel.WaitReady(conn); err != nil {
		t.Fatalf("%v\n%s", err, v.log())
	}
	t.Logf("ready after %v", time.Since(start))
	_ = conn.SetReadDeadline(time.Time{})
	if v.session, err = channel.Client(conn); err != nil {
		t.Fatal(err)
	}
	st, err := channel.Open(v.session, channel.Header{Kind: channel.KindRPC})
	if err != nil {
		t.Fatal(err)
	}
	v.guest = guestv1.NewGuestClient(ttrpc.NewClient(st))
	return v
}

// rate tells a kernel how fast the host's time stamp counter runs, as package vm does: on a busy host it measures a
// rate of its own that is far off.
func rate(t testing.TB) string {
	t.Helper()
	for range 20 {
		switch khz, err := tsc.KHz(50 * time.Millisecond); {
		case err == nil:
			return fmt.Sprintf(" tsc_early_khz=%d", khz)
		case !errors.Is(err, tsc.ErrUnsteady):
			t.Fatal(err)
		}
	}
	return ""
}

func setupRequest() *guestv1.SetupRequest {
	return &guestv1.SetupRequest{
		Entropy: random(64), UnixNanos: time.Now().UnixNano(), Hostname: "pod", MachineId: strings.Repeat("0123abcd", 4),
		ScratchSerial: "scratch",
		Network: &guestv1.Network{
			Mac: "02:00:00:00:00:07", Mtu: 1400, Addresses: []string{"10.0.2.15/24", "fd00::5/64"},
			Routes: []*guestv1.Route{{Destination: "0.0.0.0/0", Gateway: "10.0.2.2"}, {Destination: "::/0", Gateway: "fe80::1"}},
		},
		Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"},
	}
}

// start is boot and set-up with the image mounted as "busybox".
func start(t testing.TB, change func(*guestv1.SetupRequest)) *vm {
	t.Helper()
	v := boot(t)
	v.setUp(change)
	return v
}

// setUp warms a booted micro-VM up as the pool does, sets it up and mounts the image.
func (v *vm) setUp(change func(*guestv1.SetupRequest)) {
	v.t.Helper()
	req := setupRequest()
	if change != nil {
		change(req)
	}
	if req.ScratchSerial != "" { // as the pool does
		if err := v.rehearse(true); err != nil {
			v.t.Fatalf("%v\n%s", err, v.log())
		}
	}
	req.UnixNanos = time.Now().UnixNano() // the rehearsal took its time
	if _, err := v.guest.Setup(v.t.Context(), req); err != nil {
		v.t.Fatalf("%v\n%s", err, v.log())
	}
	v.mountImage()
}

// rehearse plays a start with the third disk, which has the image for it.
func (v *vm) rehearse(full bool) error {
	return rehearsal.Run(v.t.Context(), rehearsal.Config{
		Guest: &peer{v.guest, v.session}, Image: "img2", Scratch: "scratch", Network: true, Full: full,
	})
}

// peer is a guest as package rehearsal wants it.
type peer struct {
	guestv1.GuestService

	session *yamux.Session
}

func (p *peer) OpenIO(container, exec string, fd int) (io.ReadWriteCloser, error) {
	return channel.Open(p.session, channel.Header{Kind: channel.KindIO, Container: container, Exec: exec, FD: fd})
}

func (v *vm) mountImage() {
	v.t.Helper()
	req := &guestv1.MountImageRequest{Id: "busybox", Serial: "img0", FsType: "erofs"}
	if _, err := v.guest.MountImage(v.t.Context(), req); err != nil {
		v.t.Fatalf("%v\n%s", err, v.log())
	}
}

func (v *vm) close() {
	if v.session != nil {
		_ = v.session.Close()
	}
	_ = v.qemu.Process.Kill()
	<-v.exited
	if v.t.Failed() {
		v.t.Logf("console:\n%s", v.log())
	}
}

func (v *vm) log() string {
	b, _ := os.ReadFile(v.console)
	return string(b)
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// job is one process: what to run and what came of it.
type job struct {
	spec     *specs.Spec
	terminal bool
	stdin    io.Reader // nil: no stdin
	seccomp  []byte
	volumes  []*guestv1.ImageVolume
	stdout   io.Writer // nil: into out
	until    string    // stdout that is waited for before started is called; nil stdout only
	started  func(container string)
	id       string
	keep     bool
	lowers   []string // nil: busybox

	out, err []byte
	wait     *guestv1.WaitResponse
}

// output keeps what is written to it, and tells when that has a text or is all there is.
type output struct {
	b    bytes.Buffer // not embedded: io.Copy would call its ReadFrom
	text string
	seen chan struct{}
	tell func() // closes seen
}

func newOutput(text string) *output {
	o := &output{text: text, seen: make(chan struct{})}
	o.tell = sync.OnceFunc(func() { close(o.seen) })
	return o
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.b.Write(p)
	if bytes.Contains(o.b.Bytes(), []byte(o.text)) {
		o.tell()
	}
	return n, err
}

// criSpec is what containerd's CRI plugin sends for an ordinary container, as far as it matters.
func criSpec(args ...string) *specs.Spec {
	caps := []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
	safe := []string{"nosuid", "noexec", "nodev"}
	adj, shares := 1000, uint64(2)
	return &specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/usr/local/bin:/bin:/sbin", "A=b"}, OOMScoreAdj: &adj,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: safe},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: safe},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
			{Destination: "/dev/shm", Type: "bind", Source: channel.ShmPath, Options: []string{"rbind", "rprivate", "rw"}},
		},
		Linux: &specs.Linux{
			Resources:     &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}, Unified: map[string]string{"memory.oom.group": "1"}},
			Namespaces:    []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace, Path: "/x"}},
			MaskedPaths:   []string{"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

// sh is a job that runs a shell script.
func sh(script string) *job { return &job{spec: criSpec("sh", "-c", script)} }

func (v *vm) create(j *job) error {
	if j.id == "" {
		j.id = fmt.Sprintf("c%d", v.ids.Add(1))
	}
	if j.lowers == nil {
		j.lowers = []string{"busybox"}
	}
	_, err := v.guest.CreateContainer(v.t.Context(), &guestv1.CreateContainerRequest{
		Id: j.id, Spec: flatspec.Spec(j.spec), Lowers: j.lowers, Terminal: j.terminal, Stdin: j.stdin != nil,
		Seccomp: j.seccomp, ImageVolumes: j.volumes,
	})
	return err
}

// run creates, starts, waits and deletes a container.
func (v *vm) run(j *job) error {
	if err := v.create(j); err != nil {
		return err
	}
	err := v.process(j, "")
	if !j.keep {
		_, derr := v.guest.Delete(context.Background(), &guestv1.ProcessRequest{ContainerId: j.id})
		err = errors.Join(err, derr)
	}
	return err
}

// exec runs a process in a running container.
func (v *vm) exec(container string, j *job) error {
	j.id = container
	id := fmt.Sprintf("e%d", v.ids.Add(1))
	if _, err := v.guest.CreateExec(v.t.Context(), &guestv1.CreateExecRequest{
		ContainerId: container, ExecId: id, Process: flatspec.Process(j.spec.Process), Terminal: j.terminal, Stdin: j.stdin != nil, Seccomp: j.seccomp,
	}); err != nil {
		return err
	}
	err := v.process(j, id)
	_, derr := v.guest.Delete(context.Background(), &guestv1.ProcessRequest{ContainerId: container, ExecId: id})
	return errors.Join(err, derr)
}

// process attaches stdio, starts and waits.
func (v *vm) process(j *job, execID string) error {
	var wg sync.WaitGroup
	open := func(fd int) *yamux.Stream {
		st, err := channel.Open(v.session, channel.Header{Kind: channel.KindIO, Container: j.id, Exec: execID, FD: fd})
		if err != nil {
			v.t.Fatal(err)
		}
		return st
	}
	stdout := newOutput(j.until)
	collect := func(st *yamux.Stream, into *[]byte, o *output, w io.Writer) {
		wg.Go(func() {
			if w == nil {
				w = o
			}
			_, _ = io.Copy(w, st)
			_ = st.Close()
			*into = o.b.Bytes()
			o.tell()
		})
	}
	feed := func(st *yamux.Stream) {
		go func() {
			_, _ = io.Copy(st, j.stdin)
			if !j.terminal {
				_ = st.Close()
			}
		}()
	}
	if j.terminal {
		st := open(0)
		collect(st, &j.out, stdout, j.stdout)
		if j.stdin != nil {
			feed(st)
		}
	} else {
		collect(open(1), &j.out, stdout, j.stdout)
		collect(open(2), &j.err, newOutput(""), nil)
		if j.stdin != nil {
			feed(open(0))
		}
	}
	req := &guestv1.ProcessRequest{ContainerId: j.id, ExecId: execID}
	if _, err := v.guest.Start(context.Background(), req); err != nil {
		return err
	}
	if j.started != nil {
		if j.until != "" {
			select {
			case <-stdout.seen:
			case <-time.After(patience):
				return fmt.Errorf("%s does not say %q", j.id, j.until)
			}
		}
		j.started(j.id)
	}
	var err error
	if j.wait, err = v.guest.Wait(context.Background(), req); err != nil {
		return err
	}
	wg.Wait()
	return nil
}

// openStdio opens stdout and stderr of a job and drops what comes.
func openStdio(t testing.TB, v *vm, j *job) {
	t.Helper()
	for fd := 1; fd < 3; fd++ {
		st, err := channel.Open(v.session, channel.Header{Kind: channel.KindIO, Container: j.id, FD: fd})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = io.Copy(io.Discard, st)
			_ = st.Close()
		}()
	}
}

// must runs a job that is to end with status 0 and returns its trimmed output.
func (v *vm) must(j *job) string {
	v.t.Helper()
	if err := v.run(j); err != nil {
		v.t.Fatal(err)
	}
	if j.wait.Status != 0 {
		v.t.Fatalf("status %d\nstdout: %s\nstderr: %s", j.wait.Status, j.out, j.err)
	}
	return strings.TrimSpace(string(j.out))
}

func (v *vm) volume(id string, kind guestv1.CreateVolumeRequest_Kind) string {
	v.t.Helper()
	if _, err := v.guest.CreateVolume(v.t.Context(), &guestv1.CreateVolumeRequest{Id: id, Kind: kind, Mode: 0o777}); err != nil {
		v.t.Fatal(err)
	}
	return channel.VolumesDir + "/" + id
}

func bind(source, dest string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: dest, Options: append([]string{"rbind", "rprivate"}, options...)}
}

func (v *vm) kill(container string, sig uint32, all bool) error {
	req := &guestv1.KillRequest{ContainerId: container, Signal: sig, All: all}
	_, err := v.guest.Kill(context.Background(), req)
	return err
}

func (v *vm) remove(container string) {
	if _, err := v.guest.Delete(context.Background(), &guestv1.ProcessRequest{ContainerId: container}); err != nil {
		v.t.Errorf("deleting %s: %v", container, err)
	}
}

// mkfsArgs is the scratch disk's format; internal/vm/scratch has the same.
func mkfsArgs(image string) []string {
	features := "none,extent,64bit,flex_bg,filetype,dir_index,dir_nlink,ext_attr,extra_isize,huge_file,large_file,uninit_bg,sparse_super2,quota,project"
	return []string{"-q", "-F", "-b", "4096", "-m", "0", "-O", features, "-E", "root_owner=0:0", image}
}
