package task

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/shim/images"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/shim/volumes"
	"atoll.dev/atoll/internal/vm"
)

// guest stands for guest init and for the machine around it. Processes end when they are killed.
type guest struct {
	guestv1.GuestService // calls that no test makes

	mu        sync.Mutex
	created   map[string]*guestv1.CreateContainerRequest
	exits     map[string]chan *guestv1.WaitResponse // by container and exec
	images    int
	deleted   []string
	updates   [][]byte
	failNext  error // of CreateContainer
	failStart error
	pids      uint32
	gone      chan struct{}
}

func newGuest() *guest {
	return &guest{
		created: map[string]*guestv1.CreateContainerRequest{}, exits: map[string]chan *guestv1.WaitResponse{},
		gone: make(chan struct{}),
	}
}

func key(container, exec string) string { return container + "/" + exec }

func (g *guest) CreateContainer(_ context.Context, r *guestv1.CreateContainerRequest) (*guestv1.CreateContainerResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failNext != nil {
		return nil, g.failNext
	}
	g.created[r.Id] = r
	g.exits[key(r.Id, "")] = make(chan *guestv1.WaitResponse, 1)
	return &guestv1.CreateContainerResponse{}, nil
}

func (g *guest) CreateExec(_ context.Context, r *guestv1.CreateExecRequest) (*guestv1.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.exits[key(r.ContainerId, r.ExecId)] = make(chan *guestv1.WaitResponse, 1)
	return &guestv1.Empty{}, nil
}

func (g *guest) Start(context.Context, *guestv1.ProcessRequest) (*guestv1.StartResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failStart != nil {
		return nil, g.failStart
	}
	g.pids++
	return &guestv1.StartResponse{Pid: g.pids}, nil
}

func (g *guest) exit(container, exec string, status uint32, oom bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.exits[key(container, exec)] <- &guestv1.WaitResponse{Status: status, OomKilled: oom, ExitedUnixNanos: -1 << 60}
}

func (g *guest) Wait(_ context.Context, r *guestv1.ProcessRequest) (*guestv1.WaitResponse, error) {
	g.mu.Lock()
	ch := g.exits[key(r.ContainerId, r.ExecId)]
	g.mu.Unlock()
	select {
	case resp := <-ch:
		return resp, nil
	case <-g.gone:
		return nil, errdefs.ErrUnavailable
	}
}

func (g *guest) Kill(_ context.Context, r *guestv1.KillRequest) (*guestv1.Empty, error) {
	g.exit(r.ContainerId, r.ExecId, 128+r.Signal, false)
	return &guestv1.Empty{}, nil
}

func (g *guest) Delete(_ context.Context, r *guestv1.ProcessRequest) (*guestv1.WaitResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deleted = append(g.deleted, key(r.ContainerId, r.ExecId))
	return &guestv1.WaitResponse{}, nil
}

func (g *guest) Update(_ context.Context, r *guestv1.UpdateRequest) (*guestv1.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.updates = append(g.updates, r.Resources)
	return &guestv1.Empty{}, nil
}

func (g *guest) Pids(context.Context, *guestv1.ProcessRequest) (*guestv1.PidsResponse, error) {
	return &guestv1.PidsResponse{}, nil
}

func (g *guest) Stats(context.Context, *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	usage := make([]*stats.IOEntry, 1000)
	for i := range usage {
		usage[i] = &stats.IOEntry{Major: uint64(i)}
	}
	m := &stats.Metrics{CPU: &stats.CPUStat{UsageUsec: 42}, Io: &stats.IOStat{Usage: usage}}
	raw, err := proto.Marshal(m)
	return &guestv1.StatsResponse{CgroupMetrics: raw, RootfsUsedBytes: 12345, RootfsUsedInodes: 6}, err
}

func (g *guest) MountImage(context.Context, *guestv1.MountImageRequest) (*guestv1.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.images++
	return &guestv1.Empty{}, nil
}

func (g *guest) UnmountImage(context.Context, *guestv1.UnmountImageRequest) (*guestv1.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.images--
	return &guestv1.Empty{}, nil
}

func (*guest) AttachImage(context.Context, string, *os.File) error      { return nil }
func (*guest) DetachImage(context.Context, string) error                { return nil }
func (*guest) HotAddDisk(context.Context, vm.Disk) (int, error)         { return 0, nil }
func (*guest) RemoveDisk(context.Context, string) error                 { return nil }
func (g *guest) OpenIO(string, string, int) (io.ReadWriteCloser, error) { return &quiet{g.gone}, nil }

