//go:build integration

package guest_test

import (
	"testing"
)

// These tests boot the real init in a real micro-VM: they need root, qemu-system-x86_64, a pod
// kernel (ATOLL_TEST_KERNEL or build/guest/vmlinux), mkfs.erofs, mkfs.ext4, busybox-static, cc.

func TestBasic(t *testing.T) {
	v := start(t, nil)
	if got := v.must(sh("echo hello; uname -n; cat /proc/self/oom_score_adj; echo $$; pwd; echo $HOME $A; id")); got != "hello\npod\n1000\n1\n/\n/root b\nuid=0(root) gid=0(root) groups=0(root)" {
		t.Errorf("got %q", got)
	}
}
