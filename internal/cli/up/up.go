// Package up is what `atoll up` does: it prepares the data directory and the
// kernel, starts containerd, the warm pool, the server and the agent as child
// processes, keeps them running, and answers questions about them on a socket.
//
// It contains no part of the cluster itself and stays small, because it must
// be the last to die. When it does die, its children are told to end, pods go
// on, and the next start takes over.
//
// It is called by the command line. What can go wrong: another `up` works on
// the same data directory (datadir.ErrLocked), the binary has no guest files
// (assets.ErrMissing), or a child does not become ready, which shows in its log
// and in Report.
package up

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/assets"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/linux/textpages"
	"atoll.dev/atoll/internal/preflight"
	"atoll.dev/atoll/internal/supervise"
)

// Config is what New needs.
type Config struct {
	Tree     datadir.Tree
	Settings Settings
	Assets   *assets.Set
	Version  string
	Logger   *slog.Logger
	// Progress, when not nil, is called with a line for the user whenever
	// something noteworthy happened.
	Progress func(line string)
	// Keeper, when not nil, runs for as long as the supervisor; it sees to it
	// that somebody restarts the supervisor.
	Keeper func(ctx context.Context) error
}

// Up is the supervisor of one host. Make one with New.
type Up struct {
	cfg      Config
	began    time.Time
	node     supervise.Latest[Node]
	children *supervise.Supervisor
	stop     context.CancelFunc
}

// New checks the configuration.
func New(cfg Config) (*Up, error) {
	if cfg.Logger == nil || cfg.Assets == nil {
		return nil, errors.New("up: no logger or no assets")
	}
	if err := cfg.Settings.Validate(); err != nil {
		return nil, err
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	return &Up{cfg: cfg}, nil
}

// Run works until ctx ends or somebody asks it to stop over the control
// socket, and returns nil then.
func (u *Up) Run(ctx context.Context) error {
	u.began = time.Now()
	debug.SetGCPercent(25) // little happens here; memory is worth more than time
	ctx, u.stop = context.WithCancel(ctx)
	defer u.stop()
	t := u.cfg.Tree
	if err := t.Create(); err != nil {
		return fmt.Errorf("preparing the data directory: %w", err)
	}
	held, err := t.Acquire()
	if err != nil {
		return err
	}
	defer func() { _ = held.Release() }()
	if err := u.prepare(ctx); err != nil {
		return err
	}
	services, err := u.services()
	if err != nil {
		return err
	}
	u.children, err = supervise.New(supervise.Config{
		Services: services, Logger: u.cfg.Logger, OnChange: u.report,
	})
	if err != nil {
		return fmt.Errorf("setting up supervision: %w", err)
	}
	own, err := supervise.New(supervise.Config{Services: u.ownServices(), Logger: u.cfg.Logger})
	if err != nil {
		return fmt.Errorf("setting up supervision: %w", err)
	}
	// Questions are answered until the last child has ended.
	ownCtx, stopOwn := context.WithCancel(context.WithoutCancel(ctx))
	defer stopOwn()
	ownDone := make(chan error, 1)
	go func() { ownDone <- own.Run(ownCtx) }()
	err = u.children.Run(ctx)
	stopOwn()
	return errors.Join(err, <-ownDone)
}

// prepare does what must be done before the first child starts.
func (u *Up) prepare(ctx context.Context) error {
	t := u.cfg.Tree
	if err := u.cfg.Settings.Save(t.Settings()); err != nil {
		return err
	}
	old, err := OwnProcesses(t, Services)
	if err != nil {
		return err
	}
	if len(old) > 0 {
		u.cfg.Logger.Info("ending the services of an earlier run", "count", len(old))
		if err := process.End(ctx, 30*time.Second, old...); err != nil {
			return fmt.Errorf("ending the services of an earlier run: %w", err)
		}
	}
	u.tuneKernel()
	if err := u.extractAssets(); err != nil {
		return err
	}
	return u.writeMachinesConfig()
}

// extractAssets writes the guest files that are not what they should be.
func (u *Up) extractAssets() error {
	t := u.cfg.Tree
	if err := u.cfg.Assets.Extract(assetTargets(t, u.cfg.Settings.Kernel == ""), t.AssetRecord(), u.cfg.Logger); err != nil {
		return fmt.Errorf("writing the guest files: %w", err)
	}
	debug.FreeOSMemory() // decompression has left the most of what this process ever uses
	return nil
}

// assetTargets says where the embedded files go. The kernel is left out where pods run on another.
func assetTargets(t datadir.Tree, kernel bool) []assets.Target {
	targets := []assets.Target{
		{Name: assets.AtollPod, Path: t.AtollPod(), Mode: 0o755, Links: []string{t.ShimAtoll(), t.ShimMachine(), t.ShimRunc(), t.CNIPlugin(), t.CredentialProvider()}},
		{Name: assets.ExecHelper, Path: t.ExecHelper(), Mode: 0o755},
		{Name: assets.PauseImage, Path: t.PauseImage(), Mode: 0o644},
	}
	if kernel {
		targets = append(targets, assets.Target{Name: assets.Kernel, Path: t.Kernel(), Mode: 0o644})
	}
	return targets
}

// tuneKernel loads modules and raises limits. Failures cost density or a
// feature, not the start, so they are warnings.
func (u *Up) tuneKernel() {
	if modprobe, err := preflight.LookPath("modprobe"); err == nil {
		for _, module := range []string{"tun", "bridge", "veth", "br_netfilter", "overlay", "nf_tables", "nf_conntrack", "act_mirred", "vhost_net", "vhost_vsock", "kvm_intel", "kvm_amd"} {
			// A kernel without modules has these built in or not at all;
			// preflight has told what matters.
			_ = exec.Command(modprobe, "-q", module).Run()
		}
	}
	for _, l := range preflight.Limits() {
		raised, err := l.Raise()
		switch {
		case err != nil:
			u.cfg.Logger.Warn("a kernel limit stays low", "error", err)
		case raised:
			u.cfg.Progress(fmt.Sprintf("raised %s to %d (%s)", l.Key, l.Min, l.Use))
		}
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		want := unix.Rlimit{Cur: max(files.Cur, 1<<20), Max: max(files.Max, 1<<20)}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &want); err != nil {
			// Without CAP_SYS_RESOURCE the hard limit is the end.
			_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files.Max, Max: files.Max})
		}
	}
}

