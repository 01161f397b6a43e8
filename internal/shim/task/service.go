// Package task serves containerd's task API (containerd.task.v3) for the containers of one micro-VM:
// create, start, exec, signals, exit, statistics.
//
// The package is the bookkeeping between containerd and the guest. What a container is made of comes
// from packages spec (the OCI spec), volumes, images, seccomp and stdio; the sandbox itself is package
// sandbox, which attaches its running pod here. The daemon registers the Service with its ttrpc server.
//
// A process, a container's first one or an exec:
//
//	created --Start--> running --exit in the guest--> stopped --Delete--> (gone)
//	   |                  |                              ^
//	   +--Kill------------+--the micro-VM ends (137)-----+
//
// What can go wrong: see the packages above; the guest answers nonsense, or not at all (every call has a
// deadline but Wait, which ends with the micro-VM); the micro-VM ends at any time, after which every
// process has exited with 137 and only Delete, State, Wait and Stats still work.
package task

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/shim/images"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/shim/volumes"
)

// callTimeout bounds every call to the guest but Wait, which may starve among emulated ones. The kubelet waits two
// minutes.
const callTimeout = 100 * time.Second

// pidBase is above every pid that a Linux host can have (PID_MAX_LIMIT): what containerd takes for a
// container's pid never names a process of the host.
const pidBase = 1 << 22

// Streams opens the standard streams of processes in the guest.
type Streams interface {
	OpenIO(container, exec string, fd int) (io.ReadWriteCloser, error)
}

// Publisher tells containerd what happened.
type Publisher interface {
	Publish(event proto.Message)
}

// Pod is a running micro-VM that containers can be made in.
type Pod struct {
	Guest   guestv1.GuestService
	Streams Streams
	Images  *images.Store
	Volumes *volumes.Set
	PID     uint32        // by which containerd knows the sandbox
	Files   []specs.Mount // the pod's own /etc/hosts and the like, as guest paths
	// Ready waits until the guest is set up, or says why it never will be. Before that nothing else here
	// works.
	Ready func(context.Context) error
	// Grow makes room for containers with these limits together, where the micro-VM has too little.
	Grow func(ctx context.Context, want Resources) error
	// Protect takes a container's oom_score_adj, for QEMU.
	Protect func(score int)
	// Sustain is called when the kubelet may have changed the pod's limits on the host.
	Sustain func()
	// Resized is called when a container's limits have changed; the pod's may follow.
	Resized func()
}

// Resources is what containers need together; zero means no limit is known.
type Resources struct {
	Memory uint64 // bytes
	CPUs   float64
}

// Config is what a Service works with.
type Config struct {
	Events    Publisher
	SandboxID func() string // "" before the sandbox is created
	Shutdown  func()        // ends the daemon
	Steps     *timing.Recorder
}

// Service is the task API of one micro-VM.
type Service struct {
	cfg Config

	mu         sync.Mutex // guards the fields below, not held over calls
	pod        *Pod       // nil until the sandbox has started
	gone       bool       // the micro-VM has ended
	containers map[string]*container
	pids       uint32 // handed out
}

var _ api.TTRPCTaskService = (*Service)(nil)

// New makes a service without a pod; all it can do before Attach is to say that there is nothing.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, containers: map[string]*container{}}
}

// Attach gives the service its pod.
func (s *Service) Attach(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pod = p
}

// Gone says that the micro-VM has ended: every process has, too.
func (s *Service) Gone(at time.Time) {
	s.mu.Lock()
	s.gone = true
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		if c.giveUp != nil {
			c.giveUp()
		}
		for _, p := range c.processes() {
			s.exited(c, p, exit{status: 137, at: at})
		}
	}
}

// running returns the pod, or why there is none.
func (s *Service) running() (*Pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.gone:
		return nil, fmt.Errorf("the micro-VM of the pod has ended: %w", errdefs.ErrFailedPrecondition)
	case s.pod == nil:
		return nil, fmt.Errorf("the sandbox is not running: %w", errdefs.ErrFailedPrecondition)
	}
	return s.pod, nil
}

