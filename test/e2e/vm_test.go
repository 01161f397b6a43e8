//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// oldMachine is a manifest as clients of the oldest served version write it.
const oldMachine = `
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: box, labels: {app: box}}
spec: {className: tiny, imageName: tiny, storageClass: atoll, powerState: PoweredOn, powerOffMode: TrySoft}
`

// TestMachineLife: a machine of an old manifest, seen in the newest version; kubectl on it; power and restarts; it
// keeps disk, address and UUID, also when its kernel crashes or its QEMU is killed, and nobody takes its pod away. A ticket for
// its screen that nobody has used in all that time is no good.
func TestMachineLife(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(oldMachine)
	n.power("box", "PoweredOn")
	n.agent("box")
	unused := n.ticket("unused", "box")
	eventually(t, "the serial console in the logs", func() error {
		if out, err := n.try("logs", "box"); err != nil || !strings.Contains(out, "Tiny VM for tests") {
			return fmt.Errorf("logs are %q", out)
		}
		return nil
	})
	contains(t, n.exec("box", "uname", "-n"), "box")
	if out, err := n.delivered("box", "sh", "-c", "echo out; exit 3"); err == nil || !strings.Contains(out, "exit code 3") {
		t.Errorf("exit code of a command: %v\n%s", err, out)
	}
	n.console("echo $((6*7))-typed", "42-typed")
	n.forwarded("box")
	newest := func(path string) string { return n.field("virtualmachines.v1alpha5.vmoperator.vmware.com/box", path) }
	eventually(t, "the name of the guest's system", func() error { return is(newest(".status.guest.guestFullName"), "Tiny VM for tests") })
	equal(t, "image kind in the newest version", newest(".spec.image.kind"), "VirtualMachineImage")
	uuid, address := newest(".status.biosUUID"), newest(".status.network.primaryIP4")
	equal(t, "UUID in the guest", strings.ToLower(n.exec("box", "cat", "/sys/class/dmi/id/product_uuid")), uuid+"\n")
	contains(t, n.exec("box", "ip", "addr"), address)
	n.exec("box", "sh", "-c", "echo kept >/data/file; sync")

	same := func(after string) {
		t.Helper()
		n.agent("box")
		equal(t, "file after "+after, n.exec("box", "cat", "/data/file"), "kept\n")
		equal(t, "address after "+after, n.address("box"), address)
		equal(t, "UUID after "+after, strings.ToLower(n.exec("box", "cat", "/sys/class/dmi/id/product_uuid")), uuid+"\n")
	}
	contains(t, n.vm("stop", "box"), "stopped")
	n.power("box", "PoweredOff")
	n.vm("start", "box")
	same("power off and on")

	boot := func() string { return n.exec("box", "cat", "/proc/sys/kernel/random/boot_id") }
	before := boot()
	pod, restarted := n.field("pod/box", ".metadata.uid"), newest(".status.lastRestartTime")
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
	eventually(t, "the guest to be asked for a restart", func() error {
		_, err := n.tryVM("restart", "box", "--soft") // its agent may be slow
		return err
	})
	again("a restart that only asks")
	_, _ = n.delivered("box", "reboot") // its agent may be gone before it has answered
	again("a restart from inside")
	n.exec("box", "touch", "/run/ignore-power-button")
	n.vm("restart", "box", "--hard")
	again("a hard restart of a guest that does not listen")
	equal(t, "pod after restarts", n.field("pod/box", ".metadata.uid"), pod)
	if at := newest(".status.lastRestartTime"); at == "" || at == restarted {
		t.Errorf("last restart: %q, was %q", at, restarted)
	}
	if _, err := n.delivered("box", "poweroff"); err != nil {
		t.Logf("powering off from inside: %v", err) // the agent may be gone before it has answered
	}
	again("a machine that is declared to be on to come back")
	n.crash("box")
	again("a machine whose kernel has crashed to come back")
	contains(t, n.vm("describe", "box"), "GuestPanicked")
	contains(t, n.vm("events", "box"), "the kernel of the guest has crashed")
	n.killMachine("box")
	again("a machine whose QEMU was killed to come back")
	same("a crash")
	t.Logf("the unused ticket expires in %s", time.Until(unused.expires))
	time.Sleep(time.Until(unused.expires.Add(time.Second))) // which is long ago
	unused.refused(t)
	n.seen("fresh", "box")

	out, err := n.try("delete", "pod", "box", "--wait=false")
	if err == nil || !strings.Contains(out, "powerState") {
		t.Errorf("deleting the pod behind the machine's back: %v\n%s", err, out)
	}
	n.kubectl("delete", "vm", "box", timeout(longPatience))
	eventually(t, "nothing to be left of a deleted machine", func() error {
		return n.lists("", "pvc,pod", "-o", "name")
	})
}

