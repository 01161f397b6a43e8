package detach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/linux/textpages"
)

// Delays between two starts of a supervisor that keeps ending.
const (
	minDelay = 500 * time.Millisecond
	maxDelay = 30 * time.Second
)

// Keep is the life of the keeper process: whenever no supervisor holds the lock
// of the data directory, it starts one, until the keep file is gone.
func (d *Detacher) Keep(ctx context.Context) error {
	held, err := d.tree.AcquireKeeper()
	if errors.Is(err, datadir.ErrLocked) {
		return nil // there is a keeper
	}
	if err != nil {
		return err
	}
	defer func() { _ = held.Release() }()
	var delay time.Duration
	for d.kept() && ctx.Err() == nil {
		pid, err := named(ctx, d.tree.Holder)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return fmt.Errorf("looking for the supervisor: %w", err)
		}
		if pid == 0 {
			if !pause(ctx, delay) || !d.kept() {
				break
			}
			d.logger.Info("starting the supervisor", "delay", delay)
			if err := d.spawn("up", "up", "--background"); err != nil {
				d.logger.Error("starting the supervisor failed", "error", err)
			}
			delay = min(max(2*delay, minDelay), maxDelay)
			pause(ctx, 2*time.Second) // until it holds the lock
			continue
		}
		began := time.Now()
		// The keeper only waits from here on. Failing to give the pages of the
		// program back is harmless.
		_ = textpages.Release()
		d.waitFor(ctx, pid)
		d.logger.Warn("the supervisor ended", "pid", pid)
		if time.Since(began) > maxDelay {
			delay = 0
		}
	}
	return nil
}

// namedWithin is how long who has taken a lock may take to write its pid.
const namedWithin = time.Minute

// named looks who holds a lock, again while the one that has taken it has not written its pid yet.
func named(ctx context.Context, holder func() (int, error)) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, namedWithin)
	defer cancel()
	for {
		pid, err := holder()
		if !errors.Is(err, datadir.ErrUnnamed) || !pause(ctx, 20*time.Millisecond) {
			return pid, err
		}
	}
}

// pause waits and returns false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Watch is run by a kept supervisor: it starts the keeper again when that ends.
func (d *Detacher) Watch(ctx context.Context) error {
	for ctx.Err() == nil {
		pid, err := named(ctx, d.tree.KeeperHolder)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return fmt.Errorf("looking for the keeper: %w", err)
		}
		switch {
		case pid != 0:
			d.waitFor(ctx, pid)
		case d.kept():
			d.logger.Warn("starting the keeper again")
			if err := d.ensureKeeper(); err != nil {
				return err
			}
		}
		pause(ctx, minDelay)
	}
	return nil
}

// kept tells whether a supervisor of this data directory is to be kept running.
func (d *Detacher) kept() bool {
	_, err := os.Stat(d.tree.Keep())
	return err == nil
}

// waitFor returns when the process has ended or ctx ends.
func (d *Detacher) waitFor(ctx context.Context, pid int) {
	info, err := process.Read(pid)
	if err != nil {
		return // it has ended
	}
	if err := info.Wait(ctx); err != nil && ctx.Err() == nil {
		d.logger.Warn("waiting for a process failed", "pid", pid, "error", err)
	}
}
