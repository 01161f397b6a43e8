// Package rehearsal plays a pod's start to guest init, with the calls and streams that the shim sends for a
// pod, and has init take everything back. It is the host's side only.
//
// Guest init plays it to itself before the template is saved (Full): what is done only once in the life of
// a machine or a program, such as mounting the scratch disk or building tables, is then behind every clone.
// The shim plays it to a clone that no pod waits for (without Full): an emulator has then translated the
// code that a start runs through. Only what a start needs is in it, since translated code stays in memory.
//
// What can go wrong: any call fails like that of a pod. The machine is of no use then.
package rehearsal

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/flatspec"
)

// ID is the name of the image, the volume and the container of a rehearsal.
const ID = "warm"

const (
	program  = "/bin/sh" // in the image; it waits for the end of stdin
	fileSize = 2000
	entropy  = 64
)

// Guest is the connection to guest init.
type Guest interface {
	guestv1.GuestService
	// OpenIO opens a standard stream of a process; exec is "" for a container's first process.
	OpenIO(container, exec string, fd int) (io.ReadWriteCloser, error)
}

// Config says what to play.
type Config struct {
	Guest   Guest
	Image   string      // serial of the slot with the image for it
	Scratch string      // serial of the scratch disk
	Network bool        // there is eth0; it must lead nowhere
	Full    bool        // also what only some pods do: stdin, exec, statistics
	Stop    func() bool // asked now and then; true: that was enough, a pod waits
}

// Run plays one round. The pod of it is gone when it returns without an error.
func Run(ctx context.Context, cfg Config) error {
	p := &player{Config: cfg}
	if err := p.run(ctx); err != nil {
		return fmt.Errorf("rehearsing a start: %w", err)
	}
	return nil
}

type player struct{ Config }

func (p *player) run(ctx context.Context) error {
	if _, err := p.Guest.Warm(ctx, &guestv1.WarmRequest{ScratchSerial: p.Scratch, Entropy: random()}); err != nil {
		return err
	}
	for _, act := range []func(context.Context) error{p.setup, p.files, p.containers} {
		if p.stopped() {
			break
		}
		if err := act(ctx); err != nil {
			return err
		}
	}
	_, err := p.Guest.Warm(ctx, &guestv1.WarmRequest{Done: true})
	return err
}

func (p *player) stopped() bool { return p.Stop != nil && p.Stop() }

func random() []byte {
	b := make([]byte, entropy)
	_, _ = rand.Read(b) // never fails
	return b
}

// setup sets a pod up; guest init takes it back at once.
func (p *player) setup(ctx context.Context) error {
	req := &guestv1.SetupRequest{
		Entropy: random(), UnixNanos: time.Now().UnixNano(), Hostname: "localhost", MachineId: strings.Repeat("0", 32),
		ScratchSerial: p.Scratch,
		// As they are: pods get other values.
		Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "1024", "net.ipv4.ping_group_range": "1 0"},
	}
	if p.Network {
		req.Network = &guestv1.Network{
			Mac: "02:00:00:00:00:01", Mtu: 1500, Addresses: []string{"192.0.2.2/24", "2001:db8::2/64"},
			Routes: []*guestv1.Route{
				{Destination: "0.0.0.0/0", Gateway: "192.0.2.1"}, {Destination: "::/0", Gateway: "2001:db8::1"},
			},
		}
	}
	_, err := p.Guest.Setup(ctx, req)
	return err
}

// files pushes single files, as the pod's own come, and a tree, as a ConfigMap or the credentials of a
// service account come.
func (p *player) files(ctx context.Context) error {
	req := &guestv1.CreateVolumeRequest{Id: ID, Kind: guestv1.CreateVolumeRequest_PUSHED}
	if _, err := p.Guest.CreateVolume(ctx, req); err != nil {
		return err
	}
	single := []*guestv1.File{{Path: "hosts", Mode: unix.S_IFREG | 0o644, Data: []byte("127.0.0.1\tlocalhost\n")}}
	if _, err := p.Guest.PutFiles(ctx, &guestv1.PutFilesRequest{Volume: ID, Commit: true, Files: single}); err != nil {
		return err
	}
	_, err := p.Guest.PutFiles(ctx, &guestv1.PutFilesRequest{Volume: ID, Replace: true, Commit: true, Files: []*guestv1.File{
		{Path: "..v", Mode: unix.S_IFDIR | 0o755},
		{Path: "..v/token", Mode: unix.S_IFREG | 0o644, Data: make([]byte, fileSize)},
		{Path: "..data", Mode: unix.S_IFLNK | 0o777, Target: "..v"},
		{Path: "token", Mode: unix.S_IFLNK | 0o777, Target: "..data/token"},
		{Path: "hosts", Mode: unix.S_IFREG | 0o644},
	}})
	return err
}