// report turns a change of a service's state into a line for the user.
func (u *Up) report(st supervise.Status) {
	switch st.State {
	case supervise.Ready:
		u.cfg.Progress(fmt.Sprintf("%-12s ready in %.1f s", st.Name, st.ReadyIn))
	case supervise.Backoff:
		u.cfg.Progress(fmt.Sprintf("%-12s ended (%s), starting it again; log: %s", st.Name, st.Error, st.LogFile))
	case supervise.Starting:
		u.cfg.Progress(fmt.Sprintf("%-12s starting", st.Name))
	case supervise.Stopped:
		u.cfg.Progress(fmt.Sprintf("%-12s stopped", st.Name))
	}
}

// ownServices are the goroutines of the supervisor itself.
func (u *Up) ownServices() []supervise.Service {
	rotator := supervise.Rotator{
		Dir: u.cfg.Tree.Logs(), MaxBytes: 20 << 20, Keep: 3, Every: 5 * time.Second, Logger: u.cfg.Logger,
	}
	out := []supervise.Service{
		{Name: "control", Run: u.serveControl},
		{Name: "log-rotation", Run: rotator.Run},
		{Name: "node-watch", Run: u.watchNode},
		{Name: "memory", Run: textpages.Run},
	}
	if u.cfg.Keeper != nil {
		out = append(out, supervise.Service{Name: "keeper-watch", Run: u.cfg.Keeper})
	}
	return out
}

// markReady returns the readiness check of a service that makes a file, and
// what removes the file before a start.
func markReady(path string) (ready func(context.Context) error, prepare func() error) {
	ready = func(context.Context) error {
		if _, err := os.Stat(path); err != nil {
			return errors.New("not ready yet")
		}
		return nil
	}
	prepare = func() error {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing the ready mark: %w", err)
		}
		return nil
	}
	return ready, prepare
}
