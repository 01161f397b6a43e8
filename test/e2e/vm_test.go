//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// oldMachine is a manifest as clients of the oldest served version write it.
const oldMachine = `
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: box, labels: {app: box}}
spec: {className: tiny, imageName: tiny, storageClass: atoll, powerState: PoweredOn, powerOffMode: TrySoft}
`

// TestMachineLife: a machine of an old manifest, seen in the newest version; kubectl on it; power and restarts; it
// keeps disk, address and UUID, also when its QEMU is killed, and nobody takes its pod away.
func TestMachineLife(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(oldMachine)
	n.power("box", "PoweredOn")
	n.agent("box")
	eventually(t, "the serial console in the logs", func() error {
		if out := n.kubectl("logs", "box"); !strings.Contains(out, "Tiny VM for tests") {
			return fmt.Errorf("logs are %q", out)
		}
		return nil
	})
	contains(t, n.exec("box", "uname", "-n"), "box")
	if out, err := n.try("exec", "box", "--", "sh", "-c", "echo out; exit 3"); err == nil || !strings.Contains(out, "exit code 3") {
		t.Errorf("exit code of a command: %v\n%s", err, out)
	}
	n.console("echo $((6*7))-typed", "42-typed")
	newest := func(path string) string { return n.field("virtualmachines.v1alpha5.vmoperator.vmware.com/box", path) }
	equal(t, "image kind in the newest version", newest(".spec.image.kind"), "VirtualMachineImage")
	uuid, address := newest(".status.biosUUID"), newest(".status.network.primaryIP4")
	equal(t, "UUID in the guest", strings.ToLower(n.exec("box", "cat", "/sys/class/dmi/id/product_uuid")), uuid+"\n")
	contains(t, n.exec("box", "ip", "addr"), address)
	n.exec("box", "sh", "-c", "echo kept >/data/file; sync")

	same := func(after string) {
		t.Helper()
		n.agent("box")
		equal(t, "file after "+after, n.exec("box", "cat", "/data/file"), "kept\n")
		equal(t, "address after "+after, newest(".status.network.primaryIP4"), address)
		equal(t, "UUID after "+after, strings.ToLower(n.exec("box", "cat", "/sys/class/dmi/id/product_uuid")), uuid+"\n")
	}
	contains(t, n.vm("stop", "box"), "stopped")
	n.power("box", "PoweredOff")
	n.vm("start", "box")
	same("power off and on")

	boot := func() string { return n.exec("box", "cat", "/proc/sys/kernel/random/boot_id") }
	before := boot()
	n.vm("restart", "box")
	again := func(what string) {
		t.Helper()
		eventually(t, what, func() error {
			if id, err := n.try("exec", "box", "--", "cat", "/proc/sys/kernel/random/boot_id"); err != nil || id == before {
				return fmt.Errorf("boot %q: %w", id, err)
			}
			return nil
		})
		before = boot()
	}
	again("a restart")
	if _, err := n.try("exec", "box", "--", "poweroff"); err != nil {
		t.Logf("powering off from inside: %v", err) // the agent may be gone before it has answered
	}
	again("a machine that is declared to be on to come back")
	n.killMachine("box")
	again("a machine whose QEMU was killed to come back")
	same("a crash")

	out, err := n.try("delete", "pod", "box", "--wait=false")
	if err == nil || !strings.Contains(out, "powerState") {
		t.Errorf("deleting the pod behind the machine's back: %v\n%s", err, out)
	}
	n.kubectl("delete", "vm", "box", "--timeout=180s")
	if left := n.kubectl("get", "pvc,pod", "-o", "name"); left != "" {
		t.Errorf("left of a deleted machine: %s", left)
	}
}

