//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/diskimage/ovf"
)

// bootCode is what a BIOS loads to 0:7c00: it prints the text at the serial port and stops.
func bootCode(text string) []byte {
	code := []byte{
		0x31, 0xc0, 0x8e, 0xd8, // ds = 0
		0xbe, 0x15, 0x7c, // si = text
		0xac, 0x84, 0xc0, 0x74, 0x06, // next character, until it is 0
		0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // to the first serial port
		0xf4, 0xeb, 0xfd, // stop
	}
	return append(code, text+"\r\n\x00"...)
}

// bootableISO is a CD-ROM without files that a BIOS boots (El Torito).
func bootableISO(t *testing.T, text string) string {
	t.Helper()
	const sector = 2048
	b := make([]byte, 21*sector)
	volume, record, catalog := b[16*sector:], b[17*sector:], b[19*sector:]
	copy(volume, "\x01CD001\x01")
	binary.LittleEndian.PutUint32(volume[80:], 21)
	binary.LittleEndian.PutUint16(volume[128:], sector)
	copy(record, "\x00CD001\x01EL TORITO SPECIFICATION")
	binary.LittleEndian.PutUint32(record[0x47:], 19)
	copy(b[18*sector:], "\xffCD001\x01")
	copy(catalog, "\x01")
	catalog[30], catalog[31] = 0x55, 0xaa
	binary.LittleEndian.PutUint16(catalog[28:], 0x55aa) // all words add up to 0
	catalog[32] = 0x88
	binary.LittleEndian.PutUint16(catalog[38:], 4)
	binary.LittleEndian.PutUint32(catalog[40:], 20)
	copy(b[20*sector:], bootCode(text))
	path := filepath.Join(t.TempDir(), "disc.iso")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// logs waits until a machine's serial console has printed a text.
func (n *namespace) logs(name, text string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s to print %q", name, text), func() error {
		out, err := n.try("logs", name)
		if err != nil || !strings.Contains(out, text) {
			return fmt.Errorf("it printed %q, %w", out, err)
		}
		return nil
	})
}

// guest waits until a command in a guest says a text: a guest that is busy, on a host that is, may not answer at once.
func (n *namespace) guest(name, text string, command ...string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%q in %s to say %q", strings.Join(command, " "), name, text), func() error {
		out, err := n.try(append([]string{"exec", name, "--"}, command...)...)
		if err != nil || !strings.Contains(out, text) {
			return fmt.Errorf("it says %q, %w", out, err)
		}
		return nil
	})
}

// longName has as many characters as a name may have.
const longName = "a-machine-with-a-name-of-as-many-characters-as-a-label-can-hold"

// bootableDisk is a disk that a BIOS boots.
func bootableDisk(t *testing.T, text string) string {
	t.Helper()
	b := make([]byte, 1<<20)
	copy(b, bootCode(text))
	b[510], b[511] = 0x55, 0xaa
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestMachineHardware: disks on all controllers, discs on two of them, a name of 63 characters; a machine whose virtual
// processor is pinned, and which boots from a disc, with the disc out from its disk, and in the order that it says.
func TestMachineHardware(t *testing.T) {
	t.Parallel()
	n := machines(t)
	if len(longName) != 63 {
		t.Fatalf("%d characters", len(longName))
	}
	atollOK(t, "image", "import", bootableISO(t, "booted from the disc"), "--name", "disc", "-n", n.name)
	atollOK(t, "image", "import", bootableDisk(t, "booted from the disk"), "--name", "installed", "-n", n.name)
	iso := n.imageOf("disc")
	n.apply(bootClaim("installed", "VirtualMachineImage/"+n.imageOf("installed"), "64Mi"))
	for _, name := range []string{"nvme", "scsi", "sata", "ide"} {
		n.apply(claim(name+"-of-the-machine-with-the-long-name-indeed", "atoll", ""))
	}
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: %[1]s}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  guestID: otherLinux64Guest
  powerOffMode: Hard
  volumes:
  - {name: nvme, controllerType: NVME, persistentVolumeClaim: {claimName: nvme-of-the-machine-with-the-long-name-indeed}}
  - {name: scsi, controllerType: SCSI, controllerBusNumber: 1, unitNumber: 3, persistentVolumeClaim: {claimName: scsi-of-the-machine-with-the-long-name-indeed}}
  - {name: sata, controllerType: SATA, controllerBusNumber: 1, persistentVolumeClaim: {claimName: sata-of-the-machine-with-the-long-name-indeed}}
  - {name: ide, controllerType: IDE, persistentVolumeClaim: {claimName: ide-of-the-machine-with-the-long-name-indeed}}
  hardware:
    cdrom: [{name: cd1, controllerType: IDE, controllerBusNumber: 1, unitNumber: 1, image: {kind: VirtualMachineImage, name: %[2]s}}]
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: pinned}
spec: {hardware: {cpus: 1, memory: 64Mi}, configSpec: {latencySensitivity: {level: high}}}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: install}
spec:
  className: pinned
  storageClass: atoll
  guestID: otherLinux64Guest
  powerOffMode: Hard
  volumes:
  - name: disk
    persistentVolumeClaim: {claimName: install-disk, instanceVolumeClaim: {storageClass: atoll, size: 64Mi}}
  - name: installed
    persistentVolumeClaim: {claimName: installed}
  restartMode: Hard
  bootOptions: {bootOrder: [{type: CDRom}, {type: Disk, name: installed}]} # a BIOS tries one disk only
  hardware:
    cdrom: [{name: cd1, image: {kind: VirtualMachineImage, name: %[2]s}}]
