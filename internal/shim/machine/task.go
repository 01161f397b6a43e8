package machine

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"

	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/spec"
	"atoll.dev/atoll/internal/shim/stdio"
)

// terminationLog is where the kubelet has its file for the last words of a container.
const terminationLog = "/dev/termination-log"

// Tasks is the task service of a Service.
type Tasks struct{ *Service }

var _ api.TTRPCTaskService = Tasks{}

// process finds the container (exec "") or an exec.
func (s *Service) process(id, exec string) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.container == nil || s.container.id != id {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	if exec == "" {
		return s.container, nil
	}
	p := s.execs[exec]
	if p == nil {
		return nil, fmt.Errorf("exec %s: %w", exec, errdefs.ErrNotFound)
	}
	return p, nil
}

// newProcess opens the host's ends of a process.
func (s *Service) newProcess(id, exec string, cfg stdio.Config) (*process, error) {
	open, err := stdio.Open(cfg)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pids++
	return &process{id: id, exec: exec, pid: pidBase + s.pids, config: cfg, io: open, ended: make(chan struct{})}, nil
}

// Create takes the pod's container on.
func (t Tasks) Create(_ context.Context, r *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	p, err := t.create(r)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("creating container of virtual machine: %w", err))
	}
	t.cfg.Events.Publish(&apievents.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: p.pid,
		IO: &apievents.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	return &api.CreateTaskResponse{Pid: p.pid}, nil
}

func (s *Service) create(r *api.CreateTaskRequest) (*process, error) {
	switch s.mu.Lock(); {
	case s.id == "" || s.isStopped():
		s.mu.Unlock()
		return nil, fmt.Errorf("the sandbox is not running: %w", errdefs.ErrFailedPrecondition)
	case s.container != nil:
		s.mu.Unlock()
		return nil, fmt.Errorf("the pod of a virtual machine has one container, and it has been made: %w", errdefs.ErrAlreadyExists)
	}
	s.mu.Unlock()
	if r.Checkpoint != "" {
		return nil, fmt.Errorf("restoring a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	data, err := os.ReadFile(filepath.Join(r.Bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("reading bundle: %w", err)
	}
	oci, err := spec.Parse(data)
	if err != nil {
		return nil, err
	}
	p, err := s.newProcess(r.ID, "", stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.container, s.bundle = p, r.Bundle
	s.seed, s.lastWords = mountAt(oci, machinev1.SeedDir), mountAt(oci, terminationLog)
	if oci.Process != nil && oci.Process.OOMScoreAdj != nil {
		s.score = *oci.Process.OOMScoreAdj
	}
	return p, nil
}

// mountAt is the source of the mount at a path of the container, "" for none.
func mountAt(oci *specs.Spec, destination string) string {
	for _, m := range oci.Mounts {
		if path.Clean(m.Destination) == destination && spec.IsBind(m) {
			return m.Source
		}
	}
	return ""
}

// Start begins to start the machine, or starts an exec. A machine that cannot be started has ended.
func (t Tasks) Start(_ context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	p, err := t.process(r.ID, r.ExecID)
	if err == nil {
		err = p.begin()
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	e, err := p.connect()
	if err != nil {
		p.io.Close()
		t.exited(p, statusFailed)
		return nil, errgrpc.ToGRPC(fmt.Errorf("connecting standard streams: %w", err))
	}
	if p.exec == "" {
		t.cfg.Events.Publish(&apievents.TaskStart{ContainerID: p.id, Pid: p.pid})
		t.begin(p, e)
		return &api.StartResponse{Pid: p.pid}, nil
	}
	t.cfg.Events.Publish(&apievents.TaskExecStarted{ContainerID: p.id, ExecID: p.exec, Pid: p.pid})
	t.running.Go(func() {
		status := p.run(e)
		e.close()
		t.exited(p, status)
	})
	return &api.StartResponse{Pid: p.pid}, nil
}

// exited records and reports an exit, once.
func (s *Service) exited(p *process, status uint32) {
	if !p.end(status) {
		return
	}
	id := p.exec
	if id == "" {
		id = p.id
	}
	_, _, at := p.state()
	s.cfg.Events.Publish(&apievents.TaskExit{
		ContainerID: p.id, ID: id, Pid: p.pid, ExitStatus: status, ExitedAt: timestamppb.New(at),
	})
}

// Wait blocks until a process has exited.
func (t Tasks) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	p, err := t.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
	_, status, at := p.state()
	return &api.WaitResponse{ExitStatus: status, ExitedAt: timestamppb.New(at)}, nil
}

// State says how a process is.
func (t Tasks) State(_ context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	p, err := t.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	state, status, at := p.state()
	t.mu.Lock()
	bundle := t.bundle
	t.mu.Unlock()
	resp := &api.StateResponse{
		ID: p.id, ExecID: p.exec, Bundle: bundle, Pid: p.pid, Status: state, ExitStatus: status,
		Stdin: p.config.Stdin, Stdout: p.config.Stdout, Stderr: p.config.Stderr, Terminal: p.config.Terminal,
	}
	if !at.IsZero() {
		resp.ExitedAt = timestamppb.New(at)
	}
	return resp, nil
}

// Kill stops the machine: with notice (SIGTERM), or as if the power was cut (SIGKILL). An exec is not
// waited for any more; what it began in the guest goes on.
func (t Tasks) Kill(_ context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	p, err := t.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	switch signal := unix.Signal(r.Signal); {
	case p.hasEnded() && !r.All:
		return nil, errgrpc.ToGRPC(fmt.Errorf("process has ended: %w", errdefs.ErrNotFound))
	case signal != unix.SIGTERM && signal != unix.SIGKILL:
		return nil, errgrpc.ToGRPC(fmt.Errorf("%s cannot be sent to a virtual machine: %w", unix.SignalName(signal), errdefs.ErrInvalidArgument))
	case p.begin() == nil, p.exec != "": // it was not started, or goes on in the guest
		p.io.Close()
		t.exited(p, 128+r.Signal)
	default:
		t.mu.Lock()
		l := t.life
		t.mu.Unlock()
		if l != nil {
			l.stop(signal == unix.SIGKILL)
		}
	}
	return &emptypb.Empty{}, nil
}

// Delete forgets a process that has exited.
func (t Tasks) Delete(_ context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	p, err := t.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if p.begin() != nil && !p.hasEnded() {
		return nil, errgrpc.ToGRPC(fmt.Errorf("process is running: %w", errdefs.ErrFailedPrecondition))
	}
	p.io.Close()
	_, status, at := p.state()
	resp := &api.DeleteResponse{Pid: p.pid, ExitStatus: status}
	if !at.IsZero() {
		resp.ExitedAt = timestamppb.New(at)
	}
	t.mu.Lock()
	if p.exec != "" {
		delete(t.execs, p.exec)
	} else {
		t.container = nil
	}
	t.mu.Unlock()
	if p.exec == "" {
		t.cfg.Events.Publish(&apievents.TaskDelete{ContainerID: p.id, Pid: p.pid, ExitStatus: status, ExitedAt: resp.ExitedAt})
	}
	return resp, nil
}

// CloseIO ends the standard input of a process.
func (t Tasks) CloseIO(_ context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	p, err := t.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if r.Stdin {
		p.io.CloseStdin()
	}
	return &emptypb.Empty{}, nil
}

// Pids lists the processes of the container.
func (t Tasks) Pids(_ context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	pid := uint32(os.Getpid())
	if r.ID != t.ID() {
		p, err := t.process(r.ID, "")
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		pid = p.pid
	}
	return &api.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: pid}}}, nil
}

