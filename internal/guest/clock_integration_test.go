//go:build integration

package guest_test

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	guestv1 "atoll.dev/atoll/api/guest/v1"
)

// TestClock: the guest's clock is where it is told to be, at once or little by little, and whoever
// waits for a step sees one.
func TestClock(t *testing.T) {
	v := start(t, nil)
	seen := v.watchClock()
	if line := <-seen; line != "armed" {
		t.Fatalf("watcher says %q", line)
	}
	year := func() string { return v.must(sh("date -u +%Y")) }
	june := func(year int) func() time.Time {
		return func() time.Time { return time.Date(year, 6, 1, 0, 0, 0, 0, time.UTC) }
	}
	v.setTime(june(2017))
	if got := year(); got != "2017" {
		t.Errorf("after a step back it is %s", got)
	}
	if line := <-seen; line != "stepped true 2017" {
		t.Errorf("watcher says %q", line)
	}
	v.setTime(june(2040))
	if got := year(); got != "2040" {
		t.Errorf("after a step forward it is %s", got)
	}
	if line := <-seen; line != "stepped true 2040" {
		t.Errorf("watcher says %q", line)
	}

	off := v.setTime(time.Now)
	if line := <-seen; !strings.HasPrefix(line, "stepped true 20") {
		t.Errorf("watcher says %q", line)
	}
	before := time.Now()
	j := sh("true")
	v.must(j)
	// The end of a process has the guest's time.
	if at, after := time.Unix(0, j.wait.ExitedUnixNanos), time.Now(); at.Before(before.Add(-off)) || at.After(after.Add(off)) {
		t.Errorf("ended at %v by the guest's clock, between %v and %v by the host's, give or take %v", at, before, after, off)
	}
	v.slew(off)
	if len(seen) > 0 {
		t.Errorf("a small correction was a step: %q", <-seen)
	}
}

// slew tells a time that is a little off: the kernel is to correct that by and by. The clock is off already, by some
// of what is passed.
func (v *vm) slew(off time.Duration) {
	v.t.Helper()
	// The kernel corrects half a millisecond each second.
	done := func(since time.Time) time.Duration { return time.Since(since) / 2000 }
	ahead := func() time.Time { return time.Now().Add(60 * time.Millisecond) }
	off += v.setTime(time.Now)
	start := time.Now()
	give := off + v.setTime(ahead)
	left := v.slewLeft()
	if least := 40*time.Millisecond - give - done(start); left < least || left > 70*time.Millisecond+give {
		v.t.Errorf("%v are left to correct, want almost 60ms and at least %v", left, least)
	}
	start = time.Now()
	give = off + v.setTime(ahead) + v.setTime(time.Now)
	left = v.slewLeft()
	if most := 10*time.Millisecond + give + done(start); left.Abs() > most {
		v.t.Errorf("%v are left to correct, want none, or %v at most", left, most)
	}
}

// slewLeft is what the kernel has still to correct, which it then forgets. "adjtimex -o" answers with
// what was left before.
func (v *vm) slewLeft() time.Duration {
	v.t.Helper()
	j := sh("adjtimex -o 0")
	sets := j.spec.Process.Capabilities
	for _, set := range []*[]string{&sets.Bounding, &sets.Permitted, &sets.Effective} {
		*set = append(slices.Clone(*set), "CAP_SYS_TIME")
	}
	out := v.must(j)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if i := slices.Index(f, "offset:"); i >= 0 && len(f) > i+1 {
			us, err := strconv.Atoi(f[i+1])
			if err != nil {
				v.t.Fatal(err)
			}
			return time.Duration(us) * time.Microsecond
		}
	}
	v.t.Fatalf("no offset in %q", out)
	return 0
}

// setTime tells the guest a time until that is quick, as far as the host lets it, has it take the time over, and
// returns how far off that may be.
func (v *vm) setTime(at func() time.Time) time.Duration {
	v.t.Helper()
	quick := 5 * time.Millisecond // as package clock of the shim has it
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		sent := time.Now()
		if sent.Sub(start) > 30*time.Second {
			quick = 25 * time.Millisecond
		}
		if _, err := v.guest.TellTime(v.t.Context(), &guestv1.TellTimeRequest{UnixNanos: at().UnixNano()}); err != nil {
			v.t.Fatal(err)
		}
		took := time.Since(sent)
		v.t.Logf("telling the time took %v", took)
		if took > quick {
			if time.Since(start) > 5*time.Minute {
				v.t.Fatal("telling the time is never quick")
			}
			continue
		}
		if _, err := v.guest.SetTime(v.t.Context(), &guestv1.SetTimeRequest{RoundTripNanos: took.Nanoseconds()}); err != nil {
			v.t.Fatal(err)
		}
		return took / 2
	}
}

// watchClock starts testclock in a container and returns the lines it writes.
func (v *vm) watchClock() <-chan string {
	v.t.Helper()
	program := filepath.Join(v.t.TempDir(), "testclock")
	run(v.t, "go", "build", "-ldflags=-s -w", "-o", program, "./testclock")
	f, err := os.Open(program)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = f.Close() })
	r, w := io.Pipe()
	j := sh("cat >/tmp/testclock; chmod +x /tmp/testclock; exec /tmp/testclock")
	j.stdin, j.stdout = f, w
	lines := make(chan string, 16)
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
	}()
	go func() { _ = v.run(j) }() // ends with the machine
	return lines
}
