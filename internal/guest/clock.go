package guest

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/container"
)

const (
	// slewLimit is how far off the clock may be to be set right little by little: the kernel
	// corrects half a millisecond each second, so this takes a good three minutes.
	slewLimit = 100 * time.Millisecond
	// maxRoundTrip is more than any call takes.
	maxRoundTrip = time.Hour
)

// toldTime is the host's time as it came.
type toldTime struct {
	mu   sync.Mutex // guards the fields below
	host time.Time
	at   time.Time // of this machine's clocks; only the monotonic one matters
}

// TellTime implements the protocol.
func (s *server) TellTime(_ context.Context, req *guestv1.TellTimeRequest) (*guestv1.Empty, error) {
	at := time.Now()
	if req.GetUnixNanos() <= 0 {
		return nil, status(fmt.Errorf("time %d: %w", req.GetUnixNanos(), errInvalid))
	}
	s.told.mu.Lock()
	defer s.told.mu.Unlock()
	s.told.host, s.told.at = time.Unix(0, req.GetUnixNanos()), at
	return &guestv1.Empty{}, nil
}

// SetTime implements the protocol.
func (s *server) SetTime(_ context.Context, req *guestv1.SetTimeRequest) (*guestv1.Empty, error) {
	roundTrip := time.Duration(req.GetRoundTripNanos())
	if roundTrip < 0 || roundTrip > maxRoundTrip {
		return nil, status(fmt.Errorf("round trip of %v: %w", roundTrip, errInvalid))
	}
	s.told.mu.Lock()
	defer s.told.mu.Unlock()
	if s.told.host.IsZero() {
		return nil, status(fmt.Errorf("no time was told: %w", container.ErrState))
	}
	now := time.Now()
	// The request was under way for something between nothing and the whole round trip.
	host := s.told.host.Add(roundTrip/2 + now.Sub(s.told.at))
	offset := time.Duration(host.UnixNano() - now.UnixNano()) // wall clocks, not monotonic ones
	switch correct(offset, roundTrip/2) {
	case stepClock:
		s.log.Info("setting clock", "offset", offset)
		return &guestv1.Empty{}, status(setClock(host.Add(time.Since(now)).UnixNano()))
	case pushClock:
		return &guestv1.Empty{}, status(slewClock(offset))
	case leaveClock:
	}
	return &guestv1.Empty{}, status(slewClock(0)) // ends what may be left of the last correction
}

// correction is what is done about a clock that is off.
type correction int

const (
	leaveClock correction = iota
	pushClock             // little by little
	stepClock             // at once
)

// correct decides about a clock that is off by offset, give or take err: a step needs certainty, since
// programs may see time run backwards.
func correct(offset, err time.Duration) correction {
	switch off := offset.Abs(); {
	case off-err > slewLimit:
		return stepClock
	case off <= err:
		return leaveClock
	default:
		return pushClock
	}
}

// setClock sets the wall clock.
func setClock(nanos int64) error {
	if nanos <= 0 {
		return nil
	}
	tv := unix.NsecToTimeval(nanos)
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("setting clock: %w", err)
	}
	return nil
}

// slewClock makes the kernel correct the clock little by little, instead of what it was correcting. See
// adjtime(3).
func slewClock(offset time.Duration) error {
	if _, err := unix.Adjtimex(&unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: offset.Microseconds()}); err != nil {
		return fmt.Errorf("adjusting clock by %v: %w", offset, err)
	}
	return nil
}
