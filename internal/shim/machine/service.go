// Package machine is the shim of a pod that is a virtual machine (RuntimeClass atoll-vm): containerd's sandbox and
// task services over one machine of package hardware, and the socket at which the host's agent changes it while it
// runs (methods of package machinev1, and those for volumes of package attach).
//
// The pod has one container. Its Create checks the machine, which is in an annotation of the pod; its Start opens the
// disks, makes the seed disk, joins the network and starts QEMU. Its standard streams are the serial console, an exec
// is run by the guest agent or, for a few commands, by the shim. The container's end is the machine's:
//
//	created --Start--> running --guest powers off, SIGTERM, SIGKILL--> exited 0
//	                      |  ^--guest restarts--+
//	                      +--QEMU fails or is killed--> exited 137
//	created --Start fails--> exited 128
//
// The sandbox stays until the pod goes, so that the agent learns how the machine has ended. What was asked for while
// it runs (Apply) is done by one worker, again until it succeeds. How the machine is (State) is kept on a board that
// the agent waits at. Nothing is on disk: the shim lives as long as its machine, and longer than containerd and the
// agent.
//
// It is not a runtime of containers and knows nothing of Kubernetes' objects. internal/shim/daemon wires it. What can
// go wrong: the machine is not valid (Create, the error names the field); a volume cannot be opened, the firmware is
// missing, a bridge is not there (Start, the container ends with 128 and the state says why); the guest ignores what
// it is asked (it is powered off by force after a while, as Stop says); QEMU ends (137).
package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/dhcp"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/shim/machine/config"
	"atoll.dev/atoll/internal/shim/sandbox"
	"atoll.dev/atoll/internal/shim/task"
	"atoll.dev/atoll/internal/vm"
)

// Network joins machines to networks.
type Network interface {
	NewTap(poolNetns, name string) (network.Tap, error)
	JoinTap(netns string, tap network.Tap) (network.Guest, error)
	NewBridgeTap(name, bridge string, vlan int) (*os.File, error)
	ServeDHCP(ctx context.Context, netns string, c dhcp.Config) error
	ServePortForward(ctx context.Context, netns, address string) error
}

// Agent is the host's agent.
type Agent interface {
	// Open says how to open a volume. It waits for an agent that is restarting.
	Open(ctx context.Context, r attach.OpenRequest) (attach.Opened, error)
	// Close says that a volume was closed.
	Close(ctx context.Context, r attach.OpenRequest) error
	Snapshots(ctx context.Context, r attach.SnapshotsRequest) error
}

// Cgroups places processes on the host.
type Cgroups interface {
	sandbox.Cgroups
	// OOMKilled tells whether the kernel has killed a process of the pod for memory.
	OOMKilled() bool
}

// Config is what a Service works with.
type Config struct {
	Host    config.Config
	Member  string // id of the shim daemon
	UID     uint32 // and group of QEMU
	Socket  string // for the agent, made with the sandbox
	Engine  Engine
	Network Network
	Agent   Agent
	Cgroups Cgroups
	Events  task.Publisher
	// Accel is how guest code is run on this host.
	Accel    func(context.Context) vm.Accel
	Started  func(pid int) // QEMU runs
	Shutdown func()        // ends the daemon once the current call is answered
}

// Service is both APIs of one pod.
type Service struct {
	cfg     Config
	records attach.Records
	board   *board.Board

	// background ends with the sandbox.
	background context.Context
	cancel     context.CancelFunc
	running    sync.WaitGroup

	mu        sync.Mutex // guards the fields below, not held over calls
	id        string
	pod       *cripb.PodSandboxConfig
	netns     string
	created   time.Time
	ready     bool // StartSandbox was called
	machine   *machinev1.Machine
	container *process
	bundle    string
	seed      string // directory with the files of the seed disk
	lastWords string // file for the termination message
	score     int    // oom_score_adj of the container
	execs     map[string]*process
	pids      uint32
	life      *life // the machine, from the start of Start on
	stopped   chan struct{}
	exit      time.Time
}

var _ api.TTRPCSandboxService = (*Service)(nil)

// New makes a service that waits for its pod.
func New(cfg Config) *Service {
	s := &Service{
		cfg: cfg, records: attach.NewRecords(cfg.Host.RunDir), board: board.New(), execs: map[string]*process{},
		stopped: make(chan struct{}),
	}
	s.background, s.cancel = context.WithCancel(context.Background())
	return s
}

// ID is the sandbox's id, "" before Create.
func (s *Service) ID() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id
}

// uid is the pod's.
func (s *Service) uid() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pod.GetMetadata().GetUid()
}

// CreateSandbox takes the pod's configuration and checks the machine in it.
func (s *Service) CreateSandbox(_ context.Context, r *api.CreateSandboxRequest) (*api.CreateSandboxResponse, error) {
	if err := s.createSandbox(r); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("creating virtual machine: %w", err))
	}
	return &api.CreateSandboxResponse{}, nil
}

