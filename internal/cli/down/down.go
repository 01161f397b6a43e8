// Package down takes a host's Atoll away: the supervisor, the cluster's
// processes, the pods, and everything they left in the kernel.
//
// It is a list of steps, each of which finds what is there and removes it, so
// it works on a healthy host, on one where half is dead, and twice in a row.
// Things are found by exact identity (a path below the data or run directory, a
// name only Atoll uses), never by a loose pattern.
//
// It is called by `atoll down`. What can go wrong: a mount is busy or a process
// cannot be killed; the other steps still run, and the errors say what is left.
package down

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"atoll.dev/atoll/internal/cli/detach"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/cgroup"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/policy"
	"atoll.dev/atoll/internal/storage/csi/export"
	"atoll.dev/atoll/internal/storage/csi/node"
)

// Config is what New needs.
type Config struct {
	Tree datadir.Tree
	// Purge also removes the data directory.
	Purge bool
	// Grace is how long pods may take to end by themselves.
	Grace  time.Duration
	Logger *slog.Logger
	// Progress is called with a line for the user after each step that found
	// something to do.
	Progress func(line string)
}

// Down removes one instance. Make one with New.
type Down struct {
	cfg      Config
	detacher *detach.Detacher
}

// New checks the configuration.
func New(cfg Config) (*Down, error) {
	if cfg.Logger == nil || cfg.Progress == nil {
		return nil, errors.New("down: no logger or no progress function")
	}
	return &Down{cfg: cfg, detacher: detach.New(cfg.Tree, cfg.Logger)}, nil
}

// step is one part of the way down. Its function returns what it did, "" when
// there was nothing to do.
type step struct {
	doing string
	run   func(ctx context.Context) (did string, err error)
}

// steps lists all steps in order. The order matters: nothing that restarts or
// recreates something may outlive it.
func (d *Down) steps() []step {
	steps := []step{
		{"ending the keeping of the supervisor", d.disable},
		{"stopping the agent", d.stopAgent},
		{"stopping pods", d.stopPods},
		{"stopping the services", d.stopServices},
		{"ending what is left of pods", d.endPods},
		{"taking volumes off the host", d.cleanVolumes},
		{"removing cgroups", d.removeCgroups},
		{"unmounting", d.unmount},
		{"cleaning up the network", d.cleanNetwork},
		{"removing the run directory", d.removeRun},
	}
	if d.cfg.Purge {
		steps = append(steps, step{"removing the data directory", d.purge})
	}
	return steps
}

// Run makes all steps, and goes on after one that fails. It refuses a directory
// that is not Atoll's: a wrong --data-dir must not unmount or delete what belongs
// to somebody else.
func (d *Down) Run(ctx context.Context) error {
	root := d.cfg.Tree.Root()
	if _, err := os.Lstat(root); err == nil && !looksLikeOurs(d.cfg.Tree) {
		return fmt.Errorf("%s does not look like an Atoll data directory; nothing was done", root)
	}
	var errs []error
	for _, s := range d.steps() {
		did, err := s.run(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.doing, err))
			d.cfg.Progress(fmt.Sprintf("failed: %s: %v", s.doing, err))
			continue
		}
		if did != "" {
			d.cfg.Progress(did)
		}
	}
	return errors.Join(errs...)
}

func (d *Down) disable(ctx context.Context) (string, error) {
	return "", d.detacher.Disable(ctx)
}

// stopAgent ends the agent first, so that it does not start pods again.
func (d *Down) stopAgent(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := up.NewClient(d.cfg.Tree).StopService(ctx, up.Agent)
	if errors.Is(err, up.ErrNotRunning) {
		return "", nil
	}
	return "agent stopped", err
}

// stopServices ends the supervisor and its children. What restarts it goes
// first.
func (d *Down) stopServices(ctx context.Context) (string, error) {
	if err := d.detacher.Stop(ctx); err != nil {
		return "", err
	}
	ran := true
	if err := up.NewClient(d.cfg.Tree).Stop(ctx); errors.Is(err, up.ErrNotRunning) {
		ran = false
	} else if err != nil {
		d.cfg.Logger.Warn("the supervisor did not take the request to stop", "error", err)
	}
	if pid, err := d.cfg.Tree.Holder(); err == nil && pid != 0 {
		if info, err := process.Read(pid); err == nil {
			waitCtx, cancel := context.WithTimeout(ctx, 3*time.Minute)
			_ = info.Wait(waitCtx) // what is left is ended below
			cancel()
		}
	}
	n, err := d.endAll(ctx, 10*time.Second, up.Supervisor, up.Services)
	switch {
	case err != nil:
		return "", err
	case n > 0:
		return fmt.Sprintf("%d processes of services ended", n), nil
	case ran:
		return "services stopped", nil
	}
	return "", nil
}

