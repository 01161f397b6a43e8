package machine

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/dhcp"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/machine/config"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware"
	"atoll.dev/atoll/internal/vm/swtpm"
)

// world is everything around a machine: host, agent, network, containerd, and the hardware itself.
type world struct {
	t   *testing.T
	dir string

	mu       sync.Mutex // guards the fields below
	calls    []string
	fail     map[string]error // by call
	config   hardware.Config
	size     hardware.Size
	exit     vm.Exit
	oom      bool
	memory   string // file for saved memory
	shutdown int

	done  chan struct{}
	once  sync.Once
	exits chan proto.Message
	line  net.Conn // the guest's end of the serial line
	ours  net.Conn
	agent *guestagent.Client
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), fail: map[string]error{}, done: make(chan struct{}), exits: make(chan proto.Message, 100)}
	w.line, w.ours = net.Pipe()
	mine, theirs := net.Pipe()
	_ = theirs.Close() // nothing answers
	w.agent = guestagent.New(mine)
	w.memory = filepath.Join(w.dir, "memory")
	if err := os.WriteFile(w.memory, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "image"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) call(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, name)
	return w.fail[name]
}

func (w *world) failing(name string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[name] = err
}

// called tells how often a call was made.
func (w *world) called(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, c := range w.calls {
		if c == name {
			n++
		}
	}
	return n
}

// end ends QEMU.
func (w *world) end(reason vm.ExitReason) {
	w.once.Do(func() {
		w.mu.Lock()
		w.exit = vm.Exit{Reason: reason}
		w.mu.Unlock()
		_ = w.line.Close()
		close(w.done)
	})
}

// The engine.

func (w *world) Start(_ context.Context, cfg hardware.Config) (Hardware, error) {
	if err := w.call("start"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.config, w.size = cfg, hardware.Size{CPUs: cfg.Machine.CPU.Count, Memory: cfg.Machine.Memory.Bytes}
	w.mu.Unlock()
	return w, nil
}

func (w *world) StartTPM(context.Context, swtpm.Config) (TPM, error) {
	return nil, errors.New("no TPM")
}

// The hardware.

func (w *world) Kill() error { w.end(vm.ExitKilled); return nil }

func (w *world) PowerOff(context.Context) error {
	err := w.call("poweroff")
	w.end(vm.ExitKilled)
	return err
}
func (w *world) Pause(context.Context) error     { return w.call("pause") }
func (w *world) Resume(context.Context) error    { return w.call("resume") }
func (w *world) Reset(context.Context) error     { return w.call("reset") }
func (w *world) PowerDown(context.Context) error { return w.call("powerdown") }
func (w *world) AddDisk(_ context.Context, d machinev1.Disk, _ vm.Volume) error {
	return w.call("add " + d.Name)
}
func (w *world) RemoveDisk(_ context.Context, name string) error { return w.call("remove " + name) }
func (w *world) ChangeDisc(_ context.Context, name string, _ vm.Volume) error {
	return w.call("disc " + name)
}
func (w *world) EjectDisc(_ context.Context, name string) error { return w.call("eject " + name) }
func (w *world) SnapshotDisk(_ context.Context, name string, _, _ vm.Layer) error {
	return w.call("snapshot " + name)
}

func (w *world) ResizeDisk(_ context.Context, name string, _ int64) error {
	return w.call("resize " + name)
}

func (w *world) LimitDisk(_ context.Context, name string, _ vm.Limits) error {
	return w.call("limit " + name)
}

func (w *world) Size() hardware.Size {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.size
}

func (w *world) AddMemory(_ context.Context, n int64) (int64, error) {
	err := w.call("memory")
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.size.Memory += n
	}
	return n, err
}

func (w *world) SetCPUs(_ context.Context, n int) (int, error) {
	err := w.call("cpus")
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.size.CPUs = n
	}
	return n, err
}

func (w *world) AddNIC(_ context.Context, n machinev1.NIC, _ *os.File) error {
	return w.call("add " + n.Name)
}
func (w *world) RemoveNIC(_ context.Context, name string) error { return w.call("remove " + name) }
func (w *world) VNC(context.Context) (net.Conn, error)          { return nil, errors.New("no display") }
func (w *world) Serial() io.ReadWriteCloser                     { return w.ours }
func (w *world) Console() []byte                                { return nil }
func (w *world) Agent() *guestagent.Client                      { return w.agent }
func (w *world) PID() int                                       { return os.Getpid() }
func (w *world) Done() <-chan struct{}                          { return w.done }
func (w *world) Close() error                                   { return nil }
func (w *world) Accelerator() vm.Accel                          { return vm.TCG }
func (w *world) Stalled() bool                                  { return false }

