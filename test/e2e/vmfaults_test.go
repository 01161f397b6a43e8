//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMachineHostileAgent: whatever the guest agent answers, the machine runs on, the host is told so in time, and what
// makes sense later is believed again.
func TestMachineHostileAgent(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	for name, make := range map[string]string{
		"garbage": `echo nonsense`,
		"huge":    `head -c 9000000 /dev/zero | tr '\000' x`,
		"deep":    `{ head -c 200000 /dev/zero | tr '\000' '['; echo; }`,
		"numbers": `echo '{"return": [{"name": 1e999, "hardware-address": -1, "ip-addresses": {"a": []}}]}'`,
		"lies":    `echo '{"return": {"pid": 99999999999999999999, "exited": true, "exitcode": -1, "out-data": "%%%"}}'`,
		"strings": `echo '{"return": {"host-name": "a\u001b[2Jb", "pid": 1, "exited": true, "exitcode": 0}, "error": null}'`,
	} {
		n.console(make+" >/run/agent-says.new; mv /run/agent-says.new /run/agent-says; echo set-$((40+2))-"+name, "set-42-"+name)
		ctx, cancel := context.WithTimeout(t.Context(), longPatience)
		out, err := kubectl(ctx, "", "-n", n.name, "exec", "box", "--", "uname", "-a")
		if err == nil && !strings.Contains(out, "exit code") && strings.TrimSpace(out) != "" {
			t.Errorf("%s: a command said %q", name, out)
		}
		if ctx.Err() != nil {
			t.Errorf("%s: the command came to no end, and said %q", name, out)
		}
		cancel()
	}
	equal(t, "power state", n.field("vm/box", ".status.powerState"), "PoweredOn")
	if text := n.kubectl("get", "vm", "box", "-o", "yaml"); strings.ContainsRune(text, 0x1b) {
		t.Error("a control character of the guest is in the status")
	}
	n.console("rm /run/agent-says; echo gone-$((40+2))", "gone-42")
	n.agent("box")
	contains(t, n.exec("box", "uname", "-n"), "box")
}

