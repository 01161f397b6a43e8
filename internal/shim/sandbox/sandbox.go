// Package sandbox serves containerd's sandbox API (containerd.runtime.sandbox.v1) for one micro-VM: it
// turns a warm clone into a pod's sandbox and watches over it.
//
// Containers are package task's; the clone and the session with its guest come from the daemon. Create
// already begins to start the micro-VM in the background, since containerd has other things to do until
// it calls Start.
//
//	new --Create--> created --Start--> ready --Stop, or QEMU ends--> stopped
//
// What can go wrong: the clone does not come up (Create was answered already, Start returns the error
// and containerd removes the sandbox), the pod needs more memory than a micro-VM can have, the guest
// does not answer in time, QEMU ends at any time (the sandbox is stopped with status 137 and so are all
// containers).
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/images"
	"atoll.dev/atoll/internal/shim/task"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/shim/volumes"
	"atoll.dev/atoll/internal/vm"
)

// States in the terms of the CRI, which containerd passes on as they are.
const (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
)

// Exit statuses of a sandbox.
const (
	statusStopped = 0   // as asked
	statusKilled  = 137 // QEMU ended by itself or was killed
)

const (
	// stopTimeout bounds how long a sandbox may take to stop. With what cgroups take that is within the two minutes that
	// the kubelet gives it.
	stopTimeout = 100 * time.Second
	// killTimeout is what QEMU has of that at least, to be gone after SIGKILL. The rest is for volumes, or for a start to
	// be given up, which has none.
	killTimeout = 20 * time.Second
)

// Machine is the part of a virtual machine that a sandbox needs.
type Machine interface {
	images.Machine
	Resume(context.Context) error
	AddMemory(ctx context.Context, bytes int64) (int64, error)
	SetCPUs(ctx context.Context, n int) error
	PID() int
	Done() <-chan struct{}
	Exit() vm.Exit
	Kill() error
	Console() []byte
}

// Session is the connection to a guest.
type Session interface {
	guestv1.GuestService
	task.Streams
	Dial(ctx context.Context, port uint16) (net.Conn, error)
}

// VM is a clone that waits for its pod.
type VM struct {
	Machine Machine
	Volumes disks.Machine // the same machine, for persistent volumes
	Session Session
	Tap     network.Tap
	Memory  int64  // bytes it was started with, for the pod
	Kernel  int64  // bytes it has besides, which a large kernel takes for itself
	CPUs    int    // it was started with
	Scratch string // virtio serial of its scratch disk, "" for none
	Accel   vm.Accel
	Warm    bool // it was ready before the pod came
}

// Network joins micro-VMs to pod networks.
type Network interface {
	JoinTap(netns string, tap network.Tap) (network.Guest, error)
	ServePortForward(ctx context.Context, netns string, dial func(context.Context, uint16) (net.Conn, error)) error
}

// Tasks is the task service that gets the pod.
type Tasks interface {
	Attach(*task.Pod)
	Gone(at time.Time)
	OOM(container string)
}

// Config is what a Service works with.
type Config struct {
	VM       func(context.Context) (*VM, error) // waits for the clone
	Network  Network
	Tasks    Tasks
	Cgroups  Cgroups
	Roots    volumes.Roots
	Disks    disks.Config
	Steps    *timing.Recorder
	Shutdown func() // ends the daemon once the current call is answered
}

// Cgroups places processes on the host.
type Cgroups interface {
	Join(parent, name string, pids ...int) error
	// Sustain undoes limits of the kubelet's that would stall a micro-VM with so much memory, in bytes, or have
	// it killed.
	Sustain(memory int64) error
	Leave() error
	// SetOOMScore sets oom_score_adj; fs.ErrPermission where that is not allowed.
	SetOOMScore(pid, score int) error
}

// Service is the sandbox API of one micro-VM.
type Service struct {
	cfg Config

	// background ends with the micro-VM.
	background context.Context
	cancel     context.CancelFunc
	running    sync.WaitGroup
	score      score

	mu      sync.Mutex // guards the fields below
	id      string
	config  *cripb.PodSandboxConfig
	netns   string
	vm      *VM
	pod     *task.Pod
	disks   *disks.Set
	room    *room // memory and CPUs of the VM
	created time.Time
	stop    bool // was asked for
	ending  bool // the tasks are being told

	started chan struct{} // closed when the start has succeeded or failed
	err     error         // of the start
	stopped chan struct{} // closed when the fields below are set
	exit    uint32
	exitAt  time.Time
}

