//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// status is what `atoll status -o json` says, as far as the tests need it.
type status struct {
	Services []struct {
		Name  string `json:"name"`
		State string `json:"state"`
		PID   int    `json:"pid"`
	} `json:"services"`
}

// servicePID is the process of a service, or 0. The status counts also when it fails because something is not ready.
func servicePID(t *testing.T, name string) int {
	t.Helper()
	out, _ := exec.CommandContext(t.Context(), suite.atoll, "status", "-o", "json", "--data-dir", suite.dataDir).Output()
	if len(out) == 0 {
		return 0
	}
	var s status
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatalf("reading atoll status: %v\n%s", err, out)
	}
	for _, service := range s.Services {
		if service.Name == name {
			return service.PID
		}
	}
	return 0
}

// killService kills the process of a service as soon as it has one, and returns which that was.
func killService(t *testing.T, name string) (pid int) {
	t.Helper()
	eventually(t, "a process of "+name, func() error {
		if pid = servicePID(t, name); pid == 0 {
			return errors.New("atoll status names none")
		}
		return nil
	})
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("killing %s: %v", name, err)
	}
	return pid
}

// pidsMatching lists the processes whose command line contains a pattern.
func pidsMatching(t *testing.T, pattern string) []int {
	t.Helper()
	out, _ := exec.CommandContext(t.Context(), "pgrep", "-f", pattern).Output()
	var pids []int
	for field := range strings.FieldsSeq(string(out)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// TestKilledServices kills each service in turn; pods and virtual machines must run on and the API must come back, with
// all that can be done to them.
func TestKilledServices(t *testing.T) {
	n := machines(t)
	n.apply(sleeper + "---" + claim("data", "atoll", ""))
	n.vm("create", "machine", "--image", "tiny", "--class", "tiny", "--no-bootstrap")
	n.agent("machine")
	n.ready("box")
	boot := n.exec("machine", "cat", "/proc/sys/kernel/random/boot_id")
	begun := []string{"sh", "-c", "cat /proc/sys/kernel/random/boot_id; cut -d ' ' -f 22 /proc/1/stat"}
	started := n.exec("box", begun...)
	for _, service := range []string{"agent", "pool", "containerd", "server"} {
		pid := killService(t, service)
		eventually(t, service+" to come back", func() error {
			if now := servicePID(t, service); now == 0 || now == pid {
				return fmt.Errorf("pid is %d, was %d", now, pid)
			}
			return nil
		})
		eventually(t, "exec after the death of "+service, func() error {
			out, err := n.tryExec("box", begun...)
			if err == nil && out != started {
				t.Fatalf("the pod was restarted when %s died", service)
			}
			return err
		})
		eventually(t, "exec in the virtual machine after the death of "+service, func() error {
			out, err := n.tryExec("machine", "cat", "/proc/sys/kernel/random/boot_id")
			if err == nil && out != boot {
				t.Fatalf("the virtual machine was restarted when %s died", service)
			}
			return err
		})
		eventually(t, "the API to take a new pod after the death of "+service, func() error {
			_, err := n.tryApply(script("after-"+service, "echo fine"))
			return err
		})
		equal(t, "a new pod after the death of "+service, n.ended("after-"+service), "Succeeded")
	}
	equal(t, "restarts", n.field("pod/box", ".status.containerStatuses[0].restartCount"), "0")
	eventually(t, "the API to take a change of the machine", func() error { // the webhooks may be away for longer
		_, err := n.try("patch", "vm", "machine", "--type=merge", "-p", `{"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data"}}]}}`)
		return err
	})
	eventually(t, "the guest to see another disk", func() error {
		return n.execIs("machine", fmt.Sprintln(64<<20/512), "sh", "-c", "cat /sys/block/sdb/size 2>/dev/null || true")
	})
	equal(t, "boot", n.exec("machine", "cat", "/proc/sys/kernel/random/boot_id"), boot)
	n.vm("stop", "machine")
	n.power("machine", "PoweredOff")
}

// TestKilledMachine kills the QEMU and then the shim of a pod; the kubelet must make it anew.
func TestKilledMachine(t *testing.T) {
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	for i, pattern := range []string{"qemu-system", "shim-daemon"} {
		killAll(t, pidsOfPod(t, n, "box", pattern))
		eventually(t, "the restart after the death of "+pattern, func() error {
			count, _ := n.try("get", "pod", "box", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
			if got, _ := strconv.Atoi(count); got <= i {
				return fmt.Errorf("restart count is %s", count)
			}
			return nil
		})
		n.ready("box")
		eventually(t, "exec", func() error {
			_, err := n.try("exec", "box", "--", "true")
			return err
		})
	}
}

// killAll kills processes, of which some may have ended meanwhile.
func killAll(t *testing.T, pids []int) {
	t.Helper()
	killed := 0
	for _, pid := range pids {
		switch err := syscall.Kill(pid, syscall.SIGKILL); {
		case err == nil:
			killed++
		case !errors.Is(err, syscall.ESRCH):
			t.Fatalf("killing process %d: %v", pid, err)
		}
	}
	if killed == 0 {
		t.Fatalf("all of %v had ended", pids)
	}
}

// pidsOfPod finds processes of a pod by the pod's cgroup. The shim of a machine that died stays until the
// kubelet removes its sandbox, so there may be several.
func pidsOfPod(t *testing.T, n *namespace, pod, pattern string) []int {
	t.Helper()
	uid := n.field("pod/"+pod, ".metadata.uid")
	found := pidsInCgroup(t, uid, pattern)
	if len(found) == 0 {
		t.Fatalf("no process %q in the cgroup of pod %s (%s)", pattern, pod, uid)
	}
	return found
}

// pidsInCgroup finds the processes of a pod that may be gone from the API.
func pidsInCgroup(t *testing.T, uid, pattern string) []int {
	t.Helper()
	var found []int
	for _, pid := range pidsMatching(t, pattern) {
		out, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if strings.Contains(string(out), uid) {
			found = append(found, pid)
		}
	}
	return found
}

// TestGuestPanic crashes the kernel of a micro-VM from inside; the kubelet must make the pod anew.
func TestGuestPanic(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(sleeper, "image: busybox,", "image: busybox, securityContext: {capabilities: {add: [SYS_ADMIN]}},", 1))
	n.ready("box")
	before := strings.TrimSpace(n.exec("box", "cat", "/proc/sys/kernel/random/boot_id"))
	panics := "grep -q " + before + " /proc/sys/kernel/random/boot_id || exit 0; mkdir -p /p; mount -t proc proc /p; echo c > /p/sysrq-trigger; echo survived"
	eventually(t, "the new machine", func() error {
		// The connection ends with the kernel. The old one is asked again if it has not heard.
		out, err := n.try("exec", "box", "--", "sh", "-c", panics)
		if err == nil && strings.Contains(out, "survived") {
			t.Fatalf("the kernel survived:\n%s", out)
		}
		return err
	})
	eventually(t, "the restart to be counted", func() error {
		return n.fieldIs("pod/box", ".status.containerStatuses[0].restartCount", "1")
	})
	n.ready("box")
}
