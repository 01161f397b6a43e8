package supervise

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// errEnded is the failure of a service that returned without an error although
// nobody asked it to end.
var errEnded = errors.New("ended by itself")

// run is the life of one service: wait, then start it again and again.
func (u *unit) run() {
	defer close(u.done)
	defer u.change(func(st *Status) { st.State, st.PID = Stopped, 0 })
	if !u.waitForOthers() {
		return
	}
	delay := u.sup.cfg.MinDelay
	for restarts := 0; ; restarts++ {
		began := time.Now()
		u.change(func(st *Status) {
			st.State, st.Started, st.ReadyIn, st.Restarts = Starting, began, 0, restarts
		})
		err := u.attempt(began)
		if u.ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errEnded
		}
		if time.Since(began) > u.sup.cfg.MaxDelay {
			delay = u.sup.cfg.MinDelay
		}
		u.sup.cfg.Logger.Warn("service ended", "service", u.Name, "error", err, "restartIn", delay)
		u.change(func(st *Status) { st.State, st.PID, st.Error = Backoff, 0, err.Error() })
		if !sleep(u.ctx, delay) {
			return
		}
		delay = min(2*delay, u.sup.cfg.MaxDelay)
	}
}

// waitForOthers waits for the services named in After. It returns false when
// the service is to stop instead.
func (u *unit) waitForOthers() bool {
	for _, name := range u.After {
		if err := u.sup.WaitReady(u.ctx, name); err != nil {
			return false
		}
	}
	return u.ctx.Err() == nil
}

// attempt runs the service once and returns why it ended.
func (u *unit) attempt(began time.Time) error {
	ctx, cancel := context.WithCancel(u.ctx)
	defer cancel()
	ended := make(chan error, 1)
	if u.Process != nil {
		child, err := u.Process.start(u.sup.spawner)
		if err != nil {
			return err
		}
		u.change(func(st *Status) { st.PID = child.pid() })
		go func() { ended <- child.wait(ctx) }()
	} else {
		go func() { ended <- u.Run(ctx) }()
	}
	if err := u.becomeReady(ctx, ended, began); err != nil {
		u.change(func(st *Status) { st.Error = err.Error() })
		cancel()
		return errors.Join(err, <-ended)
	}
	select {
	case err := <-ended:
		return err
	case <-u.ctx.Done():
		u.change(func(st *Status) { st.State = Stopping })
		return <-ended
	}
}

// becomeReady asks Ready until it agrees. When the service ends or is to stop
// first, it returns nil and leaves the rest to the caller.
func (u *unit) becomeReady(ctx context.Context, ended chan error, began time.Time) error {
	deadline := time.NewTimer(u.ReadyTimeout)
	defer deadline.Stop()
	for {
		err := u.probe(ctx)
		if err == nil {
			break
		}
		u.change(func(st *Status) { st.Error = err.Error() })
		select {
		case end := <-ended:
			ended <- end
			return nil
		case <-u.ctx.Done():
			u.change(func(st *Status) { st.State = Stopping })
			return nil
		case <-deadline.C:
			return fmt.Errorf("not ready after %s: %w", u.ReadyTimeout, err)
		case <-time.After(readyPoll):
		}
	}
	took := time.Since(began)
	u.sup.cfg.Logger.Info("service ready", "service", u.Name, "took", took.Round(time.Millisecond))
	u.change(func(st *Status) { st.State, st.ReadyIn, st.Error = Ready, took.Seconds(), "" })
	return nil
}

// probe asks once whether the service is ready.
func (u *unit) probe(ctx context.Context) error {
	if u.Ready == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return u.Ready(ctx)
}

// change edits the status and reports it when the state changed.
func (u *unit) change(edit func(*Status)) {
	var before, after Status
	u.status.Update(func(st Status) Status {
		before = st
		edit(&st)
		if st.State != before.State {
			st.Since = time.Now()
		}
		after = st
		return st
	})
	if after.State != before.State && u.sup.cfg.OnChange != nil {
		u.sup.cfg.OnChange(after)
	}
}

// sleep waits for d and returns false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