`, longName, iso))
	n.logs("install", "booted from the disc")
	contains(t, n.field("vm/install", ".status.hardware.controllers[*].type"), "SATA")
	n.pinned("install")
	n.ejected(iso)
	n.agent(longName)
	n.guest(longName, longName, "uname", "-n")
	n.guest(longName, fmt.Sprintln(64<<20/512), "cat", "/sys/block/nvme0n1/size")
	n.guest(longName, ":0:3", "sh", "-c", "cd /sys/class/scsi_disk; ls -d *") // bus 1, unit 3
	// The tiny guest's kernel has no driver for these; it sees the controllers. IDE is on the chipset's own.
	n.guest(longName, "AHCI 2", "sh", "-c", "echo AHCI $(grep -l 0x010601 /sys/bus/pci/devices/*/class | wc -l)")
	eventually(t, "all volumes to be attached", func() error {
		return n.fieldIs("vm/"+longName, ".status.volumes[*].attached", "true true true true true")
	})
	contains(t, n.field("vm/"+longName, ".status.hardware.controllers"), `"type":"CDROM"`)
	if out := n.kubectl("get", "pods", "-l", "vmoperator.vmware.com/vm-name="+longName, "-o", "name"); strings.TrimSpace(out) != "pod/"+longName {
		t.Errorf("pods of the long name: %q", out)
	}
	n.kept(longName)
}

// kept: a machine's memory is in a snapshot, whose name is made of its own, and survives its being suspended. The state of NVMe
// disks cannot be saved, so that one goes before.
func (n *namespace) kept(name string) {
	t := n.t
	t.Helper()
	n.kubectl("patch", "vm", name, "--type=json", "-p", `[{"op": "test", "path": "/spec/volumes/0/name", "value": "nvme"}, {"op": "remove", "path": "/spec/volumes/0"}]`)
	n.guest(name, "gone", "sh", "-c", "test -e /sys/block/nvme0n1 || echo gone")
	alive := func(after string) {
		t.Helper()
		n.agent(name)
		equal(t, "memory after "+after, n.exec(name, "cat", "/tmp/memory"), "alive")
	}
	n.exec(name, "sh", "-c", "echo alive >/tmp/memory")
	contains(t, n.vm("snapshot", name, "--memory"), " of "+name+" is taken")
	n.exec(name, "sh", "-c", "echo dead >/tmp/memory")
	n.vm("revert", name, n.kubectl("get", "vmsnapshot", "-o", "jsonpath={.items[*].metadata.name}"))
	alive("going back")
	n.vm("suspend", name)
	n.power(name, "Suspended")
	n.vm("start", name)
	alive("suspension")
}

// pinned wants each virtual processor of a machine on one processor of the host, and the rest of its QEMU on all of them.
func (n *namespace) pinned(name string) {
	t := n.t
	t.Helper()
	pids := pidsMatching(t, "qemu-system.*"+n.field("vm/"+name, ".status.biosUUID"))
	if len(pids) != 1 {
		t.Fatalf("processes of %s: %v", name, pids)
	}
	one := 0
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		_, rest, _ := strings.Cut(string(text), "Cpus_allowed_list:")
		list, _, _ := strings.Cut(rest, "\n")
		if !strings.ContainsAny(list, "-,") {
			one++
		}
	}
	if want := 1; one != want && runtime.NumCPU() > 1 || len(tasks) < 2 {
		t.Errorf("%d of %d threads may run on one processor only, want %d", one, len(tasks), want)
	}
}

// ejected has the machine install boot from its disk when there is no disc in its drive, from the disc when it is back, and
// from the disk when that comes first.
func (n *namespace) ejected(iso string) {
	t := n.t
	t.Helper()
	said := func(text string, times int) {
		t.Helper()
		eventually(t, fmt.Sprintf("install to print %q %d times", text, times), func() error {
			if out, err := n.try("logs", "install"); err != nil || strings.Count(out, text) < times {
				return fmt.Errorf("it printed %q, %w", out, err)
			}
			return nil
		})
	}
	drive := func(connected bool) {
		t.Helper()
		n.kubectl("patch", "vm", "install", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"hardware":{"cdrom":[{"name":"cd1","connected":%t,"image":{"kind":"VirtualMachineImage","name":%q}}]}}}`, connected, iso))
		eventually(t, "the drive to be changed", func() error {
			if revision, err := n.tryField("pod/install", `.metadata.annotations.atoll\.dev/machine`); err != nil || strings.Contains(revision, `"name":"cdrom-cd1","volume":`) != connected {
				return fmt.Errorf("the machine is %s", revision)
			}
			return nil
		})
		n.kubectl("patch", "vm", "install", "--type=merge", "-p", `{"spec":{"nextRestartTime":"now"}}`)
	}
	drive(false)
	said("booted from the disk", 1)
	drive(true)
	said("booted from the disc", 2)
	n.vm("stop", "install", "--hard")
	n.kubectl("patch", "vm", "install", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOn","bootOptions":{"bootOrder":[{"type":"Disk","name":"installed"},{"type":"CDRom"}]}}}`)
	eventually(t, "the machine to boot from the disk and no disc", func() error { // at first the log may still be that of the pod before
		out, err := n.try("logs", "install")
		if err != nil || !strings.Contains(out, "booted from the disk") || strings.Contains(out, "from the disc") {
			return fmt.Errorf("it printed %q, %w", out, err)
		}
		return nil
	})
}

