// Package daemon is the process that owns one micro-VM and serves it to containerd as a shim.
//
// The pool spawns daemons ahead of time ("atoll-pod shim-daemon <member>"); each clones a micro-VM,
// warms it up, stops it and waits. An assignment over the socket shared with the pool makes it a pod's
// shim. From then on it depends on nobody: it outlives the pool and restarts of containerd, and ends
// when containerd shuts the sandbox down, or at SIGTERM. One that was never assigned ends with the pool.
// QEMU is its child and dies with it.
//
// The daemon of a virtual machine (RuntimeClass atoll-vm) is of another kind: "shim start" starts it when it is
// needed, since there is nothing to be made ahead of time; see runMachine. Apart from that it lives and is found
// like the others.
//
// The package wires the pieces (packages sandbox, task, session, events) and holds no logic of pods.
//
// What can go wrong: the clone does not come up, or ends while it waits. A member without a pod tells the
// pool and ends; one that was assigned early answers containerd's Create with the error.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/events"
	"atoll.dev/atoll/internal/shim/machine/config"
	"atoll.dev/atoll/internal/shim/sandbox"
	"atoll.dev/atoll/internal/shim/task"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/shim/volumes"
)

const (
	// closeTimeout bounds the wait for containerd to close its connections when the daemon ends.
	closeTimeout = 2 * time.Second
	// lastEvents bounds the sending of events that are pending then.
	lastEvents = 2 * time.Second
	// memoryLimit is where the garbage collector begins to work hard; a daemon needs a third of it.
	memoryLimit = 24 << 20
)

// Main runs the daemon. args are those after the role: the member's id, which only names the process.
func Main(args []string) int {
	tune()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	machine := len(args) == 2 && args[1] == config.Role
	if len(args) != 1 && !machine {
		fmt.Fprintln(os.Stderr, "shim-daemon: started by the warm pool and by shims only")
		return 2
	}
	slog.SetDefault(slog.Default().With("member", args[0]))
	var err error
	if machine {
		err = runMachine(context.Background())
	} else {
		var d *daemon
		if d, err = newDaemon(); err == nil {
			err = d.run(context.Background())
		}
	}
	if err != nil {
		slog.Error("shim daemon ended", "error", err)
		return 1
	}
	return 0
}

// tune makes the process small: there are as many as there are pods.
func tune() {
	runtime.GOMAXPROCS(2)
	debug.SetGCPercent(40)
	debug.SetMemoryLimit(memoryLimit)
}

// daemon is one shim.
type daemon struct {
	init    wire.Init
	files   files
	control *net.UnixConn
	ledger  ledger
	steps   *timing.Recorder
	tasks   *task.Service
	sandbox *sandbox.Service
	clone   *clone
	peers   *peers
	quit    chan struct{} // closed when the daemon is to end
	once    sync.Once

	mu     sync.Mutex        // guards the fields below
	events *events.Publisher // nil before the assignment
	report *json.Encoder     // to the pool
}

// newDaemon takes what the pool hands over.
func newDaemon() (*daemon, error) {
	f := os.NewFile(wire.FDControl, "control")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("opening control socket: %w", err)
	}
	d := &daemon{files: inherited(), steps: timing.New(), peers: newPeers(), quit: make(chan struct{})}
	var ok bool
	if d.control, ok = conn.(*net.UnixConn); !ok {
		return nil, errors.New("opening control socket: not a unix socket")
	}
	d.report = json.NewEncoder(d.control)
	return d, nil
}

// run is the life of the daemon.
func (d *daemon) run(ctx context.Context) (err error) {
	orders := json.NewDecoder(d.control)
	if err := orders.Decode(&d.init); err != nil {
		return fmt.Errorf("reading what the pool wants: %w", err)
	}
	d.ledger.reg = registry.New(d.init.RunDir)
	d.ledger.entry = registry.Entry{Member: d.init.Member, PID: os.Getpid(), UID: d.init.UID}
	ctx, cancel := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer cancel()
	listener, err := d.ledger.listen()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.ledger.remove()) }()
	d.wire()
	server, err := d.serve(listener)
	if err != nil {
		return err
	}
	defer d.clone.kill()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { d.prepare(ctx) })
	go d.obey(orders) // ends with the process: it reads for as long as there is a pool
	select {
	case <-ctx.Done():
		slog.Info("ending at a signal")
	case <-d.quit:
	}
	cancel()
	return d.close(server)
}

// wire makes the services.
func (d *daemon) wire() {
	d.clone = newClone(d.init, d.files)
	d.tasks = task.New(task.Config{
		Events: d, Steps: d.steps, Shutdown: d.shutdown,
		SandboxID: func() string { return d.sandbox.ID() },
	})
	d.sandbox = sandbox.New(sandbox.Config{
		VM: d.clone.wait, Network: hostNetwork{}, Tasks: d.tasks, Cgroups: &cgroups{ledger: &d.ledger}, Steps: d.steps,
		Roots: volumes.Roots{Kubelet: d.init.Kubelet, Containerd: d.init.Containerd},
		Disks: disks.Config{
			Kubelet: d.init.Kubelet, RunDir: d.init.RunDir, Scratch: d.init.ScratchDir,
			Socket: d.ledger.file("volumes.sock"),
		},
		Shutdown: d.shutdown,
	})
}

