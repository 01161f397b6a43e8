package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/rehearsal"
)

const (
	// maxRounds bounds the rehearsals before the template is saved.
	maxRounds = 16
	// settleTime is how long the kernel gets to free what is left of them.
	settleTime = 500 * time.Millisecond
)

// Warm implements the protocol.
func (s *server) Warm(ctx context.Context, req *guestv1.WarmRequest) (*guestv1.Empty, error) {
	if req.GetDone() {
		return &guestv1.Empty{}, status(s.endWarm())
	}
	return &guestv1.Empty{}, status(s.beginWarm(ctx, req))
}

// beginWarm begins a rehearsal.
func (s *server) beginWarm(ctx context.Context, req *guestv1.WarmRequest) error {
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
	if s.pod.Load() == nil {
		p, err := s.prepareScratch(ctx, req.GetScratchSerial())
		if err != nil {
			return err
		}
		s.pod.Store(p)
		return p.containers.FillShells()
	}
	return nil
}

// endWarm clears away what the rehearsal left.
func (s *server) endWarm() error {
	if !s.rehearsing.Load() {
		return fmt.Errorf("no rehearsal: %w", container.ErrState)
	}
	if err := s.pod.Load().volumes.Remove(rehearsal.ID); err != nil {
		return err
	}
	s.rehearsing.Store(false)
	return nil
}

// rehearse plays pod starts to this process before the template is saved, as often as the host asks for on
// the kernel's command line. A clone then has its scratch disk mounted and everything made that is made once.
func (s *server) rehearse(ctx context.Context) error {
	value := os.Getenv(channel.RehearseEnv)
	if value == "" {
		return nil
	}
	rounds, err := strconv.Atoi(value)
	if err != nil || rounds < 0 || rounds > maxRounds {
		return fmt.Errorf("%s=%s: %w", channel.RehearseEnv, value, errInvalid)
	}
	for range rounds {
		if err := s.rehearseOnce(ctx); err != nil {
			return err
		}
	}
	if p := s.pod.Load(); p != nil {
		if err := p.containers.FillShells(); err != nil {
			return err
		}
	}
	// What is dirty now would be written by every clone, and what the kernel has put off would be done by it.
	unix.Sync()
	select {
	case <-time.After(settleTime):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// rehearseOnce is one round over a session with itself.
func (s *server) rehearseOnce(ctx context.Context) error {
	host, guest := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		if _, err := channel.ReadLine(guest, len(channel.Go)); err != nil {
			return
		}
		if session, err := channel.Server(guest); err == nil {
			_ = s.serveStreams(session) // until the other end closes it
		}
	}()
	session, err := channel.Client(host)
	if err != nil {
		return err
	}
	err = s.play(ctx, session)
	_ = session.Close()
	<-served
	return err
}

// play plays the host.
func (s *server) play(ctx context.Context, session *yamux.Session) error {
	st, err := channel.Open(session, channel.Header{Kind: channel.KindRPC})
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(st)
	defer client.Close()
	_, err = os.Stat("/sys/class/net/eth0")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return rehearsal.Run(ctx, rehearsal.Config{
		Guest: &self{GuestService: guestv1.NewGuestClient(client), session: session},
		Image: channel.RehearseImage, Scratch: channel.RehearseScratch, Network: err == nil, Full: true,
	})
}

// self is this process as a guest.
type self struct {
	guestv1.GuestService

	session *yamux.Session
}

func (s *self) OpenIO(container, exec string, fd int) (io.ReadWriteCloser, error) {
	return channel.Open(s.session, channel.Header{Kind: channel.KindIO, Container: container, Exec: exec, FD: fd})
}