// TestMachineAppliance: an OVA of two disks becomes a machine with both, its firmware and its vApp properties, which come with
// an answer file of sysprep. Both disks are in its snapshots, as of one moment while the guest writes, and go back with them; a
// disk that is independent is not, and one that is not persistent has forgotten all.
func TestMachineAppliance(t *testing.T) {
	t.Parallel()
	n := machines(t)
	atollOK(t, "image", "import", applianceOVA(t), "--name", "app", "-n", n.name)
	equal(t, "firmware of the image", n.field("vmi/"+n.imageOf("app"), ".status.firmware"), "efi")
	n.apply(claim("apart", "atoll", "") + "---" + claim("scratch", "atoll", "") + `
---
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData: {password: Changeme-1}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: efi}
spec: {hardware: {cpus: 1, memory: 384Mi}}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: box}
spec:
  className: efi
  imageName: app
  storageClass: atoll
  powerOffMode: Hard
  network: {hostName: win2}
  volumes:
  - {name: apart, diskMode: IndependentPersistent, persistentVolumeClaim: {claimName: apart}}
  - {name: scratch, diskMode: NonPersistent, persistentVolumeClaim: {claimName: scratch}}
  bootstrap:
    sysprep: {sysprep: {guiUnattended: {timeZone: 110, password: {name: secret, key: password}}, userData: {fullName: Ann, orgName: Example}}}
    vAppConfig: {properties: [{key: admin, value: {value: "of {{ .V1alpha5.VM.Name }}"}}]}
`)
	n.agent("box")
	equal(t, "disks in the spec", n.field("vm/box", ".spec.volumes[*].name"), "apart scratch image-disk-1")
	n.exec("box", "test", "-d", "/sys/firmware/efi")
	unattend := n.seedFile("box", "unattend.xml")
	contains(t, unattend, "<ComputerName>WIN2</ComputerName>")
	contains(t, unattend, n.field("vm/box", ".status.network.primaryIP4"))
	environment := n.seedFile("box", "ovf-env.xml")
	contains(t, environment, `oe:key="site" oe:value="Sofia"`) // as the appliance says
	contains(t, environment, `oe:key="admin" oe:value="of box"`)

	n.snapshotOfBoth()
	n.vm("delete", "box")
	eventually(t, "both disks to go with the machine", func() error {
		return n.lists("apart scratch", "pvc", "-o", "jsonpath={.items[*].metadata.name}")
	})
}

