//go:build integration

package shim_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// testClock: a pod whose clock is wrong gets the host's. What the pod does to its clock is the pod's
// alone; the host's own clock is not set here.
func testClock(t *testing.T, h *host) {
	begun := time.Now()
	for try := 0; time.Since(begun) < 10*time.Minute; try++ {
		if h.clockFollows(fmt.Sprintf("clock-%d", try)) {
			return
		}
	}
	t.Fatal("no pod's clock was set before the pod was told the time")
}

// clockFollows sets the clock of a new pod and waits for the host's time. It returns false if the pod may have been
// told the time before that: ten minutes pass until it is told again.
func (h *host) clockFollows(id string) bool {
	t := h.t
	t.Helper()
	start := time.Now()
	p := h.runPod(id, nil)
	defer p.stop()
	c := p.mustCreate(id+"-c", p.spec("/bin/sleep", "1000"))
	c.start()
	started := time.Since(start)
	defer func() {
		c.kill(9)
		c.wait()
		c.delete()
	}()
	// behind is how far the pod's clock is behind the host's: none while it is between what the host's was before
	// and after it was asked for.
	behind := func() time.Duration {
		before := time.Now()
		seconds, err := strconv.ParseInt(strings.TrimSpace(c.sh("busybox date +%s")), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		at := time.Unix(seconds, 0)
		return max(before.Sub(at), 0) + min(time.Since(at), 0)
	}
	// The guest is told the time before it is set up, which takes a part of the start.
	if d := behind(); d.Abs() > max(5*time.Second, started) {
		t.Errorf("clock is %v behind after the start, which took %v", d, started)
	}
	const year = 365 * 24 * time.Hour
	set := p.spec("/bin/busybox", "date", "-u", "-s", "2017-01-01 00:00:00")
	caps := []string{"CAP_SYS_TIME"}
	set.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps}
	p.run(id+"-set", set)
	d := behind()
	if time.Since(start) > 15*time.Second {
		t.Log("the pod may have been told the time already")
		return false
	}
	if d < year {
		t.Fatalf("clock is %v behind after it was set back", d)
	}
	eventually(t, "the clock follows the host's", func() bool { return behind() < year })
	eventually(t, "the clock is right", func() bool { return behind().Abs() <= 5*time.Second })
	return true
}