// serve answers containerd.
func (d *daemon) serve(l net.Listener) (*ttrpc.Server, error) {
	return serve(l, d.peers, d.sandbox, d.tasks, d.shutdown)
}

// serve answers containerd at a listener; failed is called when that ends by itself.
func serve(l net.Listener, p *peers, s sandboxapi.TTRPCSandboxService, t taskapi.TTRPCTaskService, failed func()) (*ttrpc.Server, error) {
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(p))
	if err != nil {
		return nil, fmt.Errorf("making ttrpc server: %w", err)
	}
	sandboxapi.RegisterTTRPCSandboxService(server, s)
	taskapi.RegisterTTRPCTaskService(server, t)
	go func() {
		if err := server.Serve(context.Background(), l); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
			slog.Error("serving containerd", "error", err)
			failed()
		}
	}()
	return server, nil
}

// prepare makes the clone and says so to the pool.
func (d *daemon) prepare(ctx context.Context) {
	err := d.clone.prepare(ctx)
	if err == nil {
		d.ledger.setQEMU(d.clone.pid())
		d.tell(wire.Report{Ready: true})
		debug.FreeOSMemory()
		d.attend(ctx)
		return
	}
	d.tell(wire.Report{Error: err.Error(), Template: isTemplate(err)})
	if !d.assigned() {
		slog.Error("preparing a micro-VM", "error", err)
		d.shutdown()
	}
}

// attend notices when the micro-VM ends while it waits. From the assignment on that is the sandbox's to do.
func (d *daemon) attend(ctx context.Context) {
	m := d.clone.vm.Machine
	select {
	case <-m.Done():
	case <-ctx.Done():
		return
	}
	if d.assigned() {
		return
	}
	exit := m.Exit().String()
	slog.Error("micro-VM ended before a pod took it", "exit", exit)
	d.tell(wire.Report{Error: "a waiting micro-VM ended: " + exit})
	d.shutdown()
}

// obey does what the pool says. When the pool ends, a member that no pod has taken does, too.
func (d *daemon) obey(orders *json.Decoder) {
	for {
		var o wire.Order
		err := orders.Decode(&o)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				slog.Warn("reading orders of the pool", "error", err)
			}
			if !d.assigned() {
				d.shutdown()
			}
			return
		}
		if o.Aside != nil {
			d.clone.aside(*o.Aside)
		}
		if o.Assign == nil {
			continue
		}
		if err := d.assign(*o.Assign); err != nil {
			d.tell(wire.Report{Error: err.Error()})
			d.shutdown()
			return
		}
	}
}

// assign makes the member a pod's shim.
func (d *daemon) assign(a wire.Assignment) error {
	d.clone.hurry()
	d.steps.Reset(a.Since)
	phase := d.steps.Begin("shim")
	if e := d.ledger.get(); e.Sandbox != "" {
		return fmt.Errorf("member serves sandbox %s already", e.Sandbox)
	}
	d.mu.Lock()
	d.events = events.New(a.TTRPC, a.Namespace)
	publisher := d.events
	d.mu.Unlock()
	if err := d.ledger.change(func(e *registry.Entry) { e.Sandbox = a.Sandbox }); err != nil {
		return err
	}
	level := slog.LevelInfo
	if a.Debug {
		level = slog.LevelDebug
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("sandbox", a.Sandbox))
	go func() { _ = publisher.Run(context.Background()) }() // for as long as the process lives
	d.tell(wire.Report{Assigned: true, Address: "unix://" + d.ledger.socket()})
	phase.Done("assigned")
	return nil
}

// Publish sends an event to containerd.
func (d *daemon) Publish(event proto.Message) {
	d.mu.Lock()
	p := d.events
	d.mu.Unlock()
	if p != nil {
		p.Publish(event)
	}
}

// tell reports to the pool, if there still is one.
func (d *daemon) tell(r wire.Report) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.control.SetWriteDeadline(time.Now().Add(time.Second))
	if err := d.report.Encode(r); err != nil {
		slog.Debug("reporting to the pool", "error", err)
	}
}

// shutdown makes the daemon end once calls that are under way have been answered.
func (d *daemon) shutdown() { d.once.Do(func() { close(d.quit) }) }

func (d *daemon) assigned() bool { return d.ledger.get().Sandbox != "" }

// close ends everything in order: the micro-VM, then the server, then what is to be told.
func (d *daemon) close(server *ttrpc.Server) error {
	var errs []error
	if d.assigned() {
		errs = append(errs, d.sandbox.Stop(context.Background()))
	}
	d.mu.Lock()
	p := d.events
	d.mu.Unlock()
	return errors.Join(append(errs, leave(server, d.peers, p))...)
}

// leave ends the server and sends what containerd has not been told yet.
func leave(server *ttrpc.Server, p *peers, told *events.Publisher) (err error) {
	p.wait(closeTimeout)
	if failed := server.Close(); failed != nil && !errors.Is(failed, net.ErrClosed) {
		err = fmt.Errorf("closing ttrpc server: %w", failed)
	}
	if told != nil {
		ctx, cancel := context.WithTimeout(context.Background(), lastEvents)
		defer cancel()
		told.Flush(ctx)
	}
	return err
}
