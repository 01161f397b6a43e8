package events

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// server stands for containerd.
type server struct {
	got  chan *api.ForwardRequest
	last *api.ForwardRequest // that want returned
}

func (s *server) Forward(_ context.Context, r *api.ForwardRequest) (*emptypb.Empty, error) {
	s.got <- r
	return &emptypb.Empty{}, nil
}

// serve runs a containerd at the address until the returned function is called.
func serve(t *testing.T, address string, s *server) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterTTRPCEventsService(srv, s)
	go func() { _ = srv.Serve(context.Background(), l) }()
	return func() { _ = srv.Close() }
}

func TestOrderAcrossRestart(t *testing.T) {
	address := filepath.Join(t.TempDir(), "c.ttrpc")
	p := New("unix://"+address, "k8s.io")
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- p.Run(ctx) }()

	p.Publish(&apievents.TaskCreate{ContainerID: "c"}) // containerd is not there yet
	s := &server{got: make(chan *api.ForwardRequest, 10)}
	stop := serve(t, address, s)
	want(t, s, "/tasks/create")
	p.Publish(&apievents.TaskStart{ContainerID: "c", Pid: 7})
	want(t, s, "/tasks/start")
	stop()
	p.Publish(&apievents.TaskOOM{ContainerID: "c"})
	p.Publish(&apievents.TaskExit{ContainerID: "c", ExitStatus: 137})
	stop = serve(t, address, s)
	defer stop()
	want(t, s, "/tasks/oom")
	exit := want(t, s, "/tasks/exit")
	if v, err := typeurl.UnmarshalAny(exit.Envelope.Event); err != nil || v.(*apievents.TaskExit).ExitStatus != 137 {
		t.Fatalf("decoded %v, %v", v, err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// want returns the next event. One that is the same as the last is passed over: when containerd ends
// before its answer is read, an event is sent again.
func want(t *testing.T, s *server, topic string) *api.ForwardRequest {
	t.Helper()
	select {
	case r := <-s.got:
		if proto.Equal(r, s.last) {
			return want(t, s, topic)
		}
		s.last = r
		if r.Envelope.Topic != topic || r.Envelope.Namespace != "k8s.io" {
			t.Fatalf("got %v, want %s", r.Envelope, topic)
		}
		return r
	case <-time.After(time.Minute):
		t.Fatalf("no event %s", topic)
		return nil
	}
}

func TestTopics(t *testing.T) {
	for _, e := range []proto.Message{
		&apievents.TaskCreate{}, &apievents.TaskStart{}, &apievents.TaskOOM{}, &apievents.TaskExit{},
		&apievents.TaskDelete{}, &apievents.TaskExecAdded{}, &apievents.TaskExecStarted{},
	} {
		got, err := topicOf(e)
		if want := runtime.GetTopic(e); err != nil || got != want {
			t.Errorf("%T: got %q, %v, want %q", e, got, err, want)
		}
	}
	if _, err := topicOf(&emptypb.Empty{}); err == nil {
		t.Error("an unknown event has a topic")
	}
}

func TestOldestAreDropped(t *testing.T) {
	p := New("/nowhere", "ns")
	p.Publish(&emptypb.Empty{})
	for i := range MaxPending + 3 {
		p.Publish(&apievents.TaskStart{Pid: uint32(i)})
	}
	if len(p.pending) != MaxPending || p.dropped != 3 {
		t.Fatalf("%d pending, %d dropped", len(p.pending), p.dropped)
	}
	first := p.next()
	p.sent(first)
	if len(p.pending) != MaxPending-1 {
		t.Fatalf("%d pending", len(p.pending))
	}
}
