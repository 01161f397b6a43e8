package clock

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/linux/wallclock"
)

// fakeTimer goes off as armed or when the test says that the clock was set.
type fakeTimer struct {
	armed  <-chan time.Time
	step   chan struct{}
	closed chan struct{}
}

func newTimer() *fakeTimer {
	return &fakeTimer{step: make(chan struct{}), closed: make(chan struct{})}
}

func (f *fakeTimer) Arm(d time.Duration) error {
	f.armed = time.After(d)
	return nil
}

func (f *fakeTimer) Wait() (bool, error) {
	select {
	case <-f.armed:
		return false, nil
	case <-f.step:
		return true, nil
	case <-f.closed:
		return false, os.ErrClosed
	}
}

func (f *fakeTimer) Close() error {
	close(f.closed)
	return nil
}

// fakeGuest takes as long as the test says to answer.
type fakeGuest struct {
	delays []time.Duration // of the next TellTime calls; none left: none
	err    error
	told   []time.Time // when, by the host's clock
	wrong  int         // tellings of another time
	set    []time.Duration
}

func (g *fakeGuest) TellTime(ctx context.Context, r *guestv1.TellTimeRequest) (*guestv1.Empty, error) {
	now := time.Now()
	g.told = append(g.told, now)
	if r.UnixNanos != now.UnixNano() {
		g.wrong++
	}
	if len(g.delays) > 0 {
		d := g.delays[0]
		g.delays = g.delays[1:]
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return &guestv1.Empty{}, g.err
}

func (g *fakeGuest) SetTime(_ context.Context, r *guestv1.SetTimeRequest) (*guestv1.Empty, error) {
	g.set = append(g.set, time.Duration(r.RoundTripNanos))
	return &guestv1.Empty{}, g.err
}

// follow runs a follower in a bubble until do has returned, and returns what Run did.
func follow(t *testing.T, g *fakeGuest, do func(*fakeTimer)) error {
	t.Helper()
	timer := newTimer()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- New(Config{Guest: g, Timer: timer}).Run(ctx) }()
	do(timer)
	synctest.Wait()
	cancel()
	err := <-ended
	<-timer.closed
	if g.wrong > 0 {
		t.Errorf("%d times another time than the host's was told", g.wrong)
	}
	return err
}

// TestPeriod: soon after the start, then about every ten minutes.
func TestPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &fakeGuest{}
		start := time.Now()
		err := follow(t, g, func(*fakeTimer) { time.Sleep(24 * time.Hour) })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("run: %v", err)
		}
		if n := len(g.told); n < 115 || n > 190 || len(g.set) != n {
			t.Fatalf("told %d times, set %d times", n, len(g.set))
		}
		if d := g.told[0].Sub(start); d < settle*3/4 || d > settle*5/4 {
			t.Errorf("first after %v", d)
		}
		for i, at := range g.told[1:] {
			if d := at.Sub(g.told[i]); d < period*3/4 || d > period*5/4 {
				t.Errorf("%v between two", d)
			}
		}
	})
}

// TestStep: at once, and the period begins anew.
func TestStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &fakeGuest{}
		start := time.Now()
		_ = follow(t, g, func(timer *fakeTimer) {
			timer.step <- struct{}{}
			synctest.Wait()
			if len(g.told) != 1 || !g.told[0].Equal(start) || len(g.set) != 1 {
				t.Errorf("told at %v, set %d times", g.told, len(g.set))
			}
			time.Sleep(period / 2)
			if len(g.told) != 1 {
				t.Errorf("told %d times", len(g.told))
			}
		})
	})
}

// TestStepWhileTelling: the second one is not lost.
func TestStepWhileTelling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &fakeGuest{delays: []time.Duration{time.Second}}
		_ = follow(t, g, func(timer *fakeTimer) {
			timer.step <- struct{}{}
			timer.step <- struct{}{} // taken by the next Wait
		})
		if len(g.set) != 2 {
			t.Errorf("set %d times", len(g.set))
		}
	})
}

// TestSlowWay: told again until it was quick, but not for ever.
func TestSlowWay(t *testing.T) {
	const slow, fine = time.Second, 3 * time.Millisecond
	for _, c := range []struct {
		delays []time.Duration
		told   int
		set    time.Duration
	}{
		{[]time.Duration{fine}, 1, fine},
		{[]time.Duration{slow, slow, fine, slow}, 3, fine},
		{[]time.Duration{slow, slow, slow, slow, 2 * slow, fine}, 5, 2 * slow},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := &fakeGuest{delays: c.delays}
			_ = follow(t, g, func(timer *fakeTimer) {
				timer.step <- struct{}{}
				time.Sleep(time.Minute)
			})
			if len(g.told) != c.told || len(g.set) != 1 || g.set[0] != c.set {
				t.Errorf("%v: told %d times, set by %v", c.delays, len(g.told), g.set)
			}
		})
	}
}

