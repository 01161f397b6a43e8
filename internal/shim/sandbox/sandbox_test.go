package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/task"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/vm"
)

// world is everything around a sandbox: machine, guest, network, tasks.
type world struct {
	guestv1.GuestService // calls that no test makes

	mu        sync.Mutex
	setup     *guestv1.SetupRequest
	files     map[string]string
	memory    int64
	cpus      uint32
	plugs     int // calls of OnlineResources until plugged memory shows
	attached  *task.Pod
	gone      []time.Time
	ooms      chan string
	events    chan *guestv1.Event
	group     string
	scores    map[int]int // by pid
	left      int
	sustained int
	room      int64 // that was to be sustained
	ports     chan struct{}
	shutdown  chan struct{}

	kill     sync.Once
	done     chan struct{}
	setupErr error
}

func newWorld() *world {
	return &world{
		files: map[string]string{}, scores: map[int]int{}, memory: 256 << 20, cpus: 1, events: make(chan *guestv1.Event, 1), ooms: make(chan string, 8),
		ports: make(chan struct{}), done: make(chan struct{}), shutdown: make(chan struct{}, 1),
	}
}

func (w *world) Setup(_ context.Context, r *guestv1.SetupRequest) (*guestv1.SetupResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.setup = r
	return &guestv1.SetupResponse{}, w.setupErr
}

func (w *world) CreateVolume(context.Context, *guestv1.CreateVolumeRequest) (*guestv1.Empty, error) {
	return &guestv1.Empty{}, nil
}

func (w *world) PutFiles(_ context.Context, r *guestv1.PutFilesRequest) (*guestv1.Empty, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range r.Files {
		w.files[f.Path] = string(f.Data)
	}
	return &guestv1.Empty{}, nil
}

func (w *world) OnlineResources(context.Context, *guestv1.Empty) (*guestv1.OnlineResourcesResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.plugs > 0 {
		w.plugs--
		return nil, errors.New("memory block is not there yet")
	}
	return &guestv1.OnlineResourcesResponse{MemoryBytes: uint64(w.memory - 40<<20), Cpus: w.cpus}, nil
}

func (*world) TellTime(context.Context, *guestv1.TellTimeRequest) (*guestv1.Empty, error) {
	return &guestv1.Empty{}, nil
}

func (*world) SetTime(context.Context, *guestv1.SetTimeRequest) (*guestv1.Empty, error) {
	return &guestv1.Empty{}, nil
}

