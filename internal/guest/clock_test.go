package guest

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	guestv1 "atoll.dev/atoll/api/guest/v1"
)

func TestCorrect(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		offset, err time.Duration
		want        correction
	}{
		{0, 0, leaveClock},
		{2 * ms, 2 * ms, leaveClock},
		{-2 * ms, 2 * ms, leaveClock},
		{2 * ms, ms, pushClock},
		{-100 * ms, 0, pushClock},
		{101 * ms, 0, stepClock},
		{-time.Hour, 2 * time.Second, stepClock},
		// The request was slow, not the clock wrong.
		{-2 * time.Second, 2 * time.Second, leaveClock},
		{-2050 * ms, 2 * time.Second, pushClock},
		{-1 << 63, 0, stepClock},
	} {
		if got := correct(c.offset, c.err); got != c.want {
			t.Errorf("%v ± %v: %d, want %d", c.offset, c.err, got, c.want)
		}
	}
}

// TestClockRequests: what is refused. What is not would set the clock of the machine that runs this.
func TestClockRequests(t *testing.T) {
	s := &server{}
	code := func(_ *guestv1.Empty, err error) codes.Code { return grpcstatus.Code(err) }
	for _, nanos := range []int64{0, -1} {
		if got := code(s.TellTime(t.Context(), &guestv1.TellTimeRequest{UnixNanos: nanos})); got != codes.InvalidArgument {
			t.Errorf("time %d: %v", nanos, got)
		}
	}
	if got := code(s.SetTime(t.Context(), &guestv1.SetTimeRequest{})); got != codes.FailedPrecondition {
		t.Errorf("nothing was told: %v", got)
	}
	for _, nanos := range []int64{-1, int64(2 * time.Hour)} {
		if got := code(s.SetTime(t.Context(), &guestv1.SetTimeRequest{RoundTripNanos: nanos})); got != codes.InvalidArgument {
			t.Errorf("round trip %d: %v", nanos, got)
		}
	}
	told := time.Unix(1e9, 5)
	if got := code(s.TellTime(t.Context(), &guestv1.TellTimeRequest{UnixNanos: told.UnixNano()})); got != codes.OK {
		t.Fatalf("telling: %v", got)
	}
	if !s.told.host.Equal(told) || time.Since(s.told.at) > time.Minute {
		t.Errorf("noted %v at %v", s.told.host, s.told.at)
	}
}
