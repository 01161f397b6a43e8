//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// ownSupervisor skips tests that stop the supervisor where it is not the suite's own.
func ownSupervisor(t *testing.T) {
	t.Helper()
	if !suite.own {
		t.Skip("the supervisor belongs to somebody else")
	}
}

// downAndUp stops the supervisor, calls between, and starts it again.
func downAndUp(t *testing.T, between func()) {
	t.Helper()
	if err := command("down"); err != nil {
		t.Fatal(err)
	}
	if left := pidsMatching(t, suite.dataDir); len(left) > 0 {
		t.Fatalf("processes after down: %v", left)
	}
	// Also when between fails: other tests follow.
	defer func() {
		if err := command("up", "--detach", "--timeout", "15m"); err != nil {
			t.Error(err)
		}
	}()
	between()
}

// TestDownAndUp stops the whole supervisor and starts it again; objects and volumes of the API are as before. The host has
// a page of 1 GiB then, which is told to Kubernetes at a start only, for a machine whose class wants it.
func TestDownAndUp(t *testing.T) {
	ownSupervisor(t)
	n := machines(t)
	n.kubectl("create", "configmap", "kept", "--from-literal=key=value")
	n.apply(sleeper)
	n.ready("box")
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: huge}
spec:
  hardware: {cpus: 1, memory: 1Gi}
  configSpec: {_typeName: VirtualMachineConfigSpec, extraConfig: [{_typeName: OptionValue, key: sched.mem.lpage.enable1GPage, value: "TRUE"}]}
