package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/flatspec"
	"atoll.dev/atoll/internal/shim/spec"
	"atoll.dev/atoll/internal/shim/stdio"
)

// logTimeout bounds the copying of a termination message, which delays the report of an exit.
const logTimeout = 90 * time.Second

// Start starts a container's first process, or an exec.
func (s *Service) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := p.begin(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	pod, err := s.start(ctx, c, p)
	if err != nil {
		// As runc does: a process that could not be started has ended.
		p.io.Close()
		s.exited(c, p, exit{status: 128, at: time.Now()})
		return nil, errgrpc.ToGRPC(err)
	}
	if p.exec == "" {
		s.cfg.Events.Publish(&apievents.TaskStart{ContainerID: c.id, Pid: p.pid})
		s.cfg.Steps.Log("container started", "container", c.id)
	} else {
		s.cfg.Events.Publish(&apievents.TaskExecStarted{ContainerID: c.id, ExecID: p.exec, Pid: p.pid})
	}
	go s.wait(context.WithoutCancel(ctx), pod, c, p)
	return &api.StartResponse{Pid: p.pid}, nil
}

// start starts a process in the guest, once it has the container.
func (s *Service) start(ctx context.Context, c *container, p *process) (*Pod, error) {
	steps := s.cfg.Steps.Begin("start")
	pod, err := s.guestOf(ctx, c)
	if err != nil {
		return nil, err
	}
	steps.Done("container created")
	ctx, cancel := call(ctx)
	defer cancel()
	resp, err := pod.Guest.Start(ctx, &guestv1.ProcessRequest{ContainerId: c.id, ExecId: p.exec})
	if err != nil {
		return nil, fmt.Errorf("starting process in micro-VM: %w", err)
	}
	steps.Done("guest")
	p.started(max(resp.GetPid(), 1))
	return pod, nil
}

// wait waits for the exit of a process in the guest. When the micro-VM ends first, Gone reports it.
func (s *Service) wait(ctx context.Context, pod *Pod, c *container, p *process) {
	for {
		resp, err := pod.Guest.Wait(ctx, &guestv1.ProcessRequest{ContainerId: c.id, ExecId: p.exec})
		if err == nil {
			e := exit{status: resp.GetStatus() & 0xff, at: time.Now(), oom: resp.GetOomKilled()}
			if p.exec == "" {
				s.lastWords(ctx, pod, c)
			}
			s.exited(c, p, e)
			return
		}
		if errdefs.IsUnavailable(err) || p.hasEnded() {
			return
		}
		slog.Warn("waiting for process in guest", "container", c.id, "exec", p.exec, "error", err)
		if errdefs.IsNotFound(err) {
			s.exited(c, p, exit{status: 255, at: time.Now()})
			return
		}
		<-time.After(time.Second)
	}
}

// lastWords takes what the kubelet wants to know of a container that has ended.
func (s *Service) lastWords(ctx context.Context, pod *Pod, c *container) {
	ctx, cancel := context.WithTimeout(ctx, logTimeout)
	defer cancel()
	if err := pod.Volumes.SaveTerminationLog(ctx, c.volumes); err != nil {
		slog.Warn("saving termination message", "container", c.id, "error", err)
	}
	if _, err := s.statistics(ctx, pod, c); err != nil {
		slog.Debug("reading statistics of ended container", "container", c.id, "error", err)
	}
}

// exited records and reports an exit, once.
func (s *Service) exited(c *container, p *process, e exit) {
	if e.oom {
		c.noteOOM()
	}
	if !p.end(e) {
		return
	}
	if e.oom {
		s.cfg.Events.Publish(&apievents.TaskOOM{ContainerID: c.id})
	}
	id := p.exec
	if id == "" {
		id = c.id
	}
	s.cfg.Events.Publish(&apievents.TaskExit{
		ContainerID: c.id, ID: id, Pid: p.pid, ExitStatus: e.status, ExitedAt: timestamppb.New(e.at),
	})
}