// snapshotOfBoth takes a snapshot of the machine box while its guest counts on two disks, and goes back to it.
func (n *namespace) snapshotOfBoth() {
	t := n.t
	t.Helper()
	second := n.device("box", "image-disk-1")
	equal(t, "the second disk", n.exec("box", "head", "-c", "4", second), "AAAA")
	others := func(text string) {
		t.Helper()
		n.exec("box", "sh", "-c", fmt.Sprintf("for d in %s %s; do echo %s | dd of=$d bs=512 conv=sync,fsync 2>/dev/null; done", n.device("box", "apart"), n.device("box", "scratch"), text))
	}
	count := func() (first, later int) {
		t.Helper()
		out := n.exec("box", "sh", "-c", "mkdir -p /run/second; grep -q /run/second /proc/mounts || mount -t ext4 -o sync "+n.device("box", "image-disk-1")+" /run/second; cat /run/second/count /data/count")
		if _, err := fmt.Sscan(out, &first, &later); err != nil {
			t.Fatalf("the counters are %q: %v", out, err)
		}
		return first, later
	}
	others("before")
	// Each number is on the second disk before it is on the first. The shell writes by itself, so they are many.
	n.exec("box", "sh", "-c", "set -e; mke2fs "+second+"; mkdir /run/second; mount -t ext4 -o sync "+second+" /run/second; mount -o remount,sync /data; touch /run/counting; echo 0 >/run/second/count; echo 0 >/data/count")
	n.exec("box", "sh", "-c", "setsid sh -c 'i=0; while [ -e /run/counting ]; do i=$((i+1)); for f in /run/second /data; do echo $i 1<>$f/count; done; done; touch /run/counted' </dev/null >/dev/null 2>&1 &")
	n.guest("box", "yes", "sh", "-c", "[ $(cat /data/count) -lt 100 ] || echo yes")
	_, before := count()
	n.vm("snapshot", "box", "--name", "both")
	equal(t, "snapshots of volumes", n.kubectl("get", "volumesnapshot", "-o", "jsonpath={.items[*].status.readyToUse}"), "true true")
	after, _ := count()
	n.exec("box", "rm", "/run/counting")
	n.guest("box", "counted", "ls", "/run")
	others("after")
	n.vm("revert", "box", "both", "--start")
	n.agent("box")
	first, later := count()
	if t.Logf("counted to %d, snapshot, %d; back at %d and %d", before, after, first, later); later < before || first > after || first != later && first != later+1 {
		t.Error("that is not one moment of both disks")
	}
	equal(t, "the independent disk", n.exec("box", "head", "-n", "1", n.device("box", "apart")), "after")
	equal(t, "the disk that is not persistent", n.exec("box", "sh", "-c", "head -c 512 "+n.device("box", "scratch")+" | tr -d '\\000'"), "")
}

// device is the disk of a volume, as the guest of a machine calls it.
func (n *namespace) device(name, volume string) string {
	n.t.Helper()
	var device string
	eventually(n.t, "the guest to have the disk of "+volume, func() error {
		serial, err := n.tryField("vm/"+name, `.status.volumes[?(@.name=="`+volume+`")].diskUUID`)
		if err != nil {
			return err
		}
		serial = strings.ReplaceAll(serial, "-", "")
		out, err := n.tryExec(name, "sh", "-c", "cd /sys/block; for d in sd?; do [ \"$(tail -c +5 $d/device/vpd_pg80)\" != \""+serial+"\" ] || echo /dev/$d; done")
		if device = strings.TrimSpace(out); device == "" || serial == "" {
			return fmt.Errorf("there is none with the serial number %q, %w", serial, err)
		}
		return nil
	})
	return device
}

// applianceOVA is the tiny machine with a second disk, which starts with AAAA, and vApp properties.
func applianceOVA(t *testing.T) string {
	t.Helper()
	tiny := tinyDisk()
	dir := t.TempDir()
	second := filepath.Join(dir, "second.qcow2")
	for _, command := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", second, "48M"},
		{"qemu-io", "-f", "qcow2", "-c", "write -q -P 65 0 4k", second},
		{"qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", tiny, filepath.Join(dir, "one.vmdk")},
		{"qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", second, filepath.Join(dir, "two.vmdk")},
	} {
		if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	appliance := ovf.Machine{Name: "app", CPUs: 1, Memory: 192 << 20, Firmware: "efi", NICs: 1, Properties: []ovf.Property{
		{Key: "site", Default: "Sofia", HasDefault: true, UserConfigurable: true}, {Key: "admin", Default: "nobody", HasDefault: true, UserConfigurable: true},
	}}
	files := map[string][]byte{}
	for _, name := range []string{"one.vmdk", "two.vmdk"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = b
		appliance.Disks = append(appliance.Disks, ovf.MachineDisk{File: name, Bytes: int64(len(b)), Capacity: capacity(t, filepath.Join(dir, name))})
	}
	var descriptor, archive bytes.Buffer
	if err := ovf.Write(&descriptor, appliance); err != nil {
		t.Fatal(err)
	}
	files["app.ovf"] = descriptor.Bytes()
	w := tar.NewWriter(&archive)
	for _, name := range []string{"app.ovf", "one.vmdk", "two.vmdk"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "app.ova")
	if err := os.WriteFile(path, archive.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// capacity is the size of the disk in an image.
func capacity(t *testing.T, path string) int64 {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "qemu-img", "info", "--output=json", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		t.Fatal(err)
	}
	return info.Size
}