func (s *Service) createSandbox(r *api.CreateSandboxRequest) error {
	pod, err := sandbox.ParseConfig(r)
	if err != nil {
		return err
	}
	text, ok := pod.GetAnnotations()[machinev1.Annotation]
	if !ok {
		return fmt.Errorf("the pod has no annotation %s: pods of runtimeClassName %s are made by VirtualMachine objects only: %w",
			machinev1.Annotation, machinev1.RuntimeClass, errdefs.ErrInvalidArgument)
	}
	m, err := machinev1.Parse([]byte(text))
	if err != nil {
		return fmt.Errorf("annotation %s: %w: %w", machinev1.Annotation, err, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id != "" {
		return fmt.Errorf("sandbox %s: %w", s.id, errdefs.ErrAlreadyExists)
	}
	s.id, s.pod, s.netns, s.created, s.machine = r.SandboxID, pod, r.NetnsPath, time.Now(), m
	s.board.Update(func(st *machinev1.State) { st.Phase, st.Applied = machinev1.Starting, m.Revision })
	return nil
}

// StartSandbox begins to answer the agent.
func (s *Service) StartSandbox(_ context.Context, r *api.StartSandboxRequest) (*api.StartSandboxResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := s.serve(); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("starting virtual machine: %w", err))
	}
	s.setScore(os.Getpid(), scoreShim)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = true
	return &api.StartSandboxResponse{Pid: uint32(os.Getpid()), CreatedAt: timestamppb.New(s.created)}, nil
}

// check refuses calls for another sandbox.
func (s *Service) check(id string) error {
	if own := s.ID(); own == "" || own != id {
		return fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return nil
}

// Platform says that containers are for Linux, whatever else.
func (s *Service) Platform(context.Context, *api.PlatformRequest) (*api.PlatformResponse, error) {
	return &api.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: "amd64"}}, nil
}

// StopSandbox ends the machine if it still runs. The agent is answered until Shutdown.
func (s *Service) StopSandbox(_ context.Context, r *api.StopSandboxRequest) (*api.StopSandboxResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := s.stop(); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("stopping virtual machine: %w", err))
	}
	return &api.StopSandboxResponse{}, nil
}

// stop ends the machine by force and waits for its end.
func (s *Service) stop() error {
	s.mu.Lock()
	l := s.life
	s.mu.Unlock()
	if l != nil {
		l.powerOff()
		select {
		case <-l.ended:
		case <-time.After(killTimeout + releaseTimeout):
			return errors.New("qemu does not end")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isStopped() {
		s.exit = time.Now()
		close(s.stopped)
	}
	return nil
}

func (s *Service) isStopped() bool {
	select {
	case <-s.stopped:
		return true
	default:
		return false
	}
}

// Stop ends everything; it may be called at any time, also without a sandbox.
func (s *Service) Stop(context.Context) error {
	err := s.stop()
	s.cancel()
	s.running.Wait()
	return errors.Join(err, s.cfg.Cgroups.Leave())
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
	return &api.WaitSandboxResponse{ExitedAt: timestamppb.New(s.exit)}, nil
}

// SandboxStatus says how the sandbox is.
func (s *Service) SandboxStatus(_ context.Context, r *api.SandboxStatusRequest) (*api.SandboxStatusResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &api.SandboxStatusResponse{
		SandboxID: s.id, Pid: uint32(os.Getpid()), State: "SANDBOX_NOTREADY", CreatedAt: timestamppb.New(s.created),
	}
	switch {
	case s.isStopped():
		resp.ExitedAt = timestamppb.New(s.exit)
	case s.ready:
		resp.State = "SANDBOX_READY"
	}
	if r.Verbose {
		resp.Info = map[string]string{sandbox.InfoKey: s.board.JSON()}
	}
	return resp, nil
}

// PingSandbox says that the daemon answers.
func (s *Service) PingSandbox(context.Context, *api.PingRequest) (*api.PingResponse, error) {
	return &api.PingResponse{}, nil
}

// ShutdownSandbox ends the machine if it runs, and the daemon.
func (s *Service) ShutdownSandbox(ctx context.Context, _ *api.ShutdownSandboxRequest) (*api.ShutdownSandboxResponse, error) {
	if err := s.Stop(ctx); err != nil {
		slog.Warn("stopping virtual machine", "sandbox", s.ID(), "error", err)
	}
	s.cfg.Shutdown()
	return &api.ShutdownSandboxResponse{}, nil
}

// SandboxMetrics returns the usage of the whole pod.
func (s *Service) SandboxMetrics(_ context.Context, r *api.SandboxMetricsRequest) (*api.SandboxMetricsResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	data, err := s.usage()
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("reading sandbox metrics: %w", err))
	}
	return &api.SandboxMetricsResponse{Metrics: &types.Metric{Timestamp: timestamppb.Now(), ID: r.SandboxID, Data: data}}, nil
}
