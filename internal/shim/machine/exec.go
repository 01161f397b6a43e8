package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/guest"
	"atoll.dev/atoll/internal/shim/stdio"
	"atoll.dev/atoll/internal/vm/guestagent"
)

const (
	// maxExecs bounds the execs at a time.
	maxExecs     = 64
	statusSignal = 128
)

// Exec prepares a command: one of the guest's, which its agent runs, or one of those that are answered here.
func (t Tasks) Exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := t.exec(ctx, r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	t.cfg.Events.Publish(&apievents.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return &emptypb.Empty{}, nil
}

func (s *Service) exec(ctx context.Context, r *api.ExecProcessRequest) error {
	if _, err := s.process(r.ID, ""); err != nil {
		return err
	}
	s.mu.Lock()
	l, n := s.life, len(s.execs)
	s.mu.Unlock()
	var hw Hardware
	if l != nil && l.ctx.Err() == nil {
		hw = l.hardware()
	}
	switch {
	case hw == nil:
		return fmt.Errorf("the virtual machine is not running: %w", errdefs.ErrFailedPrecondition)
	case n >= maxExecs:
		return fmt.Errorf("%d commands run in the machine already: %w", n, errdefs.ErrResourceExhausted)
	case r.ExecID == "":
		return fmt.Errorf("no exec id: %w", errdefs.ErrInvalidArgument)
	}
	var oci specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &oci); err != nil {
		return fmt.Errorf("decoding process: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if len(oci.Args) == 0 {
		return fmt.Errorf("no command to run: %w", errdefs.ErrInvalidArgument)
	}
	running, cancel := context.WithCancel(l.ctx) // until its end, or somebody has given it up
	run, err := l.command(ctx, running, hw, oci.Args, r.Terminal)
	if err != nil {
		cancel()
		return err
	}
	p, err := s.newProcess(r.ID, r.ExecID, stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	if err != nil {
		cancel()
		return err
	}
	p.run, p.cancel = run, cancel
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.execs[r.ExecID] != nil {
		cancel()
		p.io.Close()
		return fmt.Errorf("exec %s: %w", r.ExecID, errdefs.ErrAlreadyExists)
	}
	s.execs[r.ExecID] = p
	return nil
}

// command finds out what a command line means, which is then done until running ends.
func (l *life) command(ctx, running context.Context, hw Hardware, args []string, terminal bool) (func(ends) uint32, error) {
	switch args[0] {
	case machinev1.CommandHeartbeat:
		return func(e ends) uint32 { return result(e, guest.Heartbeat(running, hw.Agent())) }, nil
	case machinev1.CommandGuestInfo:
		return func(e ends) uint32 { return result(e, guest.Info(running, hw.Agent(), args[1:])) }, nil
	case machinev1.CommandStream:
		if len(args) != 2 {
			return nil, fmt.Errorf("%s takes one argument, %s or %s: %w", args[0], machinev1.StreamVNC, machinev1.StreamSerial, errdefs.ErrInvalidArgument)
		}
		conn, err := l.open2(ctx, hw, machinev1.StreamKind(args[1]))
		if err != nil {
			return nil, err
		}
		return func(e ends) uint32 { return l.relay(e, conn) }, nil
	}
	if terminal {
		return nil, fmt.Errorf("the guest agent gives no terminal to a command: leave out -t, or use the serial console (kubectl attach -it): %w", errdefs.ErrInvalidArgument)
	}
	limit, silent := askTimeout, guest.ErrNoAgent
	if hw.Agent().Answered() {
		limit, silent = guest.Busy, guest.ErrSilent
	}
	asking, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := hw.Agent().Ping(asking); err != nil {
		// Only the message: containerd would add the word for the class, more than once.
		return nil, errdefs.ErrUnavailable.WithMessage(silent.Error())
	}
	return func(e ends) uint32 { return guestExec(running, e, hw, args) }, nil
}

// result writes what failed to standard error.
func result(e ends, err error) uint32 {
	if err == nil {
		return 0
	}
	_, _ = fmt.Fprintln(e.err, err)
	return 1
}

// guestExec runs a command in the guest. Its input is complete before it starts, and its output comes at its end:
// that is what guest agents can do.
func guestExec(ctx context.Context, e ends, hw Hardware, args []string) uint32 {
	const failed = 126
	var input []byte
	if e.in != nil {
		var err error
		if input, err = io.ReadAll(io.LimitReader(e.in, guestagent.MaxStdin+1)); err != nil {
			return failed
		}
		if len(input) > guestagent.MaxStdin {
			_, _ = fmt.Fprintf(e.err, "standard input has more than the %d bytes that a guest agent takes\n", guestagent.MaxStdin)
			return failed
		}
	}
	r, err := hw.Agent().Exec(ctx, guestagent.Command{Path: args[0], Args: args[1:], Stdin: input})
	if err != nil {
		if errors.Is(err, guestagent.ErrNoAgent) {
			_, _ = fmt.Fprintf(e.err, "running %s in the guest: %v; it may have run all the same\n", args[0], err)
			return failed
		}
		_, _ = fmt.Fprintf(e.err, "running %s in the guest: %v\n", args[0], err)
		return failed + 1 // not found, mostly
	}
	var both sync.WaitGroup
	both.Go(func() { _, _ = e.out.Write(r.Stdout) })
	both.Go(func() { _, _ = e.err.Write(r.Stderr) })
	both.Wait()
	if r.Truncated {
		_, _ = fmt.Fprintf(e.err, "the output was longer; only the first %d bytes of it are shown\n", guestagent.MaxOutput)
	}
	if r.Signal != 0 {
		return uint32(statusSignal+r.Signal) & 0xff
	}
	return uint32(r.ExitCode) & 0xff
}

// open2 opens a console.
func (l *life) open2(ctx context.Context, hw Hardware, kind machinev1.StreamKind) (io.ReadWriteCloser, error) {
	switch kind {
	case machinev1.StreamVNC:
		ctx, cancel := context.WithTimeout(ctx, guest.Busy)
		defer cancel()
		return hw.VNC(ctx)
	case machinev1.StreamSerial:
		return hw.Serial(), nil
	}
	return nil, fmt.Errorf("there is no stream %q, only %s and %s: %w", kind, machinev1.StreamVNC, machinev1.StreamSerial, errdefs.ErrInvalidArgument)
}

// relay copies both ways until the console ends or its user goes.
func (l *life) relay(e ends, conn io.ReadWriteCloser) uint32 {
	defer conn.Close()
	stop := context.AfterFunc(l.ctx, func() { _ = conn.Close() })
	defer stop()
	if e.in != nil {
		l.s.running.Go(func() {
			_, _ = io.Copy(conn, e.in)
			_ = conn.Close() // there is nobody any more
		})
	}
	_, _ = io.Copy(e.out, conn)
	return 0
}

// join copies both ways between a console and a connection of the agent.
func join(conn net.Conn, console io.ReadWriteCloser) {
	var once sync.Once
	done := func() {
		_ = console.Close()
		_ = conn.SetDeadline(time.Unix(1, 0))
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(console, conn)
		once.Do(done)
	})
	_, _ = io.Copy(conn, console)
	once.Do(done)
	wg.Wait()
}
