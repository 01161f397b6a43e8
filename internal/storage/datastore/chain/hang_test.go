package chain

import (
	"context"
	"errors"
	"io/fs"
	"testing"
	"testing/synctest"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
)

// slow is a place without anything in it, of which some calls take their time.
type slow struct {
	Place
	took chan time.Duration // of the next calls
}

func (p slow) Ready() error {
	select {
	case d := <-p.took:
		time.Sleep(d)
	default:
	}
	return nil
}
func (p slow) Locker() Locker                    { return free{} }
func (p slow) Read(Kind, string) ([]byte, error) { return nil, fs.ErrNotExist }

type free struct{}

func (free) Lock(context.Context, ...string) error { return nil }
func (free) Unlock(string)                         {}
func (free) Release()                              {}

// TestSlowPlace: a caller that gives up while the place is slow is let go, and others are served. Nobody waits for a
// place that does not answer any more, until it does.
func TestSlowPlace(t *testing.T) {
	for name, c := range map[string]struct {
		patience time.Duration // of the first caller
		took     time.Duration // by the first step
		returns  time.Duration // the first call
	}{
		"slow":                    {patience: 5 * time.Second, took: 20 * time.Second, returns: 5 * time.Second},
		"hangs, after its caller": {patience: 5 * time.Second, took: time.Hour, returns: 5 * time.Second},
		"hangs":                   {patience: time.Hour, took: 2 * time.Hour, returns: defaultTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := slow{took: make(chan time.Duration, 1)}
				s, err := New(p, Options{})
				if err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				p.took <- c.took
				ctx, cancel := context.WithTimeout(t.Context(), c.patience)
				defer cancel()
				_, err = s.Volume(ctx, "v")
				if took := time.Since(begun); !errors.Is(err, datastore.ErrUnavailable) || took.Round(time.Second) != c.returns {
					t.Errorf("%v after %s", err, took)
				}
				for _, at := range []time.Duration{10 * time.Second, 19 * time.Second, 30 * time.Second, 3 * time.Hour} {
					time.Sleep(max(0, time.Until(begun.Add(at))))
					at = max(at, c.returns)
					want := datastore.ErrNotFound
					if at >= defaultTimeout && at < c.took {
						want = datastore.ErrUnavailable
					}
					asked := time.Now()
					if _, err := s.Volume(t.Context(), "v"); !errors.Is(err, want) || time.Since(asked) > 0 {
						t.Errorf("after %s: %v, which took %s", at, err, time.Since(asked))
					}
				}
			})
		})
	}
}

// TestSlowSteps: an operation whose caller has gone, and that goes on after a step that took too long, is not in the way
// of others.
func TestSlowSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(slow{}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		err = s.run(t.Context(), func(o *op) error {
			time.Sleep(time.Minute) // one step
			o.away()                // a copy
			time.Sleep(time.Hour)
			return nil
		})
		if _, again := s.Volume(t.Context(), "v"); !errors.Is(err, datastore.ErrUnavailable) || !errors.Is(again, datastore.ErrUnavailable) {
			t.Errorf("%v, then %v", err, again)
		}
		time.Sleep(time.Minute)
		if _, err := s.Volume(t.Context(), "v"); !errors.Is(err, datastore.ErrNotFound) {
			t.Errorf("while it goes on: %v", err)
		}
		time.Sleep(time.Hour)
		if n := s.stuck.Load(); n != 0 {
			t.Errorf("%d are stuck in the end", n)
		}
	})
}
