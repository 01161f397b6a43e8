// Package freeze has the file systems of a guest stand still while its disks are kept, and lets them go on.
//
// The guest agent does it. One that is frozen and is not told to thaw stands still for ever: all that writes hangs in it.
// So a thaw without an answer is tried again in the background until there is one or the guest has begun anew or ended, and until
// then nobody freezes: an old thaw would undo that. The shim of virtual machines calls it. What can go wrong: the agent
// does not answer (guestagent.ErrNoAgent), or refuses; the guest is still frozen for somebody else (ErrFrozen).
package freeze

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/guest"
	"atoll.dev/atoll/internal/vm/guestagent"
)

const (
	// oneDisk bounds how long file systems may take to freeze for a snapshot of one disk, which does without.
	oneDisk = 10 * time.Second
	// thawTimeout bounds for how long a caller waits for a thaw. It goes on after that.
	thawTimeout = 10 * time.Second
	// flushTimeout bounds how long a guest may take to write everything out, and then to go on.
	flushTimeout = 2 * time.Minute
	// firstRetry is the pause before a thaw is tried again; it doubles up to lastRetry.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// ErrFrozen is in the chain when others have had the guest frozen for too long.
var ErrFrozen = errors.New("the file systems of the guest are still frozen from before")

// Config is what a Guest works with.
type Config struct {
	Agent *guestagent.Client
	// Gone is closed when the machine has ended.
	Gone <-chan struct{}
	// Go runs something in the background.
	Go  func(func())
	Log *slog.Logger
}

// Guest is a guest with file systems. Make one with New.
type Guest struct {
	Config
	// turn is held from freezing until they are thawed.
	turn chan struct{}
	// reset has a token when the guest has begun anew since it was frozen.
	reset chan struct{}
}

// New is the guest of a machine that runs.
func New(cfg Config) *Guest {
	return &Guest{Config: cfg, turn: make(chan struct{}, 1), reset: make(chan struct{}, 1)}
}

// Reset says that the guest has begun anew: nothing in it is frozen any more. It does not wait. Of a machine that does
// not run yet (nil) there is nothing to know.
func (g *Guest) Reset() {
	if g == nil {
		return
	}
	select {
	case g.reset <- struct{}{}:
	default:
	}
}

// Freeze waits until nobody else has the guest frozen, and has it write everything out and hold still. Thaw must be
// called, also after an error: some file systems may be frozen.
func (g *Guest) Freeze(ctx context.Context, within time.Duration) (thaw func(), err error) {
	if err := g.take(ctx); err != nil {
		return func() {}, err
	}
	asked, err := g.freeze(ctx, within)
	if !asked {
		<-g.turn
		return func() {}, err
	}
	return func() { _ = g.thaw(thawTimeout) }, err
}

// TryFreeze is Freeze for a disk that is kept all the same if others have the guest frozen, or it does not freeze: who
// waited would keep the disk from an operation that has frozen them all.
func (g *Guest) TryFreeze(ctx context.Context) (thaw func()) {
	select {
	case g.turn <- struct{}{}:
	default:
		return func() {}
	}
	g.forget()
	asked, err := g.freeze(ctx, oneDisk)
	if err != nil {
		g.Log.Warn("freezing the file systems of a guest for a snapshot", "error", err)
	}
	if !asked {
		<-g.turn
		return func() {}
	}
	return func() { _ = g.thaw(thawTimeout) }
}

// Flush has a guest whose agent answers write everything to its disks, before its memory is saved: they are whole then
// whatever comes of the memory. Mode Hard does not ask, and TrySoft takes no for an answer. A guest that is left frozen is
// an error in each mode.
func (g *Guest) Flush(ctx context.Context, mode machinev1.StopMode) error {
	if mode != machinev1.Soft && mode != machinev1.TrySoft {
		return nil
	}
	if err := g.take(ctx); err != nil {
		return err
	}
	asked, err := g.freeze(ctx, flushTimeout)
	if !asked {
		<-g.turn
	} else if frozen := g.thaw(flushTimeout); frozen != nil {
		return fmt.Errorf("thawing the file systems of the guest: %w", errors.Join(frozen, err))
	}
	if err != nil && mode == machinev1.Soft {
		return fmt.Errorf("asking the guest to write out its file systems: %w; suspendMode TrySoft or Hard suspends it all the same", err)
	}
	return nil
}

// Restored thaws a guest that goes on from a memory which was saved while it was frozen.
func (g *Guest) Restored(ctx context.Context) {
	if g.take(ctx) == nil {
		_ = g.thaw(thawTimeout)
	}
}

// take waits until nobody else has the guest frozen.
func (g *Guest) take(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, guest.Busy)
	defer cancel()
	select {
	case g.turn <- struct{}{}:
		g.forget()
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrFrozen, ctx.Err())
	}
}

// forget is for whoever has the turn, before anything is frozen.
func (g *Guest) forget() {
	select {
	case <-g.reset:
	default:
	}
}

// freeze is not asked of an agent that does not answer: nothing is frozen then.
func (g *Guest) freeze(ctx context.Context, within time.Duration) (asked bool, err error) {
	if err := guest.Ping(ctx, g.Agent); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	_, err = g.Agent.Freeze(ctx)
	return true, err
}

// thaw lets the guest write again, whatever else has happened. After an error that goes on in the background,
// until there is an answer or the guest has begun anew or ended.
func (g *Guest) thaw(within time.Duration) error {
	err := g.tryThaw(within)
	if err == nil {
		<-g.turn
		return nil
	}
	g.Go(func() {
		defer func() { <-g.turn }()
		for wait, err := firstRetry, err; err != nil; wait = min(2*wait, lastRetry) {
			select {
			case <-g.Gone:
				return
			case <-g.reset:
				return
			case <-time.After(wait):
			}
			g.Log.Warn("thawing the file systems of a guest, which is tried again", "error", err)
			err = g.tryThaw(guest.Busy)
		}
	})
	return err
}

// tryThaw returns nil when the guest says that nothing is frozen.
func (g *Guest) tryThaw(within time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	_, err := g.Agent.Thaw(ctx)
	var refused *guestagent.Error
	if !errors.As(err, &refused) {
		return err
	}
	// Perhaps it can neither freeze nor thaw, or say how it is.
	frozen, unknown := g.Agent.Frozen(ctx)
	if frozen || unknown != nil && !errors.As(unknown, &refused) {
		return err
	}
	return nil
}