// console types a line at the serial console of the machine box and waits for some text.
func (n *namespace) console(line, until string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	// kubectl wants a terminal for one.
	attach := kubectlCommand(ctx, "-n", n.name, "attach", "-it", "box")
	cmd := exec.CommandContext(ctx, "script", "-qec", strings.Join(attach.Args, " "), "/dev/null")
	in, err := cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }() // killed by cancel: an attachment has no end of its own
	defer cancel()
	var got strings.Builder
	for buf := make([]byte, 4096); !strings.Contains(got.String(), until); {
		if got.Len() == 0 {
			if _, err := io.WriteString(in, line+"\n"); err != nil {
				n.t.Fatal(err)
			}
		}
		k, err := out.Read(buf)
		got.Write(buf[:k])
		if err != nil {
			n.t.Fatalf("console: %v after %q", err, got.String())
		}
	}
}

// killMachine kills the QEMU of a machine.
func (n *namespace) killMachine(name string) {
	n.t.Helper()
	uuid := n.field("vm/"+name, ".status.biosUUID")
	if out, err := exec.Command("pkill", "-KILL", "-f", "qemu-system.*"+uuid).CombinedOutput(); err != nil {
		n.t.Fatalf("killing the QEMU of %s: %v %s", name, err, out)
	}
}

// TestMachineDisksAndSize: volumes come and go while the guest runs, grow, and are nobody else's; so do processors
// and memory.
func TestMachineDisksAndSize(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(claim("data", "atoll", "") + `
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: larger}
spec: {hardware: {cpus: 2, memory: 448Mi}}
`)
	n.createBox()
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data"}}]}}`)
	eventually(t, "the volume to be attached", func() error {
		if got := n.field("vm/box", `.status.volumes[?(@.name=="data")].attached`); got != "true" {
			return fmt.Errorf("attached is %q: %s", got, n.field("vm/box", `.status.volumes[?(@.name=="data")].error`))
		}
		return nil
	})
	disks := func() string { return n.exec("box", "sh", "-c", "cat /sys/block/sd*/size 2>/dev/null | wc -l") }
	eventually(t, "the guest to see it", func() error { return is(disks(), "2\n") })
	n.exec("box", "sh", "-c", "echo written | dd of=/dev/sdb bs=512 count=1 conv=sync,fsync 2>/dev/null")
	n.kubectl("patch", "pvc", "data", "--type=merge", "-p", `{"spec":{"resources":{"requests":{"storage":"96Mi"}}}}`)
	eventually(t, "the guest to see it grown", func() error {
		return is(n.exec("box", "cat", "/sys/block/sdb/size"), fmt.Sprintln(96<<20/512))
	})

	n.vm("create", "thief", "--image", "tiny", "--class", "tiny", "--no-bootstrap", "--no-wait")
	n.kubectl("patch", "vm", "thief", "--type=merge", "-p", `{"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data"}}]}}`)
	eventually(t, "a second machine to be told that the claim is taken", func() error {
		if got := n.kubectl("get", "vm", "thief", "-o", "yaml"); !strings.Contains(got, "box") {
			return fmt.Errorf("status:\n%s", got)
		}
		return nil
	})
	n.kubectl("delete", "vm", "thief", "--timeout=180s")

	n.vm("resize", "box", "--class", "larger")
	eventually(t, "processors and memory to be more", func() error {
		got := n.exec("box", "sh", "-c", "nproc; awk '/MemTotal/{print ($2 > 300000)}' /proc/meminfo")
		return is(got, "2\n1\n")
	})

	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"volumes":null}}`)
	eventually(t, "the guest to have lost it", func() error { return is(disks(), "1\n") })
	n.kubectl("delete", "vm", "box", "--timeout=180s")
	equal(t, "the claim afterwards", n.field("pvc/data", ".status.phase"), "Bound")
}

func is(got, want string) error {
	if got != want {
		return fmt.Errorf("got %q, want %q", got, want)
	}
	return nil
}

// TestMachineSuspend: memory survives, and the firmware is EFI with a TPM.
func TestMachineSuspend(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: efi}
spec: {hardware: {cpus: 1, memory: 512Mi}}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: box}
spec:
  className: efi # GRUB needs more memory there
  imageName: tiny
  storageClass: atoll
  suspendMode: Hard
  bootOptions: {firmware: efi}
  crypto: {vTPMMode: New}
  readinessProbe: {guestHeartbeat: {}, periodSeconds: 2}
`)
	n.agent("box")
	n.kubectl("wait", "--for=condition=Ready", "vm/box", "--timeout=180s")
	n.exec("box", "sh", "-c", "test -d /sys/firmware/efi; echo alive >/tmp/memory")
	contains(t, n.exec("box", "cat", "/proc/sys/kernel/osrelease"), "6.1")
	boot := n.exec("box", "cat", "/proc/sys/kernel/random/boot_id")
	n.vm("suspend", "box")
	n.power("box", "Suspended")
	if pods := n.kubectl("get", "pods", "--field-selector=status.phase=Running", "-o", "name"); pods != "" {
		t.Errorf("a suspended machine has %s", pods)
	}
	n.vm("start", "box")
	n.power("box", "PoweredOn")
	n.agent("box")
	equal(t, "memory", n.exec("box", "cat", "/tmp/memory"), "alive\n")
	equal(t, "boot", n.exec("box", "cat", "/proc/sys/kernel/random/boot_id"), boot)
	contains(t, n.field("vm/box", ".status.crypto"), `"hasVTPM":true`)
}