func (w *world) Exit() vm.Exit {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.exit
}

func (w *world) SaveMemory(_ context.Context, f *os.File, o hardware.SaveOptions) (hardware.Saved, error) {
	if err := w.call("save"); err != nil {
		return hardware.Saved{}, err
	}
	if o.AtPause != nil {
		if err := o.AtPause(); err != nil {
			return hardware.Saved{}, err
		}
	}
	n, err := f.WriteString("memory")
	return hardware.Saved{Bytes: int64(n), Pause: time.Millisecond}, err
}

// The agent.

func (w *world) Open(_ context.Context, r attach.OpenRequest) (attach.Opened, error) {
	if err := w.call("open " + r.Volume); err != nil {
		return attach.Opened{}, err
	}
	if r.Machine.Memory {
		return attach.Opened{File: w.memory}, nil
	}
	return attach.Opened{Disk: handover.Disk{Size: 1 << 30, Layers: []handover.Layer{
		{ID: "l", File: filepath.Join(w.dir, "image"), Format: handover.FormatRaw},
	}}}, nil
}

// agentOf is the world as an Agent: it has a Close of another kind.
type agentOf struct{ *world }

func (a agentOf) Close(_ context.Context, r attach.OpenRequest) error {
	return a.call("close " + r.Volume)
}

func (a agentOf) Snapshots(_ context.Context, r attach.SnapshotsRequest) error {
	for volume := range r.Snapshots {
		if err := a.call("snapshots " + volume); err != nil {
			return err
		}
	}
	return nil
}

// The network.

func (w *world) NewTap(poolNetns, name string) (network.Tap, error) {
	f, err := os.Open(os.DevNull)
	return network.Tap{File: f, PoolNetns: poolNetns, Name: name}, err
}

