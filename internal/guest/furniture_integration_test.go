//go:build integration

package guest_test

import (
	"bytes"
	"strings"
	"testing"
)

// TestFurniture: a container looks the same whether its usual mounts were made ahead of time or by its own
// program, as for one with stdin.
func TestFurniture(t *testing.T) {
	v := start(t, nil)
	const look = `cut -d' ' -f4- /proc/self/mountinfo | grep -v overlay; stat -c '%N %F %a %u %g %t %T' / /dev /dev/* /dev/pts/* /proc /sys /sys/fs/cgroup/*; cat /proc/self/cgroup /proc/1/comm; touch /dev/x && echo writable`
	ahead := v.must(sh(look))
	own := sh(look)
	own.stdin = bytes.NewReader(nil)
	if got := v.must(own); got != ahead {
		t.Errorf("ahead of time:\n%s\nby its program:\n%s", ahead, got)
	}
	for _, want := range []string{" /dev/pts rw,nosuid,noexec,relatime", " /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime", "0::/\n", "writable"} {
		if !strings.Contains(ahead, want) {
			t.Errorf("no %q in\n%s", want, ahead)
		}
	}
}