// OOM reports that a container had a process killed for memory.
func (s *Service) OOM(id string) {
	c, err := s.container(id)
	if err != nil {
		return
	}
	c.noteOOM()
	s.cfg.Events.Publish(&apievents.TaskOOM{ContainerID: id})
}

// Wait blocks until a process has exited.
func (s *Service) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
	_, e := p.status()
	return &api.WaitResponse{ExitStatus: e.status, ExitedAt: timestamppb.New(e.at)}, nil
}

// State says how a process is.
func (s *Service) State(_ context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	status, e := p.status()
	resp := &api.StateResponse{
		ID: c.id, ExecID: p.exec, Bundle: c.bundle, Pid: p.pid, Status: status,
		Stdin: p.config.Stdin, Stdout: p.config.Stdout, Stderr: p.config.Stderr, Terminal: p.config.Terminal,
		ExitStatus: e.status,
	}
	if !e.at.IsZero() {
		resp.ExitedAt = timestamppb.New(e.at)
	}
	return resp, nil
}

// Exec prepares another process in a container.
func (s *Service) Exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := s.exec(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("creating exec in micro-VM: %w", err))
	}
	s.cfg.Events.Publish(&apievents.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return &emptypb.Empty{}, nil
}

func (s *Service) exec(ctx context.Context, r *api.ExecProcessRequest) (err error) {
	c, err := s.container(r.ID)
	if err != nil {
		return err
	}
	pod, err := s.guestOf(ctx, c)
	if err != nil {
		return err
	}
	if !channel.ValidID(r.ExecID) {
		return fmt.Errorf("exec id %q: %w", r.ExecID, errdefs.ErrInvalidArgument)
	}
	var oci specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &oci); err != nil {
		return fmt.Errorf("decoding process: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if err := spec.Exec(&oci, c.privileged); err != nil {
		return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	p := newProcess(r.ExecID, s.newPID(), stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	if p.io, err = stdio.Open(p.config); err != nil {
		return err
	}
	if err := c.addExec(p); err != nil {
		p.io.Close()
		return err
	}
	ctx, cancel := call(ctx)
	defer cancel()
	_, err = pod.Guest.CreateExec(ctx, &guestv1.CreateExecRequest{
		ContainerId: c.id, ExecId: p.exec, Process: flatspec.Process(&oci), Terminal: p.config.Terminal, Stdin: p.io.HasStdin(),
		Seccomp: c.seccomp.code, SeccompFlags: c.seccomp.flags,
	})
	if err == nil {
		err = p.io.Start(p.config.Terminal, func(fd int) (stdio.Stream, error) {
			return pod.Streams.OpenIO(c.id, p.exec, fd)
		})
	}
	if err != nil {
		c.removeExec(p.exec)
		p.io.Close()
	}
	return err
}

// Kill sends a signal to a process, or to all of a container.
func (s *Service) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if p.hasEnded() && !r.All {
		return nil, errgrpc.ToGRPC(fmt.Errorf("process has ended: %w", errdefs.ErrNotFound))
	}
	if s.neverStarted(c, p, r.Signal) {
		return &emptypb.Empty{}, nil
	}
	if !c.isPrepared() && (r.Signal == uint32(unix.SIGKILL) || r.Signal == uint32(unix.SIGTERM)) {
		c.giveUp() // whoever waits to start it gets the error, and the process has ended with that
	}
	pod, err := s.guestOf(ctx, c)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, errgrpc.ToGRPC(err)
	case err != nil:
		return nil, errgrpc.ToGRPC(fmt.Errorf("%w: %w", errdefs.ErrNotFound, err))
	}
	ctx, cancel := call(ctx)
	defer cancel()
	_, err = pod.Guest.Kill(ctx, &guestv1.KillRequest{ContainerId: c.id, ExecId: p.exec, Signal: r.Signal, All: r.All})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// neverStarted ends a process that is only created, which the guest has no process for.
func (s *Service) neverStarted(c *container, p *process, signal uint32) bool {
	if signal != uint32(unix.SIGKILL) && signal != uint32(unix.SIGTERM) {
		return false
	}
	if p.begin() != nil {
		return false
	}
	p.io.Close()
	s.exited(c, p, exit{status: 128 + signal, at: time.Now()})
	return true
}

// Delete forgets a process that has exited.
func (s *Service) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := s.delete(ctx, c, p); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("deleting process in micro-VM: %w", err))
	}
	_, e := p.status()
	resp := &api.DeleteResponse{Pid: p.pid, ExitStatus: e.status}
	if !e.at.IsZero() {
		resp.ExitedAt = timestamppb.New(e.at)
	}
	if p.exec == "" {
		s.cfg.Events.Publish(&apievents.TaskDelete{
			ContainerID: c.id, Pid: p.pid, ExitStatus: resp.ExitStatus, ExitedAt: resp.ExitedAt,
		})
	}
	return resp, nil
}

