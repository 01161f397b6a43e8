package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/disk"
	"atoll.dev/atoll/internal/guest/program"
	"atoll.dev/atoll/internal/guest/volume"
	"atoll.dev/atoll/internal/linux/filesystem"
)

var errInvalid = errors.New("invalid")

const dialTimeout = 10 * time.Second

// pod is what needs the scratch disk; it appears with Warm or Setup.
type pod struct {
	volumes    *volume.Store
	containers *container.Runtime
}

// server serves the protocol.
type server struct {
	log  *slog.Logger
	m    *machine
	stop context.CancelCauseFunc // ends the whole of init
	ctx  context.Context         // of init; calls have their own
	rpc  *ttrpc.Server
	pod  atomic.Pointer[pod]

	rehearsing atomic.Bool // between Warm and Warm with "done"
	told       toldTime
	formats    formats

	mu      sync.Mutex
	isSetUp bool
}

func newServer(ctx context.Context, log *slog.Logger, m *machine, stop context.CancelCauseFunc) (*server, error) {
	rpc, err := ttrpc.NewServer()
	if err != nil {
		return nil, fmt.Errorf("making ttrpc server: %w", err)
	}
	s := &server{log: log, m: m, stop: stop, ctx: ctx, rpc: rpc}
	guestv1.RegisterGuestService(rpc, s)
	return s, nil
}

// serveStreams accepts streams until the session ends.
func (s *server) serveStreams(session *yamux.Session) error {
	done := make(chan struct{})
	defer close(done)
	for {
		st, err := session.AcceptStream()
		if err != nil {
			return err
		}
		go s.stream(st, done)
	}
}

// stream reads the header and hands the stream on, or closes it. done is closed with the session.
func (s *server) stream(st *yamux.Stream, done <-chan struct{}) {
	h, err := channel.ReadHeader(st)
	if err != nil {
		s.log.Warn("refusing stream", "err", err)
		_ = st.Close()
		return
	}
	switch h.Kind {
	case channel.KindRPC:
		if err = s.rpc.Serve(s.ctx, channel.NewListener(st, done)); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	case channel.KindIO:
		if p := s.pod.Load(); p != nil {
			err = p.containers.Attach(h.Container, h.Exec, h.FD, st)
		} else {
			err = errNotReady
		}
	case channel.KindDial:
		err = dial(s.ctx, st, h.Port)
	}
	if err != nil {
		s.log.Warn("stream ended", "kind", h.Kind, "container", h.Container, "exec", h.Exec, "err", err)
		_ = st.Close()
	}
}

var errNotReady = fmt.Errorf("pod is not set up: %w", container.ErrState)

// dial connects a stream to a port of the pod's loopback.
func dial(ctx context.Context, st *yamux.Stream, port uint16) error {
	d := net.Dialer{Timeout: dialTimeout}
	p := strconv.Itoa(int(port))
	conn, err := d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", p))
	if err != nil {
		var err6 error
		if conn, err6 = d.DialContext(ctx, "tcp6", net.JoinHostPort("::1", p)); err6 != nil {
			_, werr := io.WriteString(st, "err "+err.Error()+"\n")
			return errors.Join(werr, st.Close())
		}
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return errors.Join(conn.Close(), st.Close())
	}
	defer tcp.Close()
	if _, err := io.WriteString(st, "ok\n"); err != nil {
		return err
	}
	up := make(chan struct{})
	go func() {
		defer close(up)
		_, _ = io.Copy(onlyWriter{tcp}, st) // hide ReadFrom: splice cannot read a stream
		_ = tcp.CloseWrite()
	}()
	_, _ = io.Copy(st, onlyReader{tcp})
	_ = st.Close()
	<-up
	return nil
}

type onlyWriter struct{ io.Writer }

type onlyReader struct{ io.Reader }

// status translates errors for the wire.
func status(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, container.ErrNotFound), errors.Is(err, volume.ErrNotFound), errors.Is(err, disk.ErrNotFound):
		code = codes.NotFound
	case errors.Is(err, container.ErrExists), errors.Is(err, volume.ErrExists), errors.Is(err, disk.ErrExists):
		code = codes.AlreadyExists
	case errors.Is(err, container.ErrState):
		code = codes.FailedPrecondition
	case errors.Is(err, container.ErrInvalid), errors.Is(err, volume.ErrInvalid), errors.Is(err, errInvalid), errors.Is(err, filesystem.ErrInvalid), errors.Is(err, filesystem.ErrForeign),
		errors.Is(err, program.ErrInvalid), errors.Is(err, program.ErrUnsupported):
		code = codes.InvalidArgument
	}
	return grpcstatus.Error(code, err.Error())
}

// checkID refuses ids that cannot be file names.
func checkID(ids ...string) error {
	for _, id := range ids {
		if !channel.ValidID(id) {
			return status(fmt.Errorf("id %q: %w", id, errInvalid))
		}
	}
	return nil
}

// thePod returns the pod, once it is set up.
func (s *server) thePod() (*pod, error) {
	p := s.pod.Load()
	if p == nil {
		return nil, status(errNotReady)
	}
	return p, nil
}

// theContainer returns a container of the pod.
func (s *server) theContainer(id string) (*container.Container, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	c, err := p.containers.Get(id)
	return c, status(err)
}