func (w *world) JoinTap(string, network.Tap) (network.Guest, error) {
	mac, err := net.ParseMAC("52:54:00:00:00:01")
	return network.Guest{
		MAC: mac, MTU: 1450, Addresses: []netip.Prefix{netip.MustParsePrefix("10.244.0.7/32")},
		Routes: []network.Route{{Destination: netip.MustParsePrefix("10.244.0.1/32")}, {Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.244.0.1")}},
	}, err
}

func (w *world) NewBridgeTap(_, bridge string, _ int) (*os.File, error) {
	if err := w.call("bridge " + bridge); err != nil {
		return nil, err
	}
	return os.Open(os.DevNull)
}

func (w *world) ServeDHCP(ctx context.Context, _ string, c dhcp.Config) error {
	_ = w.call("dhcp " + c.Address.String() + " " + c.Hostname)
	<-ctx.Done()
	return nil
}

func (w *world) ServePortForward(ctx context.Context, _, address string) error {
	_ = w.call("forward " + address)
	<-ctx.Done()
	return nil
}

// The host.

func (w *world) Join(string, string, ...int) error { return w.call("join") }
func (w *world) Sustain(int64) error               { return nil }
func (w *world) Leave() error                      { return w.call("leave") }
func (w *world) SetOOMScore(int, int) error        { return nil }

func (w *world) OOMKilled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.oom
}

func (w *world) Publish(event proto.Message) { w.exits <- event }

// sample is a machine with a disk and the pod's interface.
func sample() *machinev1.Machine {
	return &machinev1.Machine{
		Name: "db", Namespace: "team", UID: "u1", Revision: 1, BIOSUUID: "4c4c4544-0051-3010-8052-b4c04f4e3132",
		CPU: machinev1.CPU{Count: 1, Max: 4}, Memory: machinev1.Memory{Bytes: 64 << 20, Max: 1 << 30},
		Firmware: machinev1.Firmware{Type: machinev1.BIOS}, Hostname: "db", Stop: machinev1.Stop{Mode: machinev1.Hard},
		Disks: []machinev1.Disk{{Name: "boot", Volume: "s/boot", Bus: machinev1.SCSI, UUID: "00000000-0000-4000-8000-000000000001"}},
		NICs:  []machinev1.NIC{{Name: "eth0", Model: "virtio-net-pci", MAC: "52:54:00:00:00:01", Pod: true}},
	}
}

// machinePod is a sandbox and its container.
type machinePod struct {
	*world
	s      *Service
	tasks  Tasks
	stdout string
	last   string // file for the termination message
}

// sandbox makes a service and its sandbox.
func (w *world) sandbox(m *machinev1.Machine) (*machinePod, error) {
	w.t.Helper()
	s := New(Config{
		Host:   config.Config{RunDir: w.dir, DataDir: filepath.Join(w.dir, "machines"), Binary: "/b", Kubelet: w.dir},
		Member: "m1", UID: 770000, Socket: filepath.Join(w.dir, "s"), Engine: w, Network: w, Agent: agentOf{w}, Cgroups: w, Events: w,
		Accel: func(context.Context) vm.Accel { return vm.TCG }, Started: func(int) {},
		Shutdown: func() { w.shutdown++ },
	})
	w.t.Cleanup(func() { _ = s.Stop(context.Background()) })
	text, err := json.Marshal(m)
	if err != nil {
		w.t.Fatal(err)
	}
	pod, err := proto.Marshal(&cripb.PodSandboxConfig{
		Metadata:    &cripb.PodSandboxMetadata{Name: "db", Namespace: "team", Uid: "p1"},
		Annotations: map[string]string{machinev1.Annotation: string(text)},
		DnsConfig:   &cripb.DNSConfig{Servers: []string{"10.96.0.10"}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = s.CreateSandbox(w.t.Context(), &sandboxapi.CreateSandboxRequest{
		SandboxID: "box", NetnsPath: "/netns", Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: pod},
	})
	if err == nil {
		_, err = s.StartSandbox(w.t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "box"})
	}
	return &machinePod{world: w, s: s, tasks: Tasks{s}, stdout: filepath.Join(w.dir, "out"), last: filepath.Join(w.dir, "last")}, err
}

// start makes and starts the container.
func (w *world) start(m *machinev1.Machine) *machinePod {
	w.t.Helper()
	p, err := w.sandbox(m)
	if err != nil {
		w.t.Fatal(err)
	}
	oci, err := json.Marshal(specs.Spec{Mounts: []specs.Mount{{Destination: terminationLog, Source: p.last, Type: "bind", Options: []string{"rbind"}}}})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "config.json"), oci, 0o600); err != nil {
		w.t.Fatal(err)
	}
	if err := unix.Mkfifo(p.stdout, 0o600); err != nil {
		w.t.Fatal(err)
	}
	if _, err := p.tasks.Create(w.t.Context(), &api.CreateTaskRequest{ID: "vm", Bundle: w.dir, Stdout: p.stdout, Terminal: true}); err != nil {
		w.t.Fatal(err)
	}
	if _, err := p.tasks.Start(w.t.Context(), &api.StartRequest{ID: "vm"}); err != nil {
		w.t.Fatal(err)
	}
	return p
}

// until waits until the state is as wanted.
func (p *machinePod) until(what string, ok func(machinev1.State) bool) machinev1.State {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	st := p.s.board.Get()
	for !ok(st) {
		if ctx.Err() != nil {
			p.t.Fatalf("waiting until %s: %+v; calls: %s", what, st, strings.Join(p.calls, ", "))
		}
		st, _ = p.s.State(ctx, machinev1.StateRequest{Seen: st.Revision, WaitMillis: 1000})
	}
	return st
}

func (p *machinePod) running() {
	p.until("it runs", func(st machinev1.State) bool { return st.Phase == machinev1.Running && len(st.Disks) > 0 })
}

// wait waits for the exit of the container.
func (p *machinePod) wait() uint32 {
	p.t.Helper()
	r, err := p.tasks.Wait(p.t.Context(), &api.WaitRequest{ID: "vm"})
	if err != nil {
		p.t.Fatal(err)
	}
	return r.ExitStatus
}

func (p *machinePod) apply(m machinev1.Machine, change func(*machinev1.Machine)) machinev1.Machine {
	p.t.Helper()
	m.Revision++
	m.Disks, m.NICs, m.Operations = slices.Clone(m.Disks), slices.Clone(m.NICs), slices.Clone(m.Operations)
	change(&m)
	if _, err := p.s.Apply(p.t.Context(), m); err != nil {
		p.t.Fatal(err)
	}
	return m
}