// containers mounts the image and runs an ordinary container in a shell that waits for it, then one with
// stdin in which there is an exec.
func (p *player) containers(ctx context.Context) error {
	if _, err := p.Guest.MountImage(ctx, &guestv1.MountImageRequest{Id: ID, Serial: p.Image}); err != nil {
		return err
	}
	s := spec()
	if _, err := p.container(ctx, s, false); err != nil {
		return err
	}
	if err := p.finish(ctx, &guestv1.ProcessRequest{ContainerId: ID}); err != nil {
		return err
	}
	if p.Full && !p.stopped() {
		if err := p.unusual(ctx, s); err != nil {
			return err
		}
	}
	_, err := p.Guest.UnmountImage(ctx, &guestv1.UnmountImageRequest{Id: ID})
	return err
}

// unusual is what only some pods do.
func (p *player) unusual(ctx context.Context, s *specs.Spec) error {
	stdin, err := p.container(ctx, s, true)
	if err != nil {
		return err
	}
	if err := p.exec(ctx, s.Process); err != nil {
		return err
	}
	if err := stdin.Close(); err != nil {
		return err
	}
	return p.finish(ctx, &guestv1.ProcessRequest{ContainerId: ID})
}

func (p *player) container(ctx context.Context, s *specs.Spec, withStdin bool) (stdin io.Closer, err error) {
	req := &guestv1.CreateContainerRequest{Id: ID, Spec: flatspec.Spec(s), Lowers: []string{ID}, Stdin: withStdin, Seccomp: allowAll()}
	if _, err := p.Guest.CreateContainer(ctx, req); err != nil {
		return nil, err
	}
	return p.start(ctx, &guestv1.ProcessRequest{ContainerId: ID}, withStdin)
}

func (p *player) exec(ctx context.Context, process *specs.Process) error {
	req := &guestv1.CreateExecRequest{ContainerId: ID, ExecId: ID, Process: flatspec.Process(process), Seccomp: allowAll()}
	if _, err := p.Guest.CreateExec(ctx, req); err != nil {
		return err
	}
	r := &guestv1.ProcessRequest{ContainerId: ID, ExecId: ID}
	if _, err := p.start(ctx, r, false); err != nil {
		return err
	}
	if err := p.finish(ctx, r); err != nil {
		return err
	}
	_, err := p.Guest.Stats(ctx, &guestv1.StatsRequest{})
	return err
}

// start opens the streams of a process and starts it.
func (p *player) start(ctx context.Context, r *guestv1.ProcessRequest, withStdin bool) (stdin io.Closer, err error) {
	for fd := range 3 {
		if fd == 0 && !withStdin {
			continue
		}
		st, err := p.Guest.OpenIO(r.GetContainerId(), r.GetExecId(), fd)
		if err != nil {
			return nil, err
		}
		if fd == 0 {
			stdin = st
			continue
		}
		go func() {
			_, _ = io.Copy(io.Discard, st)
			_ = st.Close()
		}()
	}
	_, err = p.Guest.Start(ctx, r)
	return stdin, err
}

func (p *player) finish(ctx context.Context, r *guestv1.ProcessRequest) error {
	state, err := p.Guest.Wait(ctx, r)
	if err != nil {
		return err
	}
	if state.GetStatus() != 0 {
		return fmt.Errorf("process ended with status %d", state.GetStatus())
	}
	_, err = p.Guest.Delete(ctx, r)
	return err
}

// allowAll is a seccomp program of one instruction.
func allowAll() []byte {
	return []byte{unix.BPF_RET | unix.BPF_K, 0, 0, 0, 0, 0, 0xff, 0x7f} // SECCOMP_RET_ALLOW
}

// spec is a spec with everything an ordinary container has.
func spec() *specs.Spec {
	const volume = channel.VolumesDir + "/" + ID
	shares, pids := uint64(2), int64(100)
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	safe := []string{"nosuid", "noexec", "nodev"}
	return &specs.Spec{
		Process: &specs.Process{
			Args: []string{program}, Env: []string{"PATH=/bin"}, Cwd: "/",
			User:         specs.User{UID: 65534, GID: 65534, AdditionalGids: []uint32{1}},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps},
			OOMScoreAdj:  new(int), NoNewPrivileges: true,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: safe},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: safe},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: append([]string{"ro"}, safe...)},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: append([]string{"ro", "relatime"}, safe...)},
			{Destination: "/etc/hosts", Type: "bind", Source: volume + "/hosts", Options: []string{"rbind", "rprivate", "rw"}},
			{Destination: "/warm", Type: "bind", Source: volume, Options: []string{"rbind", "rprivate", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces:    []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
			Resources:     &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}, Pids: &specs.LinuxPids{Limit: &pids}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/sys"},
		},
	}
}
