package guest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/flatspec"
)

const (
	warmID = "warm"
	// warmProgram is a program in the warm-up image that waits for the end of stdin.
	warmProgram = "/bin/sh"
	warmFile    = 2000 // bytes
	maxRounds   = 16
)

// Warm implements the protocol: it goes through everything a pod start does, so that the emulator
// has translated the code, and leaves nothing behind but the mounted scratch disk. Init is its own
// host for that: a second session, inside this process, carries the same calls and streams that
// the shim will send.
func (s *server) Warm(ctx context.Context, req *guestv1.WarmRequest) (*guestv1.Empty, error) {
	return &guestv1.Empty{}, status(s.warm(ctx, req))
}

func (s *server) warm(ctx context.Context, req *guestv1.WarmRequest) error {
	if err := s.prepareWarm(ctx, req); err != nil {
		return err
	}
	defer s.rehearsing.Store(false)
	for range max(1, min(req.GetRounds(), maxRounds)) {
		if err := s.rehearse(ctx, req.GetSerial()); err != nil {
			return fmt.Errorf("warming up: %w", err)
		}
	}
	if err := s.pod.Load().containers.FillShells(); err != nil {
		return err
	}
	// What the rounds left on the heap is collected now and not during the pod's start.
	debug.FreeOSMemory()
	return nil
}

func (s *server) prepareWarm(ctx context.Context, req *guestv1.WarmRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isSetUp || !s.rehearsing.CompareAndSwap(false, true) {
		return fmt.Errorf("pod is set up: %w", container.ErrState)
	}
	if len(req.GetEntropy()) > 0 {
		if err := addEntropy(req.GetEntropy()); err != nil {
			return err
		}
	}
	if s.pod.Load() != nil {
		return nil
	}
	p, err := s.prepareScratch(ctx, req.GetScratchSerial())
	if err != nil {
		return err
	}
	s.pod.Store(p)
	return nil
}

// rehearse is one round over a session of its own.
func (s *server) rehearse(ctx context.Context, serial string) error {
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() {
		if _, err := channel.ReadLine(guest, len(channel.Go)); err != nil {
			served <- err
			return
		}
		session, err := channel.Server(guest)
		if err == nil {
			err = s.serveStreams(session)
		}
		served <- err
	}()
	session, err := channel.Client(host)
	if err != nil {
		return err
	}
	r := rehearsal{session: session}
	err = r.run(ctx, s.pod.Load(), serial)
	_ = session.Close()
	<-served
	return err
}

// rehearsal plays the host.
type rehearsal struct {
	session *yamux.Session
	guest   guestv1.GuestService
}

func (r *rehearsal) run(ctx context.Context, p *pod, serial string) error {
	st, err := channel.Open(r.session, channel.Header{Kind: channel.KindRPC})
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(st)
	defer client.Close()
	r.guest = guestv1.NewGuestClient(client)
	if err := r.setup(ctx); err != nil {
		return err
	}
	if err := r.files(ctx); err != nil {
		return err
	}
	if serial != "" {
		if err := p.containers.FillShells(); err != nil {
			return err
		}
		if err := r.containers(ctx, serial); err != nil {
			return err
		}
	}
	return p.volumes.Remove(warmID)
}

// setup sets a pod up; the server takes it back at once. Nobody listens on eth0: the interface of
// a clone that has no pod yet is connected to nothing.
func (r *rehearsal) setup(ctx context.Context) error {
	seed := make([]byte, minEntropy)
	if _, err := unix.Getrandom(seed, 0); err != nil {
		return fmt.Errorf("reading random bytes: %w", err)
	}
	port, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return fmt.Errorf("reading sysctl: %w", err)
	}
	req := &guestv1.SetupRequest{
		Entropy: seed, UnixNanos: time.Now().UnixNano(), Hostname: "localhost", MachineId: strings.Repeat("0", 32),
		Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": strings.TrimSpace(string(port))},
	}
	if _, err := os.Stat("/sys/class/net/eth0"); err == nil {
		req.Network = &guestv1.Network{
			Mac: "02:00:00:00:00:01", Mtu: 1500, Addresses: []string{"192.0.2.2/24", "2001:db8::2/64"},
			Routes: []*guestv1.Route{
				{Destination: "0.0.0.0/0", Gateway: "192.0.2.1"}, {Destination: "::/0", Gateway: "2001:db8::1"},
			},
		}
	}
	_, err = r.guest.Setup(ctx, req)
	return err
}