// quiet is a stream on which nothing comes until the machine ends.
type quiet struct{ gone chan struct{} }

func (q *quiet) Read([]byte) (int, error) {
	<-q.gone
	return 0, io.EOF
}
func (*quiet) Write(p []byte) (int, error) { return len(p), nil }
func (*quiet) Close() error                { return nil }

// journal collects events.
type journal chan proto.Message

func (j journal) Publish(m proto.Message) { j <- m }

// next returns the next event, which must be of the type.
func next[T proto.Message](t *testing.T, j journal) T {
	t.Helper()
	var zero T
	select {
	case m := <-j:
		e, ok := m.(T)
		if !ok {
			t.Fatalf("event %T %v, want %T", m, m, zero)
		}
		return e
	case <-time.After(time.Minute):
		t.Fatalf("no event %T", zero)
		return zero
	}
}

// pod is a service with a pod attached.
type pod struct {
	*Service
	t        *testing.T
	guest    *guest
	events   journal
	image    string
	grown    []Resources
	scores   []int
	kept     int // calls of Sustain
	shutdown int
	ready    func(context.Context) error
}

func newPod(t *testing.T) *pod {
	t.Helper()
	p := &pod{t: t, ready: func(context.Context) error { return nil }, guest: newGuest(), events: make(journal, 100), image: filepath.Join(t.TempDir(), "a.erofs")}
	if err := os.WriteFile(p.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p.Service = New(Config{
		Events: p.events, Steps: timing.New(), SandboxID: func() string { return "sandbox" },
		Shutdown: func() { p.shutdown++ },
	})
	p.Attach(&Pod{
		Guest: p.guest, Streams: p.guest, PID: 4711,
		Images: images.New(p.guest, p.guest), Volumes: volumes.New(p.guest, nil, volumes.Roots{}),
		Ready:   func(ctx context.Context) error { return p.ready(ctx) },
		Protect: func(score int) { p.scores = append(p.scores, score) },
		Sustain: func() { p.kept++ },
		Resized: func() {},
		Grow: func(_ context.Context, want Resources) error {
			p.grown = append(p.grown, want)
			if want.Memory > 1<<40 {
				return errors.New("more than there is")
			}
			return nil
		},
	})
	return p
}

// request makes a bundle.
func (p *pod) request(id string, edit func(*specs.Spec)) *api.CreateTaskRequest {
	p.t.Helper()
	s := &specs.Spec{
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"/bin/x"}},
		Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}}},
	}
	if edit != nil {
		edit(s)
	}
	data, err := json.Marshal(s)
	if err != nil {
		p.t.Fatal(err)
	}
	dir := p.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	if err := unix.Mkfifo(out, 0o600); err != nil {
		p.t.Fatal(err)
	}
	return &api.CreateTaskRequest{
		ID: id, Bundle: dir, Stdout: out,
		Rootfs: []*types.Mount{{Type: "bind", Source: filepath.Join(dir, "meta"), Options: []string{"ro", handover.ImageOption + p.image}}},
	}
}

func (p *pod) create(id string, edit func(*specs.Spec)) *api.CreateTaskResponse {
	p.t.Helper()
	resp, err := p.Create(p.t.Context(), p.request(id, edit))
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := p.container(id)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := c.wait(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	return resp
}

// refused creates a container that the guest or the micro-VM refuses: its start says so, and nothing of it
// is left when it is deleted.
func (p *pod) refused(id, want string, edit func(*specs.Spec)) {
	p.t.Helper()
	if _, err := p.Create(p.t.Context(), p.request(id, edit)); err != nil {
		p.t.Fatal(err)
	}
	next[*apievents.TaskCreate](p.t, p.events)
	_, err := p.Start(p.t.Context(), &api.StartRequest{ID: id})
	if err == nil || !strings.Contains(err.Error(), want) {
		p.t.Errorf("start: %v, want %q", err, want)
	}
	if e := next[*apievents.TaskExit](p.t, p.events); e.ExitStatus != 128 {
		p.t.Errorf("event %v", e)
	}
	if _, err := p.Service.Delete(p.t.Context(), &api.DeleteRequest{ID: id}); err != nil {
		p.t.Error(err)
	}
	next[*apievents.TaskDelete](p.t, p.events)
}

func (p *pod) start(id, exec string) {
	p.t.Helper()
	if _, err := p.Start(p.t.Context(), &api.StartRequest{ID: id, ExecID: exec}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) status(id, exec string) string {
	p.t.Helper()
	resp, err := p.State(p.t.Context(), &api.StateRequest{ID: id, ExecID: exec})
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.Status.String()
}