var _ api.TTRPCSandboxService = (*Service)(nil)

// New makes a service that waits for its pod.
func New(cfg Config) *Service {
	s := &Service{cfg: cfg, room: &room{}, started: make(chan struct{}), stopped: make(chan struct{})}
	s.background, s.cancel = context.WithCancel(context.Background())
	return s
}

// ID is the sandbox's id, "" before Create.
func (s *Service) ID() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id
}

// CreateSandbox takes the pod's configuration and begins to start the micro-VM.
func (s *Service) CreateSandbox(_ context.Context, r *api.CreateSandboxRequest) (*api.CreateSandboxResponse, error) {
	if err := s.create(r); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("creating sandbox: %w", err))
	}
	return &api.CreateSandboxResponse{}, nil
}

func (s *Service) create(r *api.CreateSandboxRequest) error {
	config, err := ParseConfig(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id != "" {
		return fmt.Errorf("sandbox %s: %w", s.id, errdefs.ErrAlreadyExists)
	}
	s.id, s.config, s.netns, s.created = r.SandboxID, config, r.NetnsPath, time.Now()
	s.running.Go(func() {
		err := s.boot(s.background)
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
		close(s.started)
	})
	return nil
}

// ParseConfig reads the pod's configuration and refuses pods that need the host.
func ParseConfig(r *api.CreateSandboxRequest) (*cripb.PodSandboxConfig, error) {
	config := &cripb.PodSandboxConfig{}
	if r.SandboxID == "" {
		return nil, fmt.Errorf("no sandbox id: %w", errdefs.ErrInvalidArgument)
	}
	if o := r.Options; o != nil {
		if !strings.HasSuffix(o.TypeUrl, "PodSandboxConfig") {
			return nil, fmt.Errorf("options of type %q: %w", o.TypeUrl, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(o.Value, config); err != nil {
			return nil, fmt.Errorf("decoding pod configuration: %w: %w", errdefs.ErrInvalidArgument, err)
		}
	}
	ns := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	for what, mode := range map[string]cripb.NamespaceMode{"hostNetwork": ns.GetNetwork(), "hostPID": ns.GetPid(), "hostIPC": ns.GetIpc()} {
		if mode == cripb.NamespaceMode_NODE {
			return nil, hostError(what)
		}
	}
	if u := ns.GetUsernsOptions(); u != nil && u.GetMode() == cripb.NamespaceMode_POD {
		return nil, fmt.Errorf("hostUsers false is not possible in a micro-VM pod; leave it unset, the pod has its own kernel: %w", errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// StartSandbox waits until the micro-VM runs.
func (s *Service) StartSandbox(ctx context.Context, r *api.StartSandboxRequest) (*api.StartSandboxResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-s.started:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("starting micro-VM: %w", s.err))
	}
	return &api.StartSandboxResponse{Pid: s.pod.PID, CreatedAt: timestamppb.New(s.created)}, nil
}

// check refuses calls for another sandbox.
func (s *Service) check(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id == "" || s.id != id {
		return fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return nil
}

// Platform says that containers are for Linux, whatever else.
func (s *Service) Platform(context.Context, *api.PlatformRequest) (*api.PlatformResponse, error) {
	return &api.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: "amd64"}}, nil
}

// StopSandbox ends the micro-VM. The containers are containerd's to stop before.
func (s *Service) StopSandbox(ctx context.Context, r *api.StopSandboxRequest) (*api.StopSandboxResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := s.Stop(ctx); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("stopping sandbox: %w", err))
	}
	return &api.StopSandboxResponse{}, nil
}

// Stop ends the micro-VM and waits for its end. It may be called at any time, also without a sandbox.
func (s *Service) Stop(ctx context.Context) error {
	s.mu.Lock()
	s.stop = true
	m := s.vm
	s.mu.Unlock()
	s.cancel()
	begun := time.Now()
	if m == nil {
		// The start, if there is one, ends with its context; then there may be a machine after all.
		ctx, cancel := context.WithTimeout(ctx, stopTimeout-killTimeout)
		defer cancel()
		if err := s.settle(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		m = s.vm
		s.mu.Unlock()
	}
	if m != nil {
		s.releaseDisks(ctx)
		if err := m.Machine.Kill(); err != nil {
			return err
		}
		if err := awaitEnd(m.Machine, max(killTimeout, stopTimeout-time.Since(begun))); err != nil {
			return err
		}
	}
	s.end(statusStopped, time.Now())
	return s.cfg.Cgroups.Leave()
}

// awaitEnd waits until QEMU, which was killed, has ended.
func awaitEnd(m Machine, within time.Duration) error {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-m.Done():
		return nil
	case <-timer.C:
	}
	select {
	case <-m.Done(): // both
		return nil
	default:
		return fmt.Errorf("waiting for qemu to end: %w", context.DeadlineExceeded)
	}
}

// releaseDisks has the guest write out its persistent volumes and closes them. One that does not let go is
// closed all the same.
func (s *Service) releaseDisks(ctx context.Context) {
	s.mu.Lock()
	d := s.disks
	s.mu.Unlock()
	if d == nil {
		return
	}
	if err := d.Release(ctx); err != nil {
		slog.Warn("releasing volumes", "sandbox", s.ID(), "error", err)
	}
}

// settle waits for a start that is under way.
func (s *Service) settle(ctx context.Context) error {
	if s.ID() == "" {
		return nil
	}
	select {
	case <-s.started:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the start to give up: %w", ctx.Err())
	}
}

// end records the end of the sandbox, once, and tells the tasks. All callers return when they have been told.
func (s *Service) end(status uint32, at time.Time) {
	s.mu.Lock()
	if s.ending {
		s.mu.Unlock()
		<-s.stopped
		return
	}
	s.ending, s.exit, s.exitAt = true, status, at
	s.mu.Unlock()
	s.cancel()
	// Containers first: whoever waits for the sandbox then finds them ended.
	s.cfg.Tasks.Gone(at)
	close(s.stopped)
}

// ended reports whether the sandbox has ended.
func (s *Service) ended() bool {
	select {
	case <-s.stopped:
		return true
	default:
		return false
	}
}

// watch waits for the end of QEMU.
func (s *Service) watch(m *VM) {
	<-m.Machine.Done()
	// The kubelet does not stop a sandbox that has ended by itself, and its volumes are wanted elsewhere.
	s.releaseDisks(context.Background())
	s.mu.Lock()
	asked := s.stop
	s.mu.Unlock()
	if asked {
		s.end(statusStopped, time.Now())
		return
	}
	slog.Warn("micro-VM ended", "sandbox", s.ID(), "exit", m.Machine.Exit().String(), "console", lastLine(m.Machine.Console()))
	s.end(statusKilled, time.Now())
}

// lastLine is the end of the console, without what would spoil a log. The guest wrote it.
func lastLine(console []byte) string {
	const limit = 300
	text := strings.TrimSpace(string(console[max(0, len(console)-limit):]))
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}

// WaitSandbox blocks until the sandbox has ended.
func (s *Service) WaitSandbox(ctx context.Context, r *api.WaitSandboxRequest) (*api.WaitSandboxResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-s.stopped:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &api.WaitSandboxResponse{ExitStatus: s.exit, ExitedAt: timestamppb.New(s.exitAt)}, nil
}

// PingSandbox says that the daemon answers.
func (s *Service) PingSandbox(context.Context, *api.PingRequest) (*api.PingResponse, error) {
	return &api.PingResponse{}, nil
}

// ShutdownSandbox ends the micro-VM if it runs, and the daemon.
func (s *Service) ShutdownSandbox(ctx context.Context, _ *api.ShutdownSandboxRequest) (*api.ShutdownSandboxResponse, error) {
	err := s.Stop(context.WithoutCancel(ctx))
	s.cfg.Shutdown()
	if err != nil {
		slog.Warn("stopping sandbox", "sandbox", s.ID(), "error", err)
	}
	return &api.ShutdownSandboxResponse{}, nil
}

// release gives back memory that only the start needed.
func release() { debug.FreeOSMemory() }

// hostError is for pods that belong under another runtime class.
func hostError(what string) error {
	return fmt.Errorf("%s is not possible in a micro-VM pod; use runtimeClassName \"runc\" in a namespace whose administrator allows it: %w",
		what, errdefs.ErrInvalidArgument)
}

// gone reports whether an error means that there is no guest any more.
func gone(err error) bool { return errdefs.IsUnavailable(err) || errors.Is(err, context.Canceled) }