// files pushes a tree the way a ConfigMap or the credentials of a service account come.
func (r *rehearsal) files(ctx context.Context) error {
	req := &guestv1.CreateVolumeRequest{Id: warmID, Kind: guestv1.CreateVolumeRequest_PUSHED}
	if _, err := r.guest.CreateVolume(ctx, req); err != nil {
		return err
	}
	_, err := r.guest.PutFiles(ctx, &guestv1.PutFilesRequest{Volume: warmID, Replace: true, Commit: true, Files: []*guestv1.File{
		{Path: "..v", Mode: unix.S_IFDIR | 0o755},
		{Path: "..v/token", Mode: unix.S_IFREG | 0o644, Data: make([]byte, warmFile)},
		{Path: "..data", Mode: unix.S_IFLNK | 0o777, Target: "..v"},
		{Path: "token", Mode: unix.S_IFLNK | 0o777, Target: "..data/token"},
		{Path: "hosts", Mode: unix.S_IFREG | 0o644},
	}})
	return err
}

// containers mounts the image and runs two containers: an ordinary one in a shell that waits for it,
// and one with stdin in which there is an exec.
func (r *rehearsal) containers(ctx context.Context, serial string) error {
	if _, err := r.guest.MountImage(ctx, &guestv1.MountImageRequest{Id: warmID, Serial: serial}); err != nil {
		return err
	}
	spec := warmSpec()
	if _, err := r.container(ctx, spec, false); err != nil {
		return err
	}
	if err := r.finish(ctx, &guestv1.ProcessRequest{ContainerId: warmID}); err != nil {
		return err
	}
	stdin, err := r.container(ctx, spec, true)
	if err != nil {
		return err
	}
	if err := r.exec(ctx, spec.Process); err != nil {
		return err
	}
	if err := stdin.Close(); err != nil {
		return err
	}
	if err := r.finish(ctx, &guestv1.ProcessRequest{ContainerId: warmID}); err != nil {
		return err
	}
	_, err = r.guest.UnmountImage(ctx, &guestv1.UnmountImageRequest{Id: warmID})
	return err
}

func (r *rehearsal) container(ctx context.Context, spec *specs.Spec, withStdin bool) (stdin *yamux.Stream, err error) {
	req := &guestv1.CreateContainerRequest{Id: warmID, Spec: flatspec.Spec(spec), Lowers: []string{warmID}, Stdin: withStdin, Seccomp: allowAll()}
	if _, err := r.guest.CreateContainer(ctx, req); err != nil {
		return nil, err
	}
	return r.start(ctx, &guestv1.ProcessRequest{ContainerId: warmID}, withStdin)
}

func (r *rehearsal) exec(ctx context.Context, process *specs.Process) error {
	req := &guestv1.CreateExecRequest{ContainerId: warmID, ExecId: warmID, Process: flatspec.Process(process), Seccomp: allowAll()}
	if _, err := r.guest.CreateExec(ctx, req); err != nil {
		return err
	}
	p := &guestv1.ProcessRequest{ContainerId: warmID, ExecId: warmID}
	if _, err := r.start(ctx, p, false); err != nil {
		return err
	}
	if err := r.finish(ctx, p); err != nil {
		return err
	}
	_, err := r.guest.Stats(ctx, &guestv1.StatsRequest{})
	return err
}

// start opens the streams of a process and starts it.
func (r *rehearsal) start(ctx context.Context, p *guestv1.ProcessRequest, withStdin bool) (stdin *yamux.Stream, err error) {
	for fd := range 3 {
		if fd == 0 && !withStdin {
			continue
		}
		h := channel.Header{Kind: channel.KindIO, Container: p.GetContainerId(), Exec: p.GetExecId(), FD: fd}
		st, err := channel.Open(r.session, h)
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
	_, err = r.guest.Start(ctx, p)
	return stdin, err
}

func (r *rehearsal) finish(ctx context.Context, p *guestv1.ProcessRequest) error {
	state, err := r.guest.Wait(ctx, p)
	if err != nil {
		return err
	}
	if state.GetStatus() != 0 {
		return fmt.Errorf("process ended with status %d", state.GetStatus())
	}
	_, err = r.guest.Delete(ctx, p)
	return err
}

// allowAll is a seccomp program of one instruction.
func allowAll() []byte {
	return []byte{unix.BPF_RET | unix.BPF_K, 0, 0, 0, 0, 0, 0xff, 0x7f} // SECCOMP_RET_ALLOW
}

// warmSpec is a spec with everything an ordinary container has.
func warmSpec() *specs.Spec {
	const volume = channel.VolumesDir + "/" + warmID
	shares, pids := uint64(2), int64(100)
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	safe := []string{"nosuid", "noexec", "nodev"}
	return &specs.Spec{
		Process: &specs.Process{
			Args: []string{warmProgram}, Env: []string{"PATH=/bin"}, Cwd: "/",
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