func (w *world) NextEvent(ctx context.Context, _ *guestv1.Empty) (*guestv1.Event, error) {
	select {
	case e := <-w.events:
		return e, nil
	case <-w.done:
		return nil, errdefs.ErrUnavailable
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (w *world) Stats(context.Context, *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	return &guestv1.StatsResponse{}, nil
}

func (*world) OpenIO(string, string, int) (io.ReadWriteCloser, error) { return nil, errors.New("none") }

func (*world) Dial(context.Context, uint16) (net.Conn, error) { return nil, errors.New("none") }

func (*world) AttachImage(context.Context, string, *os.File) error { return nil }
func (*world) DetachImage(context.Context, string) error           { return nil }
func (*world) HotAddDisk(context.Context, vm.Disk) (int, error)    { return 0, nil }
func (*world) RemoveDisk(context.Context, string) error            { return nil }
func (*world) Resume(context.Context) error                        { return nil }
func (*world) PID() int                                            { return 4711 }
func (w *world) Done() <-chan struct{}                             { return w.done }
func (*world) Exit() vm.Exit                                       { return vm.Exit{Reason: vm.ExitFailed} }

func (*world) Console() []byte { return []byte("Kernel panic\r\n\x1b[31m") }

func (w *world) die() { w.kill.Do(func() { close(w.done) }) }

// machine is the world as a machine, whose Kill is not the guest's.
type machine struct{ *world }

func (m machine) Kill() error {
	m.die()
	return nil
}

func (w *world) AddMemory(_ context.Context, bytes int64) (int64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if bytes > 1<<40 {
		return 0, vm.ErrLimit
	}
	bytes = (bytes + vm.MemoryGranule - 1) / vm.MemoryGranule * vm.MemoryGranule
	w.memory += bytes
	w.plugs = 2
	return bytes, nil
}

func (w *world) SetCPUs(_ context.Context, n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cpus = uint32(n)
	return nil
}

func (w *world) JoinTap(netns string, _ network.Tap) (network.Guest, error) {
	if netns == "/gone" {
		return network.Guest{}, os.ErrNotExist
	}
	return network.Guest{
		MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}, MTU: 1450, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.5/32")},
		Routes: []network.Route{
			{Destination: netip.MustParsePrefix("10.0.0.1/32")},
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.0.0.1")},
		},
	}, nil
}

func (w *world) ServePortForward(ctx context.Context, _ string, _ func(context.Context, uint16) (net.Conn, error)) error {
	<-ctx.Done()
	close(w.ports)
	return nil
}

func (w *world) Attach(p *task.Pod) { w.attached = p }
func (w *world) Gone(at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gone = append(w.gone, at)
}

func (w *world) OOM(id string) { w.ooms <- id }

func (w *world) Join(parent, name string, _ ...int) error {
	w.group = parent + "/" + name
	return nil
}

func (w *world) Sustain(memory int64) error {
	w.sustained, w.room = w.sustained+1, memory
	return nil
}

func (w *world) SetOOMScore(pid, score int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.scores[pid] = score
	return nil
}

func (w *world) Leave() error {
	w.left++
	return nil
}

// service is a sandbox service in its world.
func service(t *testing.T, w *world) *Service {
	t.Helper()
	s := New(Config{
		VM: func(context.Context) (*VM, error) {
			return &VM{Machine: machine{w}, Session: w, Memory: w.memory, CPUs: 1, Scratch: "scratch", Accel: vm.TCG, Warm: true}, nil
		},
		Network: w, Tasks: w, Cgroups: w, Steps: timing.New(), Shutdown: func() { w.shutdown <- struct{}{} },
	})
	t.Cleanup(func() { _ = s.Stop(context.Background()) })
	return s
}

func request(t *testing.T, edit func(*cripb.PodSandboxConfig)) *api.CreateSandboxRequest {
	t.Helper()
	c := &cripb.PodSandboxConfig{
		Hostname:  "web-0",
		DnsConfig: &cripb.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}},
		Linux: &cripb.LinuxPodSandboxConfig{
			CgroupParent:    "/kubepods/pod1",
			Sysctls:         map[string]string{"net.core.somaxconn": "7", "net.ipv4.ip_unprivileged_port_start": "1024"},
			SecurityContext: &cripb.LinuxSandboxSecurityContext{NamespaceOptions: &cripb.NamespaceOption{Pid: cripb.NamespaceMode_CONTAINER}},
		},
	}
	if edit != nil {
		edit(c)
	}
	value, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return &api.CreateSandboxRequest{
		SandboxID: "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", NetnsPath: "/pod",
		Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: value},
	}
}