func (s *Service) delete(ctx context.Context, c *container, p *process) error {
	if p.begin() != nil && !p.hasEnded() {
		return fmt.Errorf("process is running: %w", errdefs.ErrFailedPrecondition)
	}
	c.giveUp()
	select { // A container that the guest refused leaves nothing there.
	case <-c.prepared:
	case <-ctx.Done():
		p.unbegin()
		return ctx.Err()
	}
	pod, err := s.running()
	if err == nil {
		gctx, cancel := call(ctx)
		defer cancel()
		_, err = pod.Guest.Delete(gctx, &guestv1.ProcessRequest{ContainerId: c.id, ExecId: p.exec})
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
			return err
		}
	}
	p.io.Close()
	if p.exec != "" {
		c.removeExec(p.exec)
		return nil
	}
	s.forget(c.id)
	if pod == nil || c.image == "" {
		return nil
	}
	// The container is gone; a disk that cannot be freed is logged and left.
	_ = pod.Images.Release(context.WithoutCancel(ctx), c.image)
	return nil
}

// CloseIO ends the standard input of a process.
func (s *Service) CloseIO(_ context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if r.Stdin {
		p.io.CloseStdin()
	}
	return &emptypb.Empty{}, nil
}

// ResizePty sets the size of a terminal.
func (s *Service) ResizePty(ctx context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	pod, err := s.guestOf(ctx, c)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	const limit = 1<<16 - 1
	if r.Width > limit || r.Height > limit {
		return nil, errgrpc.ToGRPC(fmt.Errorf("terminal size: %w", errdefs.ErrInvalidArgument))
	}
	ctx, cancel := call(ctx)
	defer cancel()
	_, err = pod.Guest.ResizePty(ctx, &guestv1.ResizePtyRequest{ContainerId: c.id, ExecId: p.exec, Width: r.Width, Height: r.Height})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Update changes the limits of a running container.
func (s *Service) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	if err := s.update(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("updating container in micro-VM: %w", err))
	}
	return &emptypb.Empty{}, nil
}

func (s *Service) update(ctx context.Context, r *api.UpdateTaskRequest) error {
	c, err := s.container(r.ID)
	if err != nil {
		return err
	}
	pod, err := s.guestOf(ctx, c)
	if err != nil {
		return err
	}
	var oci specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &oci); err != nil {
		return fmt.Errorf("decoding resources: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	spec.Resources(&oci)
	pod.Sustain()
	next := limitsOf(&oci)
	old := s.setLimits(c, next)
	if err := pod.Grow(ctx, s.total(c)); err != nil {
		s.setLimits(c, old)
		return err
	}
	gctx, cancel := call(ctx)
	defer cancel()
	if _, err := pod.Guest.Update(gctx, &guestv1.UpdateRequest{ContainerId: c.id, Resources: flatspec.Resources(&oci)}); err != nil {
		s.setLimits(c, old)
		return errors.Join(err)
	}
	pod.Resized()
	return nil
}

// setLimits changes what is known of a container's limits and returns what was. Limits that an update
// does not name stay.
func (s *Service) setLimits(c *container, next Resources) Resources {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := c.limits
	if next.Memory > 0 {
		c.limits.Memory = next.Memory
	}
	if next.CPUs > 0 {
		c.limits.CPUs = next.CPUs
	}
	return old
}