// endPods ends shims that did not end with their pod. Their QEMUs die with
// them.
func (d *Down) endPods(ctx context.Context) (string, error) {
	n, err := d.endAll(ctx, 2*time.Second, up.Pods)
	if err != nil || n == 0 {
		return "", err
	}
	return fmt.Sprintf("%d processes of pods ended", n), nil
}

// endAll ends the processes of each kind in turn, again until none is found.
func (d *Down) endAll(ctx context.Context, grace time.Duration, kinds ...up.Kind) (int, error) {
	total := 0
	for _, kind := range kinds {
		for range 3 {
			found, err := up.OwnProcesses(d.cfg.Tree, kind)
			if err != nil {
				return total, err
			}
			found = slices.DeleteFunc(found, func(i process.Info) bool { return i.PID == os.Getpid() })
			if len(found) == 0 {
				break
			}
			total += len(found)
			if err := process.End(ctx, grace, found...); err != nil {
				return total, err
			}
		}
	}
	return total, nil
}

// cleanVolumes takes volumes off the host that were mounted there for pods outside of micro-VMs.
func (d *Down) cleanVolumes(context.Context) (string, error) {
	exports := export.New(export.Config{Dir: d.cfg.Tree.Exports()})
	n, err := node.CleanUp(d.cfg.Tree.Kubelet(), exports)
	if err != nil || n == 0 {
		return "", err
	}
	return fmt.Sprintf("%d volumes taken off the host", n), nil
}

// removeCgroups removes the groups the kubelet makes for pods, and the one it
// makes them in if that is only this instance's. Controllers that were enabled for
// that are no longer.
func (d *Down) removeCgroups(context.Context) (string, error) {
	withdraw := func() error { return cgroup.Withdraw(d.cfg.Tree.CgroupRecord()) }
	groups, err := cgroup.Find(podsCgroup(d.cfg.Tree))
	if err != nil || len(groups) == 0 {
		return "", errors.Join(err, withdraw())
	}
	var errs []error
	for _, g := range groups {
		errs = append(errs, cgroup.Remove(g))
	}
	errs = append(errs, withdraw())
	return "cgroups removed", errors.Join(errs...)
}

// podsCgroup is the group below the root that holds nothing but the pods of a
// data directory. Another instance's must not be touched.
func podsCgroup(t datadir.Tree) string {
	if root := t.CgroupRoot(); root != "" {
		return strings.TrimPrefix(root, "/")
	}
	return "kubepods"
}

func (d *Down) unmount(context.Context) (string, error) {
	n, err := unmountBelow(d.cfg.Tree.Root(), d.cfg.Tree.Run())
	if err != nil || n == 0 {
		return "", err
	}
	return fmt.Sprintf("%d mounts removed", n), nil
}

func (d *Down) cleanNetwork(context.Context) (string, error) {
	t := d.cfg.Tree
	return "", network.Cleanup(network.CleanupConfig{
		Network:   cniconf.Network{StateDir: t.CNIState()},
		NetnsDirs: t.NetnsDirs(),
		Tables:    []string{"kube-proxy", policy.TableName(cniconf.Network{}), policy.CutTableName(cniconf.Network{})},
		Logger:    d.cfg.Logger,
	})
}

func (d *Down) removeRun(context.Context) (string, error) {
	return "", removeTree(d.cfg.Tree.Run())
}

// purge removes the data directory. If it is a mount point itself, its content
// goes and it stays.
func (d *Down) purge(ctx context.Context) (string, error) {
	root := d.cfg.Tree.Root()
	if err := d.detacher.Purge(ctx); err != nil {
		return "", err
	}
	if _, err := os.Lstat(root); errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", fmt.Errorf("listing %s: %w", root, err)
	}
	// The settings are what tells a data directory: they go last.
	slices.SortFunc(entries, func(a, b os.DirEntry) int {
		settings := filepath.Base(d.cfg.Tree.Settings())
		switch {
		case a.Name() == settings:
			return 1
		case b.Name() == settings:
			return -1
		}
		return 0
	})
	var errs []error
	for _, e := range entries {
		errs = append(errs, removeTree(filepath.Join(root, e.Name())))
	}
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	if mounted, err := isMountPoint(root); err != nil || mounted {
		return "data directory emptied", err
	}
	return "data directory removed", removeTree(root)
}

// looksLikeOurs tells whether `up` has worked on a directory, or has only just
// begun to, or it is empty.
func looksLikeOurs(t datadir.Tree) bool {
	if _, err := os.Stat(t.Settings()); err == nil {
		return true
	}
	entries, err := os.ReadDir(t.Root())
	return err == nil && !slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		return !slices.Contains(t.Names(), e.Name())
	})
}
