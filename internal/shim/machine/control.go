package machine

import (
	"context"
	"errors"
	"log/slog"
	"net"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
)

// serve begins to answer the agent, at a socket that it finds by a record.
func (s *Service) serve() error {
	l, err := attach.Listen(s.cfg.Socket)
	if err != nil {
		return err
	}
	record := attach.Record{Volume: attach.Machine(s.uid()), Pod: s.uid(), Socket: s.cfg.Socket}
	if err := s.records.Put(record); err != nil {
		return errors.Join(err, l.Close())
	}
	methods := map[string]attach.Handler{
		attach.MethodStats:     attach.Handle(s.volumeStats),
		attach.MethodStatus:    attach.Handle(s.volumeStatus),
		attach.MethodSnapshot:  attach.Handle(s.snapshotVolume),
		attach.MethodResize:    attach.Handle(s.resizeVolume),
		attach.MethodGrow:      attach.Handle(s.growVolume),
		attach.MethodLimit:     attach.Handle(s.limitVolume),
		machinev1.MethodApply:  attach.Handle(s.Apply),
		machinev1.MethodState:  attach.Handle(s.State),
		machinev1.MethodStream: attach.Stream(s.stream),
	}
	s.running.Go(func() {
		if err := attach.Serve(s.background, l, methods); err != nil && s.background.Err() == nil {
			slog.Error("answering the agent", "sandbox", s.ID(), "error", err)
		}
		if err := s.records.Remove(record.Volume, record.Pod); err != nil {
			slog.Warn("forgetting virtual machine", "error", err)
		}
	})
	return nil
}

// State returns the state of the machine once it is another than the caller knows.
func (s *Service) State(ctx context.Context, r machinev1.StateRequest) (machinev1.State, error) {
	return s.board.Wait(ctx, r), nil
}

// stream opens a console for the agent.
func (s *Service) stream(ctx context.Context, r machinev1.StreamRequest) (func(net.Conn), error) {
	s.mu.Lock()
	l := s.life
	s.mu.Unlock()
	if l == nil || l.hardware() == nil || l.ctx.Err() != nil {
		return nil, errors.New("the virtual machine is not running")
	}
	console, err := l.open2(ctx, l.hardware(), r.Kind)
	if err != nil {
		return nil, err
	}
	return func(conn net.Conn) {
		stop := context.AfterFunc(l.ctx, func() { _ = console.Close() })
		defer stop()
		join(conn, console)
	}, nil
}