// TestMachineRefused: what cannot be is refused, or a condition says what is missing and what to do.
func TestMachineRefused(t *testing.T) {
	t.Parallel()
	n := machines(t)
	machine := func(name, spec string) string {
		return fmt.Sprintf("apiVersion: vmoperator.vmware.com/v1alpha5\nkind: VirtualMachine\nmetadata: {name: %s}\nspec: {%s}\n", name, spec)
	}
	for name, c := range map[string]struct{ spec, want string }{
		"suspended": {"className: tiny, imageName: tiny, storageClass: atoll, powerState: Suspended", "spec.powerState"},
		"image":     {"className: tiny, imageName: no-such-image, storageClass: atoll", "no-such-image"},
		"nic":       {"className: tiny, imageName: tiny, storageClass: atoll, network: {interfaces: [{name: E!}]}", "spec.network.interfaces[0].name"},
		"many-nics": {"className: tiny, imageName: tiny, storageClass: atoll, network: {interfaces: [" + nics(11) + "]}", "spec.network.interfaces"},
		"unit":      {"className: tiny, imageName: tiny, storageClass: atoll, volumes: [{name: a, persistentVolumeClaim: {claimName: a}, controllerType: IDE, controllerBusNumber: 9}]", "controllerBusNumber"},
	} {
		if got := n.refused(machine(name, c.spec)); !strings.Contains(got, c.want) {
			t.Errorf("%s: %q is not in:\n%s", name, c.want, got)
		}
	}
	for name, c := range map[string]struct{ spec, condition, want string }{
		"class":   {"className: huge, imageName: tiny, storageClass: atoll", "VirtualMachineClassReady", "huge"},
		"storage": {"className: tiny, imageName: tiny, storageClass: gold", "VirtualMachineStorageReady", "gold"},
		"claim":   {"className: tiny, imageName: tiny, storageClass: atoll, volumes: [{name: a, persistentVolumeClaim: {claimName: absent}}]", "VirtualMachineStorageReady", "absent"},
		"secret":  {"className: tiny, imageName: tiny, storageClass: atoll, bootstrap: {cloudInit: {rawCloudConfig: {name: lost, key: user-data}}}", "VirtualMachineBootstrapReady", "lost"},
	} {
		n.apply(machine(name, c.spec))
		eventually(t, "a condition of "+name, func() error {
			all := n.field("vm/"+name, ".status.conditions[?(@.status!=\"True\")]['type','message']")
			if !strings.Contains(all, c.want) {
				return fmt.Errorf("%q is not in %s", c.want, all)
			}
			return nil
		})
	}
}

func nics(count int) string {
	var list []string
	for i := range count {
		list = append(list, fmt.Sprintf("{name: eth%d}", i))
	}
	return strings.Join(list, ", ")
}