// forwarded reaches the guest's web server through the API server, and asks what the guest takes.
func (n *namespace) forwarded(name string) {
	t := n.t
	t.Helper()
	eventually(t, "the host name by the forwarded port", func() error {
		page, err := n.forwardedPage(name, "80", "/hostname")
		return errors.Join(err, is(page, name+"\n"))
	})
	eventually(t, "kubectl top pod", func() error {
		out, err := n.try("top", "pod", name, "--no-headers")
		if err == nil && !strings.Contains(out, "Mi") {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

// crash has the kernel of a machine crash and not restart by itself, and waits for the condition that says so.
func (n *namespace) crash(name string) {
	n.t.Helper()
	pod := n.field("pod/"+name, ".metadata.uid")
	_, _ = n.delivered(name, "sh", "-c", "sysctl -w kernel.panic=0; echo c >/proc/sysrq-trigger") // its agent goes with it
	eventually(n.t, "a condition that says so", func() error {
		return n.fieldIs("vm/"+name, guestHealthy, "False GuestPanicked")
	})
	eventually(n.t, "another pod", func() error {
		if now, err := n.try("get", "pod", name, "-o", "jsonpath={.metadata.uid}"); err != nil || now == pod {
			return fmt.Errorf("pod %s, was %s: %w", now, pod, err)
		}
		return nil
	})
}

// guestHealthy are status and reason of the condition of a machine whose guest is not well.
const guestHealthy = `.status.conditions[?(@.type=="atoll.dev/GuestHealthy")]['status','reason']`

// console types a line at the serial console of the machine box until some text follows. What the kernel says may be in
// the middle of that, and the line is typed again then.
func (n *namespace) console(line, until string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%q to be answered at the console", line), func() error { return n.typed(line, until) })
}

// typed types a line once, and waits for a while.
func (n *namespace) typed(line, until string) error {
	ctx, cancel := context.WithTimeout(n.t.Context(), 2*time.Minute)
	defer cancel()
	// kubectl wants a terminal for one.
	attach := kubectlCommand(ctx, "-n", n.name, "attach", "-it", "box")
	cmd := exec.CommandContext(ctx, "script", "-qec", strings.Join(attach.Args, " "), "/dev/null")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { _ = cmd.Wait() }() // killed by cancel: an attachment has no end of its own
	defer cancel()
	if _, err := io.WriteString(in, line+"\n"); err != nil {
		return err
	}
	var got strings.Builder
	for buf := make([]byte, 4096); !strings.Contains(got.String(), until); {
		k, err := out.Read(buf)
		got.Write(buf[:k])
		if err != nil && !strings.Contains(got.String(), until) {
			return fmt.Errorf("%w after %q", err, got.String())
		}
	}
	return nil
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
// and memory, as far as a guest can lose them. The oldest version of the API is as good for it as the newest.
func TestMachineDisksAndSize(t *testing.T) {
	t.Parallel()
	n := machines(t)
	const oldBox = "virtualmachines.v1alpha2.vmoperator.vmware.com/box"
	n.apply(claim("data", "atoll", "") + "---" + claim("more", "atoll", "") + `
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: larger}
spec: {hardware: {cpus: 2, memory: 448Mi}}
`)
	n.createBox()
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"advanced":{"bootDiskCapacity":"256Mi"}}}`)
	eventually(t, "the guest to see a larger boot disk", func() error {
		return n.execIs("box", fmt.Sprintln(256<<20/512), "cat", "/sys/block/sda/size")
	})
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data"}}]}}`)
	eventually(t, "the volume to be attached", func() error {
		if got, err := n.tryField("vm/box", `.status.volumes[?(@.name=="data")]`); err != nil || !strings.Contains(got, `"attached":true`) {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	disks := func(want string) error {
		return n.execIs("box", want+"\n", "sh", "-c", "cat /sys/block/sd*/size 2>/dev/null | wc -l")
	}
	eventually(t, "the guest to see it", func() error { return disks("2") })
	// How the guest tells the disk: serial number and world wide name.
	serial := strings.ReplaceAll(n.field("vm/box", `.status.volumes[?(@.name=="data")].diskUUID`), "-", "")
	equal(t, "serial number of the disk", n.exec("box", "sh", "-c", "tail -c +5 /sys/block/sdb/device/vpd_pg80"), serial)
	contains(t, n.exec("box", "sh", "-c", "xxd -p /sys/block/sdb/device/vpd_pg83 | tr -d '\\n'"), "5525400")
	n.exec("box", "sh", "-c", "echo written | dd of=/dev/sdb bs=512 count=1 conv=sync,fsync 2>/dev/null")
	n.kubectl("patch", "pvc", "data", "--type=merge", "-p", `{"spec":{"resources":{"requests":{"storage":"96Mi"}}}}`)
	eventually(t, "the guest to see it grown", func() error {
		return n.execIs("box", fmt.Sprintln(96<<20/512), "cat", "/sys/block/sdb/size")
	})

	n.vm("create", "thief", "--image", "tiny", "--class", "tiny", "--no-bootstrap", "--no-wait")
	n.kubectl("patch", "vm", "thief", "--type=merge", "-p", `{"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data"}}]}}`)
	eventually(t, "a second machine to be told that the claim is taken", func() error {
		if got, err := n.try("get", "vm", "thief", "-o", "yaml"); err != nil || !strings.Contains(got, "box") {
			return fmt.Errorf("status:\n%s", got)
		}
		return nil
	})
	n.kubectl("delete", "vm", "thief", timeout(longPatience))

	n.vm("resize", "box", "--class", "larger")
	eventually(t, "processors and memory to be more", func() error {
		return n.execIs("box", "2\n1\n", "sh", "-c", "nproc; awk '/MemTotal/{print ($2 > 300000)}' /proc/meminfo")
	})

	n.resizeBox(oldBox)
	n.kubectl("patch", oldBox, "--type=merge", "-p", `{"spec":{"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"data"}},{"name":"more","persistentVolumeClaim":{"claimName":"more"}}]}}`)
	eventually(t, "the guest to see one more", func() error { return disks("3") })
	equal(t, "serial number of the disk afterwards", strings.ReplaceAll(n.field("vm/box", `.status.volumes[?(@.name=="data")].diskUUID`), "-", ""), serial)
	equal(t, "what is on it", n.exec("box", "sh", "-c", "for d in /sys/block/sd?; do [ $(tail -c +5 $d/device/vpd_pg80) != "+serial+" ] || head -c 7 /dev/${d##*/}; done"), "written")
	n.kubectl("patch", oldBox, "--type=merge", "-p", `{"spec":{"volumes":[{"name":"more","persistentVolumeClaim":{"claimName":"more"}}]}}`)
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"volumes":null}}`)
	eventually(t, "the guest to have lost them", func() error { return disks("1") })
	n.kubectl("delete", "vm", "box", timeout(longPatience))
	equal(t, "the claim afterwards", n.field("pvc/data", ".status.phase"), "Bound")
}

// resizeBox changes the class of the machine box, which is larger, and then the other way, for which it must be off.
func (n *namespace) resizeBox(oldBox string) {
	t := n.t
	t.Helper()
	const synced = "VirtualMachineClassConfigurationSynced"
	processors := func(want string) {
		t.Helper()
		eventually(t, want+" processors", func() error { return n.execIs("box", want+"\n", "nproc") })
	}
	n.kubectl("patch", "vmclass", "larger", "--type=merge", "-p", `{"spec":{"hardware":{"cpus":3}}}`)
	n.condition("box", synced, "False", "has changed since the machine took it up")
	processors("2")
	n.kubectl("annotate", "vm", "box", "vmoperator.vmware.com/same-vm-class-resize=")
	processors("3")
	n.condition("box", synced, "True", "")
	n.kubectl("patch", oldBox, "--type=merge", "-p", `{"spec":{"className":"tiny"}}`)
	n.condition("box", synced, "False PowerCyclePending", "power the machine off and on")
	n.vm("stop", "box")
	n.vm("start", "box")
	n.agent("box")
	processors("1")
	n.condition("box", synced, "True", "")
}

func is(got, want string) error {
	if got != want {
		return fmt.Errorf("got %q, want %q", got, want)
	}
	return nil
}

// TestMachineSuspend: memory survives, with address, disks and processor, and the firmware is EFI with a TPM. It is
// suspended by the newest version of the API, and by the oldest.
func TestMachineSuspend(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(claim("data", "atoll", "") + `
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: efi}
spec:
  hardware: {cpus: 1, memory: 512Mi}
  configSpec: {_typeName: VirtualMachineConfigSpec, extraConfig: [{_typeName: OptionValue, key: atoll.dev/cpu-model, value: Nehalem-v1}]}
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
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
  readinessProbe: {guestHeartbeat: {}, periodSeconds: 2}
`)
	n.agent("box")
	n.kubectl("wait", "--for=condition=Ready", "vm/box", timeout(longPatience))
	n.exec("box", "sh", "-c", "set -e; test -d /sys/firmware/efi; test -e /sys/firmware/acpi/tables/TPM2; echo alive >/tmp/memory")
	disk := n.device("box", "data")
	n.exec("box", "sh", "-c", "echo before | dd of="+disk+" bs=512 count=1 conv=sync,fsync 2>/dev/null")
	contains(t, n.exec("box", "cat", "/proc/cpuinfo"), "Nehalem")
	address := n.address("box")
	contains(t, n.exec("box", "ip", "addr"), address)
	contains(t, n.exec("box", "cat", "/proc/sys/kernel/osrelease"), "6.1")
	boot := n.exec("box", "cat", "/proc/sys/kernel/random/boot_id")
	n.deafSuspend()
	for _, version := range []string{"v1alpha5", "v1alpha2"} {
		set := func(state string) {
			if version == "v1alpha5" {
				n.vm(map[string]string{"Suspended": "suspend", "PoweredOn": "start"}[state], "box")
			} else {
				n.kubectl("patch", "virtualmachines."+version+".vmoperator.vmware.com/box", "--type=merge", "-p", `{"spec":{"powerState":"`+state+`"}}`)
			}
			n.power("box", state)
		}
		set("Suspended")
		if pods := n.kubectl("get", "pods", "--field-selector=status.phase=Running", "-o", "name"); pods != "" {
			t.Errorf("a suspended machine has %s", pods)
		}
		set("PoweredOn")
		n.agent("box")
		equal(t, "memory after "+version, n.exec("box", "cat", "/tmp/memory"), "alive\n")
		equal(t, "boot after "+version, n.exec("box", "cat", "/proc/sys/kernel/random/boot_id"), boot)
	}
	contains(t, n.field("vm/box", ".status.crypto"), `"hasVTPM":true`)
	contains(t, n.exec("box", "cat", "/proc/cpuinfo"), "Nehalem")
	equal(t, "address", n.address("box"), address)
	eventually(t, "an answer at its address", func() error {
		out, err := exec.Command("curl", "-fsS", "--max-time", "30", "http://"+address+"/hostname").CombinedOutput()
		return errors.Join(err, is(string(out), "box\n"))
	})
	n.exec("box", "sh", "-c", "set -e; echo 3 >/proc/sys/vm/drop_caches; dd if="+disk+" bs=512 count=1 2>/dev/null | grep -q before; echo after | dd of="+disk+" bs=512 count=1 conv=sync,fsync")
}

// deafSuspend: a guest that does not write its file systems out is not suspended in mode Soft, and is in mode TrySoft.
func (n *namespace) deafSuspend() {
	n.t.Helper()
	patch := func(spec string) { n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{`+spec+`}}`) }
	n.console("touch /run/agent-off; echo $((6*7))-off", "42-off") // not by the agent: one that is merely slow would look the same
	patch(`"suspendMode":"Soft","powerState":"Suspended"`)
	n.condition("box", "VirtualMachinePowerStateSynced", "False", "suspendMode TrySoft or Hard suspends it all the same")
	equal(n.t, "power state", n.field("vm/box", ".status.powerState"), "PoweredOn")
	patch(`"suspendMode":"TrySoft"`)
	n.power("box", "Suspended")
	patch(`"powerState":"PoweredOn"`)
	n.power("box", "PoweredOn")
	n.console("rm /run/agent-off; echo $((6*7))-on", "42-on")
	n.agent("box")
	patch(`"suspendMode":"Soft"`)
}