// TestMachineDeaf: a guest that ignores the power button is asked again, and cut off when that was allowed; going back to
// a snapshot while it is being powered off ends well, too.
func TestMachineDeaf(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	n.exec("box", "sh", "-c", "echo first >/data/file; sync")
	n.vm("snapshot", "box", "--name", "first")
	n.exec("box", "sh", "-c", "echo second >/data/file; touch /run/ignore-power-button; sync")
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOff","powerOffMode":"Soft"}}`)
	n.says("pod/box", "Killing")
	eventually(t, "the condition to say what to do", func() error {
		if got, err := n.tryField("vm/box", `.status.conditions[?(@.type=="VirtualMachinePowerStateSynced")].message`); err != nil || !strings.Contains(got, "powerOffMode to Hard") {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	// It listens later, and is asked again without anybody's doing.
	n.console("rm /run/ignore-power-button; echo lis$((40+2))tens", "lis42tens")
	n.power("box", "PoweredOff")
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"metadata":{"annotations":{"atoll.dev/soft-power-off-seconds":"20"}},"spec":{"powerState":"PoweredOn","powerOffMode":"TrySoft"}}`)
	n.agent("box")
	n.exec("box", "touch", "/run/ignore-power-button")
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOff"}}`)
	n.power("box", "PoweredOff")
	if out := n.vm("events", "box"); !strings.Contains(out, "(TrySoft)") || strings.Contains(out, "(Hard)") {
		t.Errorf("it was not cut off after having been asked:\n%s", out)
	}
	n.vm("start", "box")
	n.agent("box")
	n.exec("box", "touch", "/run/ignore-power-button")
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOff"}}`)
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"currentSnapshotName":"first"}}`)
	n.power("box", "PoweredOff")
	eventually(t, "it to be back at the snapshot", func() error {
		if wanted, err := n.tryField("vm/box", ".spec.currentSnapshotName"); err != nil || wanted != "" {
			why, _ := n.tryField("vm/box", `.status.conditions[?(@.type=="VirtualMachineSnapshotRevertSucceeded")].message`)
			return fmt.Errorf("%s is still to be gone back to: %s", wanted, why)
		}
		return nil
	})
	n.vm("start", "box")
	n.agent("box")
	equal(t, "file after going back", n.exec("box", "cat", "/data/file"), "first\n")
}

// TestMachineMemoryRunsOut: a machine that is larger than the host waits with a condition, and one whose QEMU the kernel
// kills for memory says so and is started again, while its neighbour runs on.
func TestMachineMemoryRunsOut(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: giant}
spec: {hardware: {cpus: 1, memory: 900Gi}}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: giant}
spec: {className: giant, imageName: tiny, storageClass: atoll}
`)
	for _, name := range []string{"box", "neighbour"} {
		n.vm("create", name, "--image", "tiny", "--class", "tiny", "--no-bootstrap", "--no-wait")
	}
	eventually(t, "a condition of the giant", func() error {
		if got, err := n.tryField("vm/giant", `.status.conditions[?(@.type=="VirtualMachineConditionPlacementReady")].message`); err != nil || !strings.Contains(got, "Insufficient memory") {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	n.agent("box")
	n.agent("neighbour")
	boot := func(name string) string { return n.exec(name, "cat", "/proc/sys/kernel/random/boot_id") }
	before, neighbour := boot("box"), boot("neighbour")
	pids := pidsMatching(t, "qemu-system.*"+n.field("vm/box", ".status.biosUUID"))
	if len(pids) != 1 {
		t.Fatalf("processes of box: %v", pids)
	}
	limitMemory(t, pids[0], 8<<20)
	_, _ = n.delivered("box", "sh", "-c", "head -c 140000000 /dev/urandom >/run/fill") // its agent goes with it
	eventually(t, "an event that says why it has ended", func() error {
		if out, err := n.tryVM("events", "box"); err != nil || !strings.Contains(out, "memory ran out") {
			return fmt.Errorf("events:\n%s", out)
		}
		return nil
	})
	eventually(t, "a condition that says so", func() error {
		if got, err := n.tryField("vm/box", `.status.conditions[?(@.type=="atoll.dev/GuestHealthy")]['status','reason','message']`); err != nil || !strings.HasPrefix(got, "False Crashed ") || !strings.Contains(got, "memory ran out") {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	eventually(t, "box to come back", func() error {
		if id, err := n.try("exec", "box", "--", "cat", "/proc/sys/kernel/random/boot_id"); err != nil || id == before {
			return fmt.Errorf("boot %q: %w", id, err)
		}
		return nil
	})
	equal(t, "boot of the neighbour", boot("neighbour"), neighbour)
}

// limitMemory bounds the memory of a process's control group: to what it takes now and a little more.
func limitMemory(t *testing.T, pid, more int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		usage, limit := "", ""
		switch {
		case len(f) == 3 && f[1] == "memory":
			dir := filepath.Join("/sys/fs/cgroup/memory", f[2])
			usage, limit = filepath.Join(dir, "memory.usage_in_bytes"), filepath.Join(dir, "memory.limit_in_bytes")
		case len(f) == 3 && f[1] == "":
			dir := filepath.Join("/sys/fs/cgroup", f[2])
			usage, limit = filepath.Join(dir, "memory.current"), filepath.Join(dir, "memory.max")
		}
		now, err := os.ReadFile(usage)
		if err != nil {
			continue
		}
		bytes, err := strconv.Atoi(strings.TrimSpace(string(now)))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(limit, []byte(strconv.Itoa(bytes+more)), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no group that bounds memory in:\n%s", text)
}

// TestHostOutOfMemory: on a host where others than pods have taken the memory a machine is not started and says so, one
// that no host could ever run says that, and their neighbour runs on; with room, what could not start does.
func TestHostOutOfMemory(t *testing.T) {
	n := machines(t)
	n.createBox()
	boot := n.exec("box", "cat", "/proc/sys/kernel/random/boot_id")
	total := meminfo(t, "MemTotal:")
	const mib = 1 << 20
	want := total / 2
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineClass
metadata: {name: large}
spec: {hardware: {cpus: 1, memory: %dMi}}
---
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineClass
metadata: {name: vast}
spec: {hardware: {cpus: 1, memory: %dMi}}
`, want/mib, 2*total/mib))
	machine := func(version, name string) {
		t.Helper()
		n.apply(fmt.Sprintf(`{"apiVersion": "vmoperator.vmware.com/%s", "kind": "VirtualMachine", "metadata": {"name": %q},
			"spec": {"className": %[2]q, "imageName": "tiny", "storageClass": "atoll", "powerOffMode": "Hard"}}`, version, name))
	}
	machine("v1alpha2", "vast")
	n.condition("vast", "VirtualMachineConditionPlacementReady", "False", "Insufficient memory")
	hog, err := unix.Mmap(-1, 0, meminfo(t, "MemAvailable:")-want/6, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	free := sync.OnceFunc(func() { _ = unix.Munmap(hog) })
	defer free()
	machine("v1alpha5", "large")
	n.condition("large", "VirtualMachinePowerStateSynced", "False", "the host is out of memory")
	equal(t, "power state", n.field("vm/large", ".status.powerState"), "PoweredOff")
	equal(t, "boot of the neighbour", n.exec("box", "cat", "/proc/sys/kernel/random/boot_id"), boot)
	free()
	n.agent("large")
	n.kubectl("patch", "vm", "vast", "--type=merge", "-p", `{"spec":{"className":"tiny"}}`)
	n.agent("vast")
	equal(t, "boot of the neighbour", n.exec("box", "cat", "/proc/sys/kernel/random/boot_id"), boot)
}

// meminfo is a line of /proc/meminfo, in bytes.
func meminfo(t *testing.T, line string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), line)
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// TestMachineClashes: names, addresses and claims that two machines want; and a volume that both may have.
func TestMachineClashes(t *testing.T) {
	t.Parallel()
	n := machines(t)
	store := n.sharedStore()
	n.apply(claim("data", "atoll", "") + "---" + claimOf("shared", store, "ReadWriteMany", "16Mi", ", volumeMode: Block"))
	t.Cleanup(func() { // or the datastore stays
		if out, err := kubectl(context.Background(), "", "-n", n.name, "delete", "vm/left", "vm/right", "pvc/shared", "--ignore-not-found"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	machine := func(version, name, spec string) string {
		return fmt.Sprintf("---\napiVersion: vmoperator.vmware.com/%s\nkind: VirtualMachine\nmetadata: {name: %s}\nspec: {className: tiny, imageName: tiny, storageClass: atoll, powerOffMode: Hard, %s}\n", version, name, spec)
	}
	const uuid = "6a746f6c-6c00-4000-8000-00000000ab01"
	off := "powerState: PoweredOff"
	n.apply(machine("v1alpha5", "first", off+", biosUUID: "+uuid+", network: {interfaces: [{name: eth0, macAddr: '02:00:00:aa:00:01'}]}"))
	for name, c := range map[string]struct{ spec, want string }{
		"uuid": {off + ", biosUUID: " + strings.ToUpper(uuid), "is that of VirtualMachine first"},
		"mac":  {off + ", network: {interfaces: [{name: eth0, macAddr: '02:00:00:AA:00:01'}]}", "is that of VirtualMachine first"},
		"own":  {off + ", network: {interfaces: [{name: eth0, macAddr: '02:00:00:aa:00:02'}, {name: eth1, macAddr: '02:00:00:aa:00:02'}]}", "Duplicate value"},
	} {
		eventually(t, name+" to be refused", func() error { // as soon as the first is known to the webhook
			out, err := kubectl(t.Context(), machine("v1alpha5", name, c.spec), "-n", n.name, "create", "--dry-run=server", "-f", "-")
			if err == nil || !strings.Contains(out, c.want) {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	// Two at once want the same claim: one gets it, the other is told who has it.
	volume := "volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]"
	n.apply(machine("v1alpha5", "left", volume) + machine("v1alpha2", "right", volume))
	var winner, loser string
	eventually(t, "one of them to run", func() error {
		states := map[string]string{}
		for _, name := range []string{"left", "right"} {
			state, err := n.tryField("vm/"+name, ".status.powerState")
			if err != nil {
				return err
			}
			states[state] = name
		}
		winner = states["PoweredOn"]
		if winner == "" {
			return fmt.Errorf("states %v", states)
		}
		loser = map[string]string{"left": "right", "right": "left"}[winner]
		if got, err := n.try("get", "vm", loser, "-o", "jsonpath={.status.conditions[*].message} {.status.volumes[*].error}"); err != nil || !strings.Contains(got, winner) {
			return fmt.Errorf("%s is not told of %s: %s", loser, winner, got)
		}
		return nil
	})
	equal(t, "the other's power state", n.field("vm/"+loser, ".status.powerState"), "PoweredOff")
	const shared = `{"name":"shared","sharingMode":"MultiWriter","persistentVolumeClaim":{"claimName":"shared"}}`
	n.kubectl("patch", "vm", loser, "--type=json", "-p", `[{"op":"add","path":"/spec/volumes/-","value":`+shared+`}]`)
	n.kubectl("patch", "vm", winner, "--type=json", "-p", `[{"op":"replace","path":"/spec/volumes","value":[`+shared+`]}]`)
	n.agent(loser)
	n.agent(winner)
	n.exec(winner, "sh", "-c", "echo from the other | dd of="+n.device(winner, "shared")+" bs=512 conv=sync,fsync")
	equal(t, "what one writes and the other reads", n.exec(loser, "head", "-n", "1", n.device(loser, "shared")), "from the other")
}

// TestDamagedImages: what comes by the API from a web server and is damaged or malicious is refused with its reason, and a
// machine that names it waits with that.
func TestDamagedImages(t *testing.T) {
	t.Parallel()
	n := machines(t)
	good, err := os.ReadFile(diskImage(t))
	if err != nil {
		t.Fatal(err)
	}
	corrupt := append([]byte(nil), good...)
	for i := 0x30000; i < 0x30000+4096 && i < len(corrupt); i++ { // its first table
		corrupt[i] = 0x5a
	}
	files := map[string][]byte{"corrupt": corrupt, "truncated": good[:len(good)/2]}
	for name, args := range map[string][]string{
		"backing": {"-b", "/etc/shadow", "-F", "raw"},
		"data":    {"-o", "data_file=" + filepath.Join(t.TempDir(), "raw") + ",data_file_raw=on"},
	} {
		if files[name], err = os.ReadFile(diskImage(t, args...)); err != nil {
			t.Fatal(err)
		}
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(files[strings.TrimPrefix(r.URL.Path, "/")])
	}))
	_ = s.Listener.Close()
	if s.Listener, err = listen(t); err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.Close)
	for name := range files {
		item := "damaged-" + name
		t.Cleanup(func() { _ = exec.Command(suite.atoll, "image", "rm", "--vm", item, "--data-dir", suite.dataDir).Run() })
		run(t, fmt.Sprintf(`
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ClusterContentLibraryItem
metadata: {name: %[1]s}
spec: {name: %[1]s, source: {http: {url: "%[2]s/%[3]s"}}}
`, item, s.URL, name), "apply", "-f", "-")
	}
	for name, want := range map[string]string{"corrupt": "of its clusters are wrong", "truncated": "truncated", "backing": "backing file", "data": "data are in another file"} {
		eventually(t, name+" to be refused", func() error {
			got, err := n.tryField("clustercontentlibraryitem/damaged-"+name, `.status.conditions[?(@.type=="Ready")]['status','reason','message']`)
			if err != nil || !strings.HasPrefix(got, "False ContentInvalid ") || !strings.Contains(got, want) {
				return fmt.Errorf("its condition is %q", got)
			}
			return nil
		})
	}
	image := strings.TrimSpace(run(t, "", "get", "cvmi", "-o", `jsonpath={.items[?(@.spec.providerRef.name=="damaged-truncated")].metadata.name}`))
	if image == "" {
		return // an item that never was ready has no image, so nobody can name it
	}
	n.apply(fmt.Sprintf("apiVersion: vmoperator.vmware.com/v1alpha5\nkind: VirtualMachine\nmetadata: {name: box}\nspec: {className: tiny, storageClass: atoll, image: {kind: ClusterVirtualMachineImage, name: %s}}\n", image))
	eventually(t, "the machine to say so", func() error {
		if got, err := n.tryField("vm/box", `.status.conditions[?(@.type=="VirtualMachineImageReady")].message`); err != nil || !strings.Contains(got, "truncated") {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
}
