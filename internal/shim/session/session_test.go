package session

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
)

// fake answers the few calls that the tests make.
type fake struct {
	guestv1.GuestService
	hangs chan struct{} // gets a token when a call hangs
}

func (fake) Kill(context.Context, *guestv1.KillRequest) (*guestv1.Empty, error) {
	return nil, status.Error(codes.NotFound, "no such process")
}

func (fake) OnlineResources(context.Context, *guestv1.Empty) (*guestv1.OnlineResourcesResponse, error) {
	return &guestv1.OnlineResourcesResponse{Cpus: 3}, nil
}

func (f fake) Shutdown(ctx context.Context, _ *guestv1.Empty) (*guestv1.Empty, error) {
	f.hangs <- struct{}{}
	<-ctx.Done()
	return nil, ctx.Err()
}

// guest serves the other end of conn.
func guest(t *testing.T, conn net.Conn, f fake) *yamux.Session {
	t.Helper()
	mux, err := channel.Server(conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mux.Close() })
	go func() {
		for {
			st, err := mux.AcceptStream()
			if err != nil {
				return
			}
			go serve(t, st, f)
		}
	}()
	return mux
}

func serve(t *testing.T, st *yamux.Stream, f fake) {
	h, err := channel.ReadHeader(st)
	if err != nil {
		t.Error(err)
		return
	}
	switch {
	case h.Kind == channel.KindRPC:
		srv, err := ttrpc.NewServer()
		if err != nil {
			t.Error(err)
			return
		}
		guestv1.RegisterGuestService(srv, f)
		_ = srv.Serve(context.Background(), channel.NewListener(st, nil))
	case h.Kind == channel.KindDial && h.Port == 80:
		_, _ = io.WriteString(st, "ok\n")
		_, _ = io.Copy(st, st) // echo until the host ends
		_ = st.Close()
	case h.Kind == channel.KindDial:
		_, _ = io.WriteString(st, "err connection refused\n")
	case h.Kind == channel.KindIO:
		_, _ = io.WriteString(st, h.Container+"/"+h.Exec)
		_ = st.Close()
	}
}

func open(t *testing.T) (_ *Session, _ *yamux.Session, hangs <-chan struct{}) {
	t.Helper()
	a, b := net.Pipe()
	f := fake{hangs: make(chan struct{}, 1)}
	mux := guest(t, b, f)
	s, err := Open(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, mux, f.hangs
}

func TestCalls(t *testing.T) {
	s, _, _ := open(t)
	if r, err := s.OnlineResources(t.Context(), &guestv1.Empty{}); err != nil || r.Cpus != 3 {
		t.Errorf("got %v, %v", r, err)
	}
	if _, err := s.Kill(t.Context(), &guestv1.KillRequest{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "no such process") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Shutdown(ctx, &guestv1.Empty{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a guest that does not answer: %v", err)
	}
}

func TestStreams(t *testing.T) {
	s, _, _ := open(t)
	st, err := s.OpenIO("c", "e", 1)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(st); err != nil || string(got) != "c/e" {
		t.Errorf("io: %q, %v", got, err)
	}
	if _, err := s.OpenIO("bad id", "", 1); err == nil {
		t.Error("an invalid id was accepted")
	}
	conn, err := s.Dial(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, "hello")
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
		t.Errorf("dial: %q, %v", got, err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Dial(t.Context(), 81); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("refused port: %v", err)
	}
}

func TestGuestEnds(t *testing.T) {
	s, mux, hangs := open(t)
	failed := make(chan error, 1)
	go func() {
		_, err := s.Shutdown(t.Context(), &guestv1.Empty{})
		failed <- err
	}()
	<-hangs
	_ = mux.Close()
	if err := <-failed; !errors.Is(err, ErrGone) || !errdefs.IsUnavailable(err) {
		t.Errorf("call in flight: %v", err)
	}
	<-s.Done()
	if _, err := s.OnlineResources(t.Context(), &guestv1.Empty{}); !errors.Is(err, ErrGone) {
		t.Errorf("call after the end: %v", err)
	}
	if _, err := s.OpenIO("c", "", 1); err == nil {
		t.Error("stream after the end")
	}
}