// container finds a container that was created. The guest need not have it yet.
func (s *Service) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil || c.init == nil {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// process finds a container's first process (exec "") or an exec.
func (s *Service) process(id, exec string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(exec)
	return c, p, err
}

// guestOf waits until the guest has a container and returns the pod.
func (s *Service) guestOf(ctx context.Context, c *container) (*Pod, error) {
	if err := c.wait(ctx); err != nil {
		return nil, err
	}
	return s.running()
}

// newPID hands out a number that containerd takes for a pid.
func (s *Service) newPID() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pids++
	return pidBase + s.pids
}

// guestPID finds the pid in the guest of the container that containerd knows by pid.
func (s *Service) guestPID(pid uint32) uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		if c.init != nil && c.init.pid == pid {
			return c.init.guest()
		}
	}
	return 0
}

// isSandbox reports whether an id is that of the sandbox itself, for which containerd also asks.
func (s *Service) isSandbox(id string) bool { return id != "" && id == s.cfg.SandboxID() }

// sandboxPID is QEMU's pid, 0 without one.
func (s *Service) sandboxPID() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod == nil {
		return 0
	}
	return s.pod.PID
}

// call bounds the time of calls to the guest.
func call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, callTimeout)
}

// Connect says which processes these are. containerd asks after it has restarted; a sandbox that does
// not answer is taken for dead.
func (s *Service) Connect(_ context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	resp := &api.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: "v3"}
	if s.isSandbox(r.ID) {
		resp.TaskPid = s.sandboxPID()
		return resp, nil
	}
	c, err := s.container(r.ID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	resp.TaskPid = c.init.pid
	return resp, nil
}

// Pids lists the processes of a container by their pids in the guest. It is never empty: containerd
// takes a container without processes for a leak when it restarts.
func (s *Service) Pids(ctx context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	if s.isSandbox(r.ID) {
		return &api.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: s.sandboxPID()}}}, nil
	}
	c, err := s.container(r.ID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	self := &api.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: c.init.pid}}}
	pod, err := s.running()
	if err != nil || !c.isPrepared() {
		return self, nil //nolint:nilerr // see above
	}
	ctx, cancel := call(ctx)
	defer cancel()
	resp, err := pod.Guest.Pids(ctx, &guestv1.ProcessRequest{ContainerId: c.id})
	if err != nil || len(resp.GetPids()) == 0 {
		return self, nil //nolint:nilerr // see above
	}
	out := &api.PidsResponse{}
	for _, pid := range resp.Pids {
		out.Processes = append(out.Processes, &tasktypes.ProcessInfo{Pid: pid})
	}
	return out, nil
}

// Shutdown ends the daemon if it is asked for the sandbox and no container is left. containerd asks for
// containers, too, which live in a sandbox that goes on.
func (s *Service) Shutdown(_ context.Context, r *api.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	left := len(s.containers)
	s.mu.Unlock()
	if s.isSandbox(r.ID) && (left == 0 || r.Now) {
		slog.Info("task shutdown was requested")
		s.cfg.Shutdown()
	}
	return &emptypb.Empty{}, nil
}

// Checkpoint is not possible: a micro-VM is saved as a whole.
func (s *Service) Checkpoint(context.Context, *api.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("checkpoint of a container in a micro-VM: %w", errdefs.ErrNotImplemented))
}

// Pause is not possible for one container.
func (s *Service) Pause(context.Context, *api.PauseRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("pausing a container in a micro-VM: %w", errdefs.ErrNotImplemented))
}

// Resume is not possible for one container.
func (s *Service) Resume(context.Context, *api.ResumeRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("resuming a container in a micro-VM: %w", errdefs.ErrNotImplemented))
}
