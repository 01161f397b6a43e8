package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/shim/events"
	"atoll.dev/atoll/internal/shim/machine"
	"atoll.dev/atoll/internal/shim/machine/config"
	"atoll.dev/atoll/internal/shim/machine/hostside"
	"atoll.dev/atoll/internal/vm"
)

const (
	// accelTimeout bounds how long to wait for the pool to find out how guest code is run.
	accelTimeout = 30 * time.Second
	accelPoll    = 250 * time.Millisecond
)

// runMachine is the life of the daemon of a virtual machine.
func runMachine(ctx context.Context) (err error) {
	control, order, err := readOrder()
	if err != nil {
		return err
	}
	answer := func(s config.Started) {
		_ = json.NewEncoder(control).Encode(s) // whoever has asked is told by the end of the connection as well
		_ = control.Close()
	}
	defer func() { answer(config.Started{Error: fmt.Sprint(err)}) }()
	logTo(order)
	l := &ledger{
		reg:   registry.New(order.Config.RunDir),
		entry: registry.Entry{Member: order.Member, PID: os.Getpid(), UID: order.UID, Sandbox: order.Sandbox},
	}
	ctx, cancel := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer cancel()
	if err := l.reg.Create(); err != nil {
		return err
	}
	listener, err := l.listen()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.remove()) }()
	publisher := events.New(order.TTRPC, order.Namespace)
	go func() { _ = publisher.Run(context.Background()) }() // for as long as the process lives
	var once sync.Once
	quit, allowed := make(chan struct{}), newPeers()
	shutdown := func() { once.Do(func() { close(quit) }) }
	service := machine.New(machine.Config{
		Host: order.Config, Member: order.Member, UID: order.UID, Socket: l.file("volumes.sock"),
		Engine: hostside.QEMU{}, Network: hostside.Network{}, Agent: hostside.Agent{RunDir: order.Config.RunDir},
		Cgroups: &cgroups{ledger: l}, Events: publisher, Accel: accelerator(order.Config),
		Started: l.setQEMU, Shutdown: shutdown,
	})
	server, err := serve(listener, allowed, service, machine.Tasks{Service: service}, shutdown)
	if err != nil {
		return err
	}
	answer(config.Started{Address: "unix://" + l.socket()})
	select {
	case <-ctx.Done():
		slog.Info("ending at a signal")
	case <-quit:
	}
	return errors.Join(service.Stop(context.Background()), leave(server, allowed, publisher))
}

// readOrder reads what the daemon is started for.
func readOrder() (net.Conn, config.Order, error) {
	f := os.NewFile(config.FDControl, "control")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, config.Order{}, fmt.Errorf("opening control socket: %w", err)
	}
	var o config.Order
	if err := json.NewDecoder(conn).Decode(&o); err != nil {
		return nil, config.Order{}, errors.Join(fmt.Errorf("reading what to do: %w", err), conn.Close())
	}
	return conn, o, nil
}

// logTo sends the log to the FIFO that containerd reads into its own, also after it has restarted. What does not fit
// while it is away is lost, and nobody waits.
func logTo(o config.Order) {
	level := slog.LevelInfo
	if o.Debug {
		level = slog.LevelDebug
	}
	f, err := os.OpenFile(filepath.Join(o.Bundle, "log"), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err == nil {
		// What the runtime of Go says when it dies goes there, too. The file is not given to the poller, which would
		// wait for room.
		err = unix.Dup2(int(f.Fd()), unix.Stderr)
		_ = unix.SetNonblock(unix.Stderr, true)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(stderr{}, &slog.HandlerOptions{Level: level})).With("sandbox", o.Sandbox))
	if err != nil {
		slog.Warn("opening the log", "error", err)
	}
}

// stderr writes without waiting.
type stderr struct{}

func (stderr) Write(p []byte) (int, error) {
	_, _ = unix.Write(unix.Stderr, p)
	return len(p), nil
}

// accelerator is how guest code is run: as configured, or as the pool has found out.
func accelerator(cfg config.Config) func(context.Context) vm.Accel {
	return func(ctx context.Context) vm.Accel {
		if cfg.Accelerator == string(vm.KVM) || cfg.Accelerator == string(vm.TCG) {
			return vm.Accel(cfg.Accelerator)
		}
		ctx, cancel := context.WithTimeout(ctx, accelTimeout)
		defer cancel()
		for {
			st, err := wire.GetStatus(ctx, filepath.Join(cfg.RunDir, "pool.sock"))
			if err == nil && st.Accelerator != "" {
				return vm.Accel(st.Accelerator)
			}
			select {
			case <-time.After(accelPoll):
			case <-ctx.Done():
				slog.Warn("the pool does not say how guest code is run; it is emulated", "error", err)
				return vm.TCG
			}
		}
	}
}