`)
	const pages = "/sys/kernel/mm/hugepages/hugepages-1048576kB/"
	count := func(file string) string {
		t.Helper()
		number, err := os.ReadFile(pages + file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(number))
	}
	reserve := func(number string) error { return os.WriteFile(pages+"nr_hugepages", []byte(number), 0o644) }
	if err := reserve("0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = reserve("0") })
	n.apply(strings.Replace(machine("huge", "huge"), "spec: {", "spec: {powerOffMode: Hard, ", 1))
	n.condition("huge", "VirtualMachineConditionPlacementReady", "False", "hugepages-1Gi")
	downAndUp(t, func() {
		if err := reserve("1"); err != nil {
			t.Fatal(err)
		}
	})
	equal(t, "configmap", n.field("configmap/kept", ".data.key"), "value")
	n.ready("box")
	if count("nr_hugepages") == "0" {
		t.Log("the kernel finds no gibibyte in one piece: the machine stays where it is")
		n.condition("huge", "VirtualMachineConditionPlacementReady", "False", "hugepages-1Gi")
		return
	}
	n.agent("huge")
	equal(t, "pages that are free while the machine runs", count("free_hugepages"), "0")
	n.vm("stop", "huge")
	n.power("huge", "PoweredOff")
	equal(t, "pages that are free afterwards", count("free_hugepages"), "1")
}

// TestDamagedGuestFiles overwrites files that micro-VMs are made of. A start writes them again and says
// so, and so does a restart of the pool, which makes micro-VMs of them.
func TestDamagedGuestFiles(t *testing.T) {
	ownSupervisor(t)
	n := newNamespace(t)
	kernel, pod := filepath.Join(suite.dataDir, "guest", "vmlinux"), filepath.Join(suite.dataDir, "bin", "atoll-pod")
	damage := func(path string) {
		if err := os.WriteFile(path, []byte("damaged"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// repaired waits until a file was written again so many times, and starts a pod.
	repaired := func(path string, times int) {
		t.Helper()
		eventually(t, "the warning", func() error {
			log, err := os.ReadFile(filepath.Join(suite.dataDir, "logs", "up.log"))
			if want := `msg="a file was damaged and is written again" path=` + path; err == nil && strings.Count(string(log), want) != times {
				err = fmt.Errorf("up.log does not have %d times %s", times, want)
			}
			return err
		})
		name := fmt.Sprintf("after-%d", times)
		n.apply(script(name, "echo fine"))
		equal(t, "phase", n.ended(name), "Succeeded")
	}
	downAndUp(t, func() {
		damage(kernel)
		damage(pod)
	})
	repaired(kernel, 1)
	damage(kernel)
	killService(t, "pool")
	repaired(kernel, 2)
}

// TestTruncatedEtcd cuts the database: the start must fail with words and leave the data alone, and
// succeed once the data is back.
func TestTruncatedEtcd(t *testing.T) {
	ownSupervisor(t)
	n := newNamespace(t)
	n.kubectl("create", "configmap", "kept", "--from-literal=key=value")
	database := filepath.Join(suite.dataDir, "etcd", "member", "snap", "db")
	downAndUp(t, func() {
		whole, err := os.ReadFile(database)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.WriteFile(database, whole, 0o600); err != nil {
				t.Error(err)
			}
		}()
		// The file has room to grow at its end; cut into what is used.
		const left = 128 << 10
		if err := os.Truncate(database, left); err != nil {
			t.Fatal(err)
		}
		out := atoll(t, 1, suite.atoll, "up", "--detach", "--timeout", "90s", "--data-dir", suite.dataDir)
		contains(t, out, "etcd data is damaged and was left untouched; restore it from a backup")
		contains(t, out, filepath.Join(suite.dataDir, "logs", "server.log"))
		if err := command("down"); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(database); err != nil || info.Size() != left {
			t.Errorf("the data was touched: %v, %v", info, err)
		}
	})
	equal(t, "configmap", n.field("configmap/kept", ".data.key"), "value")
}

// TestDrain moves all pods, and with them the virtual machines, off the node and lets it have them again.
func TestDrain(t *testing.T) {
	ownSupervisor(t)
	n := machines(t)
	n.vm("create", "machine", "--image", "tiny", "--class", "tiny", "--no-bootstrap")
	n.agent("machine")
	n.exec("machine", "sh", "-c", "echo kept >/data/file; sync")
	n.kubectl("create", "deployment", "web", "--image=busybox:1.36", "--", "sleep", "100000")
	available := func() { n.kubectl("rollout", "status", "deployment/web", timeout(patience)) }
	available()
	before, evicted := n.kubectl("get", "pods", "-l", "app=web", "-o", "name"), n.field("pod/machine", ".metadata.uid")
	node := strings.TrimSpace(run(t, "", "get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"))
	t.Cleanup(func() { _, _ = kubectl(context.Background(), "", "uncordon", node) })
	contains(t, run(t, "", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--grace-period=1", timeout(patience)), "drained")
	eventually(t, "a pod without a node", func() error {
		if out, err := n.try("get", "pods", "-l", "app=web", "--no-headers"); err != nil || !strings.Contains(out, "Pending") {
			return fmt.Errorf("kubectl shows %q", out)
		}
		return nil
	})
	eventually(t, "the virtual machine to wait for a node", func() error {
		if got, err := n.tryField("vm/machine", `.status.conditions[?(@.type=="VirtualMachineConditionPlacementReady")]['status','message']`); err != nil || !strings.HasPrefix(got, "False") || !strings.Contains(got, "unschedulable") {
			return fmt.Errorf("its condition is %q", got)
		}
		return nil
	})
	equal(t, "its power state", n.field("vm/machine", ".status.powerState"), "PoweredOff")
	run(t, "", "uncordon", node)
	available()
	if after := n.kubectl("get", "pods", "-l", "app=web", "-o", "name"); after == before {
		t.Fatalf("the pod is the same as before: %s", after)
	}
	n.agent("machine")
	equal(t, "file of the virtual machine", n.exec("machine", "cat", "/data/file"), "kept")
	if now := n.field("pod/machine", ".metadata.uid"); now == evicted {
		t.Fatal("the virtual machine is in the pod that was evicted")
	}
}