// TestMachineRefused: what cannot be is refused, or a condition says what is missing and what to do.
func TestMachineRefused(t *testing.T) {
	t.Parallel()
	n := machines(t)
	machine := func(name, spec string) string {
		return fmt.Sprintf("apiVersion: vmoperator.vmware.com/v1alpha5\nkind: VirtualMachine\nmetadata: {name: %s}\nspec: {%s}\n", name, spec)
	}
	const good = "className: tiny, imageName: tiny, storageClass: atoll"
	for name, c := range map[string]struct{ spec, want string }{
		"suspended": {good + ", powerState: Suspended", "spec.powerState"},
		"image":     {"className: tiny, imageName: no-such-image, storageClass: atoll", "no-such-image"},
		"nic":       {good + ", network: {interfaces: [{name: E!}]}", "spec.network.interfaces[0].name"},
		"many-nics": {good + ", network: {interfaces: [" + nics(11) + "]}", "spec.network.interfaces"},
		"unit":      {good + ", volumes: [{name: a, persistentVolumeClaim: {claimName: a}, controllerType: IDE, controllerBusNumber: 9}]", "controllerBusNumber"},
	} {
		if got := n.refused(machine(name, c.spec)); !strings.Contains(got, c.want) {
			t.Errorf("%s: %q is not in:\n%s", name, c.want, got)
		}
	}
	n.apply("apiVersion: vmoperator.vmware.com/v1alpha5\nkind: VirtualMachineClass\nmetadata: {name: odd}\n" +
		"spec: {hardware: {cpus: 1, memory: 192Mi}, configSpec: {extraConfig: [{key: atoll.dev/cpu-model, value: 'host,foo=on'}]}}\n")
	for name, c := range map[string]struct {
		spec, condition string
		want            []string
	}{
		"class":    {"className: huge, imageName: tiny, storageClass: atoll", "VirtualMachineClassReady", []string{"False", "huge does not exist", "kubectl get vmclass"}},
		"model":    {"className: odd, imageName: tiny, storageClass: atoll", "VirtualMachineClassReady", []string{"False", "atoll.dev/cpu-model", "host,foo=on", "correct the class"}},
		"instance": {good + ", class: {name: tiny-0}", "VirtualMachineClassReady", []string{"False", "VirtualMachineClassInstance tiny-0 does not exist", "remove spec.class"}},
		"ref":      {"className: tiny, image: {kind: VirtualMachineImage, name: vmi-0}, storageClass: atoll", "VirtualMachineImageReady", []string{"False", "vmi-0 does not exist", "kubectl get vmi,cvmi"}},
		"storage":  {"className: tiny, imageName: tiny, storageClass: gold", "VirtualMachineStorageReady", []string{"False", "gold does not exist", "kubectl get storageclass"}},
		"smaller":  {good + ", advanced: {bootDiskCapacity: 1Mi}", "VirtualMachineStorageReady", []string{"False", "bootDiskCapacity is 1Mi, but the disk of VirtualMachineImage"}},
		"claim":    {good + ", volumes: [{name: a, persistentVolumeClaim: {claimName: absent}}]", "VirtualMachineStorageReady", []string{"False", "spec.volumes[0]", "absent"}},
		"secret":   {good + ", bootstrap: {cloudInit: {rawCloudConfig: {name: lost, key: user-data}}}", "VirtualMachineBootstrapReady", []string{"False", "lost"}},
		"policy":   {good + ", reserved: {resourcePolicyName: later}", "VirtualMachineConditionVMSetResourcePolicyReady", []string{"False", "later does not exist", "make it, or clear"}},
		"tracking": {good + ", powerState: PoweredOff, advanced: {changeBlockTracking: true}", "atoll.dev/FieldsWithoutEffect", []string{"True", "spec.advanced.changeBlockTracking (changed blocks are not tracked yet)"}},
	} {
		n.apply(machine(name, c.spec))
		eventually(t, "a condition of "+name, func() error {
			got, err := n.tryField("vm/"+name, fmt.Sprintf(".status.conditions[?(@.type==%q)]['status','message']", c.condition))
			for _, want := range c.want {
				if !strings.Contains(got, want) {
					all, _ := n.tryField("vm/"+name, ".status.conditions")
					return fmt.Errorf("%q is not in %q; the conditions are %s", want, got, all)
				}
			}
			return err
		})
		if state := n.field("vm/"+name, ".status.powerState"); state != "PoweredOff" {
			t.Errorf("%s is %s", name, state)
		}
	}
	// What is missing comes later, and nothing else is needed.
	n.apply("apiVersion: vmoperator.vmware.com/v1alpha2\nkind: VirtualMachineSetResourcePolicy\nmetadata: {name: later}\nspec: {resourcePool: {name: pool}}\n")
	equal(t, "the policy in the newest version", n.field("virtualmachinesetresourcepolicies.v1alpha5.vmoperator.vmware.com/later", ".spec.resourcePool.name"), "pool")
	instance := n.field("vm/policy", `.metadata.annotations.atoll\.dev/class-instance`)
	n.kubectl("patch", "vm", "instance", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"class":{"name":%q}}}`, instance))
	n.power("policy", "PoweredOn")
	n.power("instance", "PoweredOn")
	equal(t, "memory of the class instance", n.field("vm/instance", ".status.hardware.memory.total"), "192Mi")
}

func nics(count int) string {
	var list []string
	for i := range count {
		list = append(list, fmt.Sprintf("{name: eth%d}", i))
	}
	return strings.Join(list, ", ")
}
