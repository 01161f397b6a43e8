// Package clock makes a guest's wall clock follow the host's.
//
// A guest has the host's time from Setup on and then counts by itself. The follower tells it the time
// again soon after the start, when the host's clock has been set, when the guest has stood still, and
// every ten minutes, since the two drift apart by some 60 ms at most meanwhile. One that does not answer
// is told again soon, then less and less often. It never sets the host's clock. Package sandbox runs one
// per micro-VM; between its calls it waits for one timer and costs nothing.
//
// The way to a guest takes from less than a millisecond to seconds, on a host that is busy. So the time
// is told until it got there quickly, by the host's own measurement; only then the guest is asked to
// use it. A guest that answers late or never has a wrong clock, and nothing else comes of it: what it
// answers is not looked at.
package clock

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	guestv1 "atoll.dev/atoll/api/guest/v1"
)

const (
	// settle is when the guest is told the time first: Setup is not exact, but the containers' start
	// is more urgent.
	settle = 20 * time.Second
	// period is the time from one to the next.
	period = 10 * time.Minute
	// quick is how long telling the time may take for the time to be good. Half of it is the error.
	quick = 5 * time.Millisecond
	// tries is how often the time is told, at most, until that was quick.
	tries = 5
	// pause is the time between tries.
	pause = 100 * time.Millisecond
	// callTimeout bounds each call to the guest.
	callTimeout = 10 * time.Second
)

// Guest is the part of the guest protocol that is about time.
type Guest interface {
	TellTime(context.Context, *guestv1.TellTimeRequest) (*guestv1.Empty, error)
	SetTime(context.Context, *guestv1.SetTimeRequest) (*guestv1.Empty, error)
}

// Timer goes off when it was armed to, or when the host's clock is set; see package wallclock.
type Timer interface {
	Arm(time.Duration) error
	Wait() (stepped bool, err error)
	Close() error
}

// Config is what a Follower works with.
type Config struct {
	Guest Guest
	Timer Timer // belongs to the follower
}

// Follower keeps the clock of one guest.
type Follower struct {
	cfg  Config
	soon atomic.Bool // Soon was called since the timer went off
}

// New makes a follower for a guest that is set up.
func New(cfg Config) *Follower { return &Follower{cfg: cfg} }

// soonAfter is how long Soon lets the guest come to itself.
const soonAfter = 200 * time.Millisecond

// Soon makes the guest be told the time, since its clock has stood still.
func (f *Follower) Soon() {
	f.soon.Store(true)
	_ = f.cfg.Timer.Arm(soonAfter) // fails when the guest has ended
}

// Run follows until the guest has ended or ctx has.
func (f *Follower) Run(ctx context.Context) error {
	timer := f.cfg.Timer
	// Wait knows no context.
	stop := context.AfterFunc(ctx, func() { _ = timer.Close() })
	defer func() {
		if stop() {
			_ = timer.Close()
		}
	}()
	err := f.follow(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (f *Follower) follow(ctx context.Context) error {
	if err := f.cfg.Timer.Arm(jitter(settle)); err != nil {
		return err
	}
	retry := settle
	for {
		stepped, err := f.cfg.Timer.Wait()
		if err != nil {
			return err
		}
		f.soon.Store(false)
		// Armed first: a clock that is set while the guest is told the time goes on to the next round.
		if err := f.arm(period); err != nil {
			return err
		}
		err = f.sync(ctx)
		switch {
		case errdefs.IsUnavailable(err) || ctx.Err() != nil:
			return err
		case err != nil:
			slog.Warn("guest does not follow the host's clock", "hostWasSet", stepped, "error", err)
			if err := f.arm(retry); err != nil { // forgets that the clock was set meanwhile; it is told again anyway
				return err
			}
			retry = min(2*retry, period)
			continue
		case stepped:
			slog.Info("guest was told that the host's clock was set")
		}
		retry = settle
	}
}

// arm sets the timer to go off after about d, or soon if that was asked for.
func (f *Follower) arm(d time.Duration) error {
	if err := f.cfg.Timer.Arm(jitter(d)); err != nil || !f.soon.Load() {
		return err
	}
	return f.cfg.Timer.Arm(soonAfter)
}

// sync makes the guest set its clock by the host's.
func (f *Follower) sync(ctx context.Context) error {
	var took time.Duration
	for try := range tries {
		if try > 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var err error
		if took, err = f.tell(ctx); err != nil {
			return err
		}
		if took <= quick {
			break
		}
	}
	// If none was quick the last must do: the guest leaves its clock alone where it may be right.
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := f.cfg.Guest.SetTime(ctx, &guestv1.SetTimeRequest{RoundTripNanos: took.Nanoseconds()})
	return err
}

// tell tells the time and returns how long that took.
func (f *Follower) tell(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now := time.Now()
	_, err := f.cfg.Guest.TellTime(ctx, &guestv1.TellTimeRequest{UnixNanos: now.UnixNano()})
	return time.Since(now), err
}

// jitter spreads the pods of a host: a quarter of d up or down.
func jitter(d time.Duration) time.Duration { return d - d/4 + rand.N(d/2) }