// TestGuestDoesNotAnswer: the follower tries again soon, then less and less often, until the guest answers.
func TestGuestDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &fakeGuest{delays: []time.Duration{time.Hour, time.Hour, time.Hour}}
		_ = follow(t, g, func(timer *fakeTimer) {
			timer.step <- struct{}{}
			time.Sleep(callTimeout + time.Second)
			if len(g.told) != 1 || len(g.set) != 0 {
				t.Errorf("told %d times, set %d times", len(g.told), len(g.set))
			}
			timer.step <- struct{}{}
			time.Sleep(period / 2)
		})
		if len(g.told) != 4 || len(g.set) != 1 {
			t.Fatalf("then told %d times, set %d times", len(g.told), len(g.set))
		}
		for i, pause := range []time.Duration{2 * settle, 4 * settle} {
			if d := g.told[i+2].Sub(g.told[i+1]) - callTimeout; d < pause*3/4 || d > pause*5/4 {
				t.Errorf("told again after %v, want about %v", d, pause)
			}
		}
	})
}

// TestGuestEnds: nothing goes on without a guest.
func TestGuestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &fakeGuest{err: errdefs.ErrUnavailable}
		err := follow(t, g, func(timer *fakeTimer) { timer.step <- struct{}{} })
		if !errdefs.IsUnavailable(err) {
			t.Errorf("run: %v", err)
		}
	})
}

// TestSoon: a guest that has stood still is told the time long before the next round, and once.
func TestSoon(t *testing.T) {
	inner, err := wallclock.New()
	if err != nil {
		t.Fatal(err)
	}
	timer := waitTimer{Timer: inner, waits: make(chan struct{}, 10)}
	told := make(chan struct{}, 10)
	f := New(Config{Guest: tellGuest{told: told}, Timer: timer})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	isTold := func() bool { // by looks: a host that stands still takes none
		const pause = 20 * time.Millisecond
		for range settle / 2 / pause {
			select {
			case <-told:
				return true
			default:
				time.Sleep(pause)
			}
		}
		return false
	}
	for _, when := range []string{"before the first round", "between two rounds"} {
		<-timer.waits
		f.Soon()
		if !isTold() {
			t.Fatalf("%s: not told", when)
		}
	}
	<-timer.waits
	select {
	case <-told:
		t.Error("told without need")
	case <-time.After(2 * soonAfter):
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// waitTimer says that Wait is called.
type waitTimer struct {
	Timer
	waits chan struct{}
}

func (w waitTimer) Wait() (bool, error) {
	w.waits <- struct{}{}
	return w.Timer.Wait()
}

// TestSoonDuringRound: Soon is not lost while the follower is busy, and has the guest be told once more at most.
func TestSoonDuringRound(t *testing.T) {
	for when, want := range map[string][]time.Duration{ // tellings since the round began
		"went off": {0}, // the one that comes anyway
		"arming":   {0, soonAfter},
		"telling":  {0, soonAfter},
	} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := &callingGuest{}
				timer := &callingTimer{fakeTimer: newTimer()}
				f := New(Config{Guest: g, Timer: timer})
				soon := sync.OnceFunc(f.Soon)
				ended := make(chan error, 1)
				ctx, cancel := context.WithCancel(t.Context())
				go func() { ended <- f.Run(ctx) }()
				synctest.Wait() // the first round is awaited
				switch when {
				case "went off":
					timer.wentOff = soon
				case "arming":
					timer.arming = soon
				case "telling":
					g.telling = soon
				}
				begin := time.Now()
				timer.step <- struct{}{}
				time.Sleep(10 * soonAfter)
				synctest.Wait()
				var got []time.Duration
				for _, at := range g.told {
					got = append(got, at.Sub(begin))
				}
				if !slices.Equal(got, want) {
					t.Errorf("told after %v, want %v", got, want)
				}
				cancel()
				<-ended
			})
		})
	}
}

// callingTimer calls something when it has gone off and when it is armed for the next round.
type callingTimer struct {
	*fakeTimer
	wentOff, arming func()
}

func (c *callingTimer) Wait() (bool, error) {
	stepped, err := c.fakeTimer.Wait()
	if c.wentOff != nil {
		c.wentOff()
	}
	return stepped, err
}

func (c *callingTimer) Arm(d time.Duration) error {
	if c.arming != nil && d > settle {
		c.arming()
	}
	return c.fakeTimer.Arm(d)
}

// callingGuest calls something when it is told the time.
type callingGuest struct {
	fakeGuest
	telling func()
}

func (c *callingGuest) TellTime(ctx context.Context, r *guestv1.TellTimeRequest) (*guestv1.Empty, error) {
	if c.telling != nil {
		c.telling()
	}
	return c.fakeGuest.TellTime(ctx, r)
}

// tellGuest notes that it was told the time.
type tellGuest struct{ told chan<- struct{} }

func (g tellGuest) TellTime(context.Context, *guestv1.TellTimeRequest) (*guestv1.Empty, error) {
	return &guestv1.Empty{}, nil
}

func (g tellGuest) SetTime(context.Context, *guestv1.SetTimeRequest) (*guestv1.Empty, error) {
	g.told <- struct{}{}
	return &guestv1.Empty{}, nil
}
