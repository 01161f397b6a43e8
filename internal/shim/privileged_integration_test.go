//go:build integration

package shim_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// privileged is a privileged container's spec as containerd writes it for micro-VMs on a host whose own
// capabilities are few.
func (p *pod) privileged(args ...string) *specs.Spec {
	s := p.spec(args...)
	few := []string{"CAP_CHOWN", "CAP_SYS_ADMIN"}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: few, Effective: few, Permitted: few}
	s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	for _, m := range s.Mounts {
		for i, o := range m.Options {
			if o == "ro" {
				m.Options[i] = "rw"
			}
		}
	}
	return s
}

// testPrivileged: a privileged container has all of the guest and nothing of the host.
func testPrivileged(t *testing.T, p *pod) {
	c := p.mustCreate("privileged", p.privileged("/bin/sleep", "1000"))
	c.start()
	host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.sh("cat /proc/sys/kernel/random/boot_id"); got == string(host) {
		t.Error("the container runs on the host's kernel")
	}
	// Capabilities: all that the guest's kernel has, in the first process and in an exec.
	last := c.sh("cat /proc/sys/kernel/cap_last_cap")
	var bits int
	if _, err := fmt.Sscan(last, &bits); err != nil {
		t.Fatal(err)
	}
	all := fmt.Sprintf("%016x", uint64(1)<<(bits+1)-1)
	for _, process := range []string{"1", "self"} {
		if got := c.sh("cat /proc/" + process + "/status"); !strings.Contains(got, "CapEff:\t"+all) || !strings.Contains(got, "Seccomp:\t0") {
			t.Errorf("process %s: want all of %s, got\n%s", process, all, got)
		}
	}
	// Devices: those of the guest, in /dev and made by hand.
	if got := c.sh("ls -d /dev/loop-control /dev/net/tun /dev/vda"); strings.Count(got, "\n") != 3 {
		t.Errorf("devices %q", got)
	}
	if got := c.sh("busybox mknod /tmp/vda b $(($(busybox stat -c 0x%t /dev/vda))) 0 && head -c1 /tmp/vda | wc -c"); strings.TrimSpace(got) != "1" {
		t.Errorf("reading a disk: %q", got)
	}
	// The kernel's settings, links and mounts.
	c.sh("echo 42 > /proc/sys/kernel/panic && busybox test $(cat /proc/sys/kernel/panic) = 42 && echo 0 > /proc/sys/kernel/panic")
	c.sh("ip link add dummy0 type dummy && ip link show dummy0 && ip link del dummy0")
	c.sh("mount -t tmpfs none /tmp && mount | busybox grep ' /tmp '")
	c.sh("busybox test -w /sys/block/vda/queue/read_ahead_kb && cat /sys/block/vda/queue/read_ahead_kb > /sys/block/vda/queue/read_ahead_kb")
	// The cgroup tree can be divided up, and the container still be entered.
	c.sh("busybox mkdir /sys/fs/cgroup/own && for p in $(cat /sys/fs/cgroup/cgroup.procs); do echo $p > /sys/fs/cgroup/own/cgroup.procs || true; done; echo +pids > /sys/fs/cgroup/cgroup.subtree_control")
	if got := c.sh("cat /proc/self/cgroup"); got != "0::/own\n" {
		t.Errorf("group of an exec: %q", got)
	}
	// Its neighbour stays as it was.
	s := p.spec("/bin/sh", "-c", "ls /dev; busybox mknod /dev/vda b 254 0; head -c1 /dev/vda || echo filtered; busybox touch /sys/fs/cgroup/x || echo read-only")
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_MKNOD"}, Effective: []string{"CAP_MKNOD"}, Permitted: []string{"CAP_MKNOD"}}
	if got := p.run("unprivileged", s).stdout.String(); strings.Contains(got, "loop-control") || !strings.HasSuffix(got, "filtered\nread-only\n") {
		t.Errorf("unprivileged container: %q", got)
	}
	c.kill(9)
	c.wait()
	c.delete()
}