// start creates and starts a sandbox.
func start(t *testing.T, s *Service, r *api.CreateSandboxRequest) (*api.StartSandboxResponse, error) {
	t.Helper()
	if _, err := s.CreateSandbox(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return s.StartSandbox(t.Context(), &api.StartSandboxRequest{SandboxID: r.SandboxID})
}

func TestLife(t *testing.T) {
	w := newWorld()
	s := service(t, w)
	r := request(t, nil)
	resp, err := start(t, s, r)
	if err != nil || resp.Pid != 4711 {
		t.Fatalf("start: %v, %v", resp, err)
	}
	if w.attached == nil || w.attached.PID != 4711 || len(w.attached.Files) != 3 {
		t.Errorf("pod %+v", w.attached)
	}
	if w.group != "/kubepods/pod1/vm-0123456789ab" {
		t.Errorf("cgroup %q", w.group)
	}
	if w.attached.Sustain(); w.sustained != 2 || w.room != w.memory {
		t.Errorf("limits looked at %d times, for %d bytes of memory", w.sustained, w.room)
	}
	if _, err := w.attached.Volumes.Prepare(t.Context(), "c", nil); err != nil {
		t.Fatal(err)
	}
	if got := w.files["resolv.conf"]; got != "search a b\nnameserver 10.96.0.10\noptions ndots:5\n" {
		t.Errorf("resolv.conf %q", got)
	}
	if w.files["hostname"] != "web-0\n" || !strings.Contains(w.files["hosts"], "localhost") {
		t.Errorf("files %v", w.files)
	}
	checkSetup(t, w.setup)
	status, err := s.SandboxStatus(t.Context(), &api.SandboxStatusRequest{SandboxID: r.SandboxID, Verbose: true})
	if err != nil || status.State != stateReady || status.Pid != 4711 {
		t.Errorf("status %v, %v", status, err)
	}
	var info Info
	if err := json.Unmarshal([]byte(status.Info[InfoKey]), &info); err != nil || info.QEMUPID != 4711 || len(info.Steps) < 3 || !info.Warm {
		t.Errorf("info %+v, %v", info, err)
	}
	w.events <- &guestv1.Event{Kind: guestv1.Event_OOM, ContainerId: "c"}
	if m, err := s.SandboxMetrics(t.Context(), &api.SandboxMetricsRequest{SandboxID: r.SandboxID}); err != nil || m.Metrics.Data == nil {
		t.Errorf("metrics %v, %v", m, err)
	}
	if p, err := s.Platform(t.Context(), nil); err != nil || p.Platform.OS != "linux" {
		t.Errorf("platform %v, %v", p, err)
	}
	select {
	case id := <-w.ooms:
		if id != "c" {
			t.Errorf("out of memory: %q", id)
		}
	case <-time.After(time.Minute):
		t.Error("nobody is told that memory ran out")
	}
	if _, err := s.StopSandbox(t.Context(), &api.StopSandboxRequest{SandboxID: r.SandboxID}); err != nil {
		t.Fatal(err)
	}
	<-w.ports // port-forward has ended with the sandbox
	if wait, err := s.WaitSandbox(t.Context(), &api.WaitSandboxRequest{SandboxID: r.SandboxID}); err != nil || wait.ExitStatus != statusStopped {
		t.Errorf("wait %v, %v", wait, err)
	}
	if len(w.gone) != 1 || w.left != 1 || len(w.ooms) != 0 {
		t.Errorf("gone %v, left %d, %d more ooms", w.gone, w.left, len(w.ooms))
	}
	if _, err := s.ShutdownSandbox(t.Context(), &api.ShutdownSandboxRequest{SandboxID: r.SandboxID}); err != nil {
		t.Error(err)
	}
	<-w.shutdown
}

func checkSetup(t *testing.T, got *guestv1.SetupRequest) {
	t.Helper()
	n := got.GetNetwork()
	if len(got.Entropy) < 64 || got.Hostname != "web-0" || got.MachineId != "0123456789abcdef0123456789abcdef" ||
		got.SharedPid || got.ScratchSerial != "scratch" || time.Since(time.Unix(0, got.UnixNanos)) > time.Minute {
		t.Errorf("setup %v", got)
	}
	if n.Mac != "02:00:00:00:00:09" || n.Mtu != 1450 || n.Addresses[0] != "10.0.0.5/32" || len(n.Routes) != 2 ||
		n.Routes[0].Gateway != "" || n.Routes[1].Gateway != "10.0.0.1" || n.Routes[1].Destination != "0.0.0.0/0" {
		t.Errorf("network %v", n)
	}
	if got.Sysctls["net.core.somaxconn"] != "7" || got.Sysctls["net.ipv4.ip_unprivileged_port_start"] != "1024" ||
		got.Sysctls["net.ipv4.ping_group_range"] != "0 2147483647" {
		t.Errorf("sysctls %v", got.Sysctls)
	}
}

// TestQEMUEnds: the sandbox has ended with 137 although nobody asked.
func TestQEMUEnds(t *testing.T) {
	w := newWorld()
	s := service(t, w)
	r := request(t, nil)
	if _, err := start(t, s, r); err != nil {
		t.Fatal(err)
	}
	w.die()
	wait, err := s.WaitSandbox(t.Context(), &api.WaitSandboxRequest{SandboxID: r.SandboxID})
	if err != nil || wait.ExitStatus != statusKilled || wait.ExitedAt == nil {
		t.Errorf("wait %v, %v", wait, err)
	}
	if len(w.gone) != 1 {
		t.Error("the tasks do not know")
	}
	status, err := s.SandboxStatus(t.Context(), &api.SandboxStatusRequest{SandboxID: r.SandboxID})
	if err != nil || status.State != stateNotReady || status.ExitedAt == nil {
		t.Errorf("status %v, %v", status, err)
	}
	if _, err := s.SandboxMetrics(t.Context(), &api.SandboxMetricsRequest{SandboxID: r.SandboxID}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("metrics: %v", err)
	}
}

// TestStopWhileStarting: a clone that never comes does not keep anybody waiting.
func TestStopWhileStarting(t *testing.T) {
	w := newWorld()
	s := New(Config{
		VM:    func(ctx context.Context) (*VM, error) { <-ctx.Done(); return nil, ctx.Err() },
		Steps: timing.New(), Tasks: w, Cgroups: w,
	})
	r := request(t, nil)
	if _, err := s.CreateSandbox(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if _, err := s.StopSandbox(t.Context(), &api.StopSandboxRequest{SandboxID: r.SandboxID}); err != nil {
		t.Error(err)
	}
	if _, err := s.StartSandbox(t.Context(), &api.StartSandboxRequest{SandboxID: r.SandboxID}); err == nil {
		t.Error("started after it was stopped")
	}
}

func TestRefused(t *testing.T) {
	for name, edit := range map[string]func(*cripb.PodSandboxConfig){
		"hostNetwork": func(c *cripb.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = cripb.NamespaceMode_NODE
		},
		"hostPID": func(c *cripb.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Pid = cripb.NamespaceMode_NODE
		},
		"hostIPC": func(c *cripb.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Ipc = cripb.NamespaceMode_NODE
		},
		"hostUsers": func(c *cripb.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cripb.UserNamespace{Mode: cripb.NamespaceMode_POD}
		},
	} {
		s := service(t, newWorld())
		_, err := s.CreateSandbox(t.Context(), request(t, edit))
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := service(t, newWorld())
	for name, r := range map[string]*api.CreateSandboxRequest{
		"no id": {}, "type": {SandboxID: "x", Options: &anypb.Any{TypeUrl: "other"}},
		"bytes": {SandboxID: "x", Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: []byte{0xff}}},
	} {
		if _, err := s.CreateSandbox(t.Context(), r); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r := request(t, nil)
	if _, err := start(t, s, r); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateSandbox(t.Context(), r); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("twice: %v", err)
	}
	if _, err := s.SandboxStatus(t.Context(), &api.SandboxStatusRequest{SandboxID: "other"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("other id: %v", err)
	}
}

func TestGrow(t *testing.T) {
	w := newWorld()
	s := service(t, w)
	r := request(t, func(c *cripb.PodSandboxConfig) {
		c.Linux.Resources = &cripb.LinuxContainerResources{MemoryLimitInBytes: 300 << 20, CpuQuota: 150000, CpuPeriod: 100000}
	})
	if _, err := start(t, s, r); err != nil {
		t.Fatal(err)
	}
	if w.memory != 384<<20 || w.cpus != 2 {
		t.Errorf("%d MiB, %d CPUs", w.memory>>20, w.cpus)
	}
	// Fits already, then does not, then cannot.
	for _, c := range []struct {
		want   task.Resources
		memory int64
		cpus   uint32
		ok     bool
	}{
		{task.Resources{Memory: 300 << 20, CPUs: 2}, 384 << 20, 2, true},
		{task.Resources{Memory: 1 << 30, CPUs: 2.1}, 1152 << 20, 3, true},
		{task.Resources{Memory: 1 << 42}, 1152 << 20, 3, false},
		{task.Resources{Memory: 1 << 63}, 1152 << 20, 3, false},
		{task.Resources{}, 1152 << 20, 3, true},
	} {
		err := w.attached.Grow(t.Context(), c.want)
		if (err == nil) != c.ok || w.memory != c.memory || w.cpus != c.cpus {
			t.Errorf("%+v: %v, %d MiB, %d CPUs", c.want, err, w.memory>>20, w.cpus)
		}
	}
}

func TestSharedPIDAndDefaults(t *testing.T) {
	w := newWorld()
	s := service(t, w)
	r := request(t, func(c *cripb.PodSandboxConfig) {
		*c = cripb.PodSandboxConfig{}
	})
	r.NetnsPath = ""
	if _, err := start(t, s, r); err != nil {
		t.Fatal(err)
	}
	if err := w.attached.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	if !w.setup.SharedPid || w.setup.Network != nil || w.setup.Hostname != host || w.group != "" {
		t.Errorf("setup %v, cgroup %q", w.setup, w.group)
	}
}

func TestMachineID(t *testing.T) {
	for id, want := range map[string]string{
		"abc": "00000000000000000000000000000abc", "xyz-12": "00000000000000000000000000000012",
		strings.Repeat("f", 64): strings.Repeat("f", 32),
	} {
		if got := machineID(id); got != want {
			t.Errorf("%s: %s", id, got)
		}
	}
}
