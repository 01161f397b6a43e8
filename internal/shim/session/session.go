// Package session is the shim's end of the connection to a guest: one yamux session over the virtual
// machine's control port that carries the ttrpc calls, the stdio of processes, and forwarded
// connections.
//
// It adds no meaning to any of them. internal/shim/daemon opens one per virtual machine; task, sandbox
// and volumes call through it. The guest is hostile: calls have deadlines from their callers, streams
// are bounded by yamux's windows, and streams that the guest opens towards the host are never
// accepted. When the machine ends everything here fails and Done is closed.
package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
)

// ErrGone is wrapped by errors of calls to a guest that has ended.
var ErrGone = errors.New("the micro-VM has ended")

// dialTimeout bounds how long the guest may take to connect to a port of the pod.
const dialTimeout = 90 * time.Second

// Session is the connection to one guest. Its methods may be called from several goroutines.
type Session struct {
	guestv1.GuestService

	mux *yamux.Session
	rpc *ttrpc.Client
}

// Open starts a session with a guest that was released from the barrier. conn belongs to the session.
func Open(conn net.Conn) (*Session, error) {
	mux, err := channel.Attach(conn)
	if err != nil {
		return nil, fmt.Errorf("opening guest session: %w", err)
	}
	st, err := channel.Open(mux, channel.Header{Kind: channel.KindRPC})
	if err != nil {
		_ = mux.Close()
		return nil, fmt.Errorf("opening guest session: %w", err)
	}
	s := &Session{mux: mux, rpc: ttrpc.NewClient(st, ttrpc.WithUnaryClientInterceptor(translate))}
	s.GuestService = guestv1.NewGuestClient(s.rpc)
	return s, nil
}

// translate makes native errors of what the guest answers: the shim's callers, in the end containerd,
// tell errors apart by errdefs.
func translate(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	err := invoke(ctx, req, resp)
	if err == nil && resp.Status != nil && resp.Status.Code != int32(codes.OK) {
		return errgrpc.ToNative(status.ErrorProto(resp.Status))
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed), errors.Is(err, yamux.ErrSessionShutdown), errors.Is(err, yamux.ErrStreamClosed):
		return fmt.Errorf("%w: %w", ErrGone, errdefs.ErrUnavailable)
	case ctx.Err() != nil:
		return fmt.Errorf("guest did not answer %s: %w", req.Method, ctx.Err())
	}
	return err
}

// OpenIO opens a standard stream of a process; exec is "" for a container's first process.
func (s *Session) OpenIO(container, exec string, fd int) (io.ReadWriteCloser, error) {
	return channel.Open(s.mux, channel.Header{Kind: channel.KindIO, Container: container, Exec: exec, FD: fd})
}

// Dial connects to a TCP port of the pod.
func (s *Session) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	st, err := channel.Open(s.mux, channel.Header{Kind: channel.KindDial, Port: port})
	if err != nil {
		return nil, fmt.Errorf("dialing port %d in the pod: %w", port, err)
	}
	_ = st.SetReadDeadline(time.Now().Add(dialTimeout))
	stop := context.AfterFunc(ctx, func() { _ = st.SetReadDeadline(time.Unix(1, 0)) })
	answer, err := channel.ReadLine(st, channel.MaxHeader)
	if err == nil && answer != "ok" {
		err = fmt.Errorf("%q", answer)
	}
	if !stop() {
		err = errors.Join(err, ctx.Err())
	}
	if err != nil {
		_ = st.Close()
		return nil, fmt.Errorf("dialing port %d in the pod: %w", port, err)
	}
	_ = st.SetReadDeadline(time.Time{})
	return &forwarded{Stream: st}, nil
}

// forwarded is a connection into the pod. A stream has no reset: what still comes after Close is
// dropped, so that the sender does not block.
type forwarded struct {
	*yamux.Stream
}

// CloseWrite passes on the end of one direction.
func (f *forwarded) CloseWrite() error { return f.Stream.Close() }

// Close ends both directions.
func (f *forwarded) Close() error {
	err := f.Stream.Close()
	go func() { _, _ = io.Copy(io.Discard, f.Stream) }()
	return err
}

// Done is closed when the session has ended, as it does with the machine.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Close ends the session.
func (s *Session) Close() error {
	return errors.Join(s.rpc.Close(), s.mux.Close())
}
