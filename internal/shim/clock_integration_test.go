//go:build integration

package shim_test

import (
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// testClock: a pod whose clock is wrong gets the host's. What the pod does to its clock is the pod's
// alone; the host's own clock is not set here.
func testClock(t *testing.T, h *host) {
	p := h.runPod("clock", nil)
	defer p.stop()
	c := p.mustCreate("clock-c", p.spec("/bin/sleep", "1000"))
	c.start()
	now := func() time.Duration {
		seconds, err := strconv.ParseInt(strings.TrimSpace(c.sh("busybox date +%s")), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Since(time.Unix(seconds, 0))
	}
	if behind := now(); behind.Abs() > 5*time.Second {
		t.Errorf("clock is %v behind after the start", behind)
	}
	const year = 365 * 24 * time.Hour
	set := p.spec("/bin/busybox", "date", "-u", "-s", "2017-01-01 00:00:00")
	caps := []string{"CAP_SYS_TIME"}
	set.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps}
	p.run("clock-set", set)
	if behind := now(); behind < year {
		t.Fatalf("clock is %v behind after it was set back", behind)
	}
	eventually(t, "the clock follows the host's", func() bool { return now() < year })
	if behind := now(); behind.Abs() > 5*time.Second {
		t.Errorf("clock is %v behind after it was told the time", behind)
	}
	c.kill(9)
	c.wait()
	c.delete()
}