// Connect says which processes these are. containerd asks after it has restarted.
func (t Tasks) Connect(_ context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	resp := &api.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: uint32(os.Getpid()), Version: "v3"}
	if r.ID == t.ID() {
		return resp, nil
	}
	p, err := t.process(r.ID, "")
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	resp.TaskPid = p.pid
	return resp, nil
}

// Shutdown ends the daemon if it is asked for the sandbox and no container is left.
func (t Tasks) Shutdown(_ context.Context, r *api.ShutdownRequest) (*emptypb.Empty, error) {
	t.mu.Lock()
	left := t.container != nil
	t.mu.Unlock()
	if r.ID == t.ID() && (!left || r.Now) {
		slog.Info("task shutdown was requested")
		t.cfg.Shutdown()
	}
	return &emptypb.Empty{}, nil
}

// ResizePty is of no use: a serial line has no size.
func (t Tasks) ResizePty(context.Context, *api.ResizePtyRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Update does nothing: the size of a machine is in its Machine, see Apply.
func (t Tasks) Update(context.Context, *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Checkpoint is not possible here: memory is saved by an operation of the machine.
func (t Tasks) Checkpoint(context.Context, *api.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("checkpoint of a virtual machine; use a VirtualMachineSnapshot: %w", errdefs.ErrNotImplemented))
}

// Pause is not possible here.
func (t Tasks) Pause(context.Context, *api.PauseRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("pausing a virtual machine; set its powerState to Suspended: %w", errdefs.ErrNotImplemented))
}

// Resume is not possible here.
func (t Tasks) Resume(context.Context, *api.ResumeRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(fmt.Errorf("resuming a virtual machine: %w", errdefs.ErrNotImplemented))
}

// Stats returns the usage of the machine on the host.
func (t Tasks) Stats(_ context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	if _, err := t.process(r.ID, ""); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	value, err := t.usage()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &api.StatsResponse{Stats: value}, nil
}
