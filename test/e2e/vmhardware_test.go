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

// TestMachineHardware: disks on all controllers, discs on two of them, a name of 63 characters, and a machine that boots
// from a disc since it has nothing else.
func TestMachineHardware(t *testing.T) {
	t.Parallel()
	n := machines(t)
	if len(longName) != 63 {
		t.Fatalf("%d characters", len(longName))
	}
	atollOK(t, "image", "import", bootableISO(t, "booted from the disc"), "--name", "disc", "-n", n.name)
	iso := n.imageOf("disc")
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
kind: VirtualMachine
metadata: {name: install}
spec:
  className: tiny
  storageClass: atoll
  guestID: otherLinux64Guest
  powerOffMode: Hard
  volumes:
  - name: disk
    persistentVolumeClaim: {claimName: install-disk, instanceVolumeClaim: {storageClass: atoll, size: 64Mi}}
  hardware:
    cdrom: [{name: cd1, image: {kind: VirtualMachineImage, name: %[2]s}}]
`, longName, iso))
	n.logs("install", "booted from the disc")
	contains(t, n.field("vm/install", ".status.hardware.controllers[*].type"), "SATA")
	n.agent(longName)
	n.guest(longName, longName, "uname", "-n")
	n.guest(longName, fmt.Sprintln(64<<20/512), "cat", "/sys/block/nvme0n1/size")
	n.guest(longName, ":0:3", "sh", "-c", "cd /sys/class/scsi_disk; ls -d *") // bus 1, unit 3
	// The tiny guest's kernel has no driver for these; it sees the controllers. IDE is on the chipset's own.
	n.guest(longName, "AHCI 2", "sh", "-c", "echo AHCI $(grep -l 0x010601 /sys/bus/pci/devices/*/class | wc -l)")
	eventually(t, "all volumes to be attached", func() error {
		return is(n.field("vm/"+longName, ".status.volumes[*].attached"), "true true true true true")
	})
	contains(t, n.field("vm/"+longName, ".status.hardware.controllers"), `"type":"CDROM"`)
	if out := n.kubectl("get", "pods", "-l", "vmoperator.vmware.com/vm-name="+longName, "-o", "name"); strings.TrimSpace(out) != "pod/"+longName {
		t.Errorf("pods of the long name: %q", out)
	}
}

// TestMachineAppliance: an OVA of two disks becomes a machine with both, which are in its snapshots.
func TestMachineAppliance(t *testing.T) {
	t.Parallel()
	n := machines(t)
	tiny := filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "build", "vm", "tiny.qcow2")
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
	appliance := ovf.Machine{Name: "app", CPUs: 1, Memory: 192 << 20, Firmware: "bios", NICs: 1}
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
	atollOK(t, "image", "import", path, "--name", "app", "-n", n.name)
	n.vm("create", "box", "--image", "app", "--class", "tiny", "--no-bootstrap")
	n.agent("box")
	equal(t, "disks in the spec", n.field("vm/box", ".spec.volumes[*].name"), "image-disk-1")
	// The guest names disks in the order in which they answer.
	second = strings.TrimSpace(n.exec("box", "sh", "-c", fmt.Sprintf("cd /sys/block; for d in sd?; do [ $(cat $d/size) != %d ] || echo /dev/$d; done", 48<<20/512)))
	equal(t, "the second disk", n.exec("box", "head", "-c", "4", second), "AAAA")
	n.exec("box", "sh", "-c", "echo mine | dd of="+second+" bs=512 conv=sync,fsync 2>/dev/null")
	n.vm("snapshot", "box", "--name", "both")
	equal(t, "snapshots of volumes", n.kubectl("get", "volumesnapshot", "-o", "jsonpath={.items[*].status.readyToUse}"), "true true")
	n.vm("delete", "box")
	eventually(t, "both disks to go with the machine", func() error { return is(n.kubectl("get", "pvc", "-o", "name"), "") })
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

// TestMachineSeeds: what sysprep, vApp and linuxPrep make, as a guest sees it.
func TestMachineSeeds(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(`
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData:
  password: Changeme-1
  script: "#!/bin/sh\necho $1 >>/run/customization\n"
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: sysprep}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  powerOffMode: Hard
  network: {hostName: win1}
  bootstrap: {sysprep: {sysprep: {guiUnattended: {timeZone: 110, password: {name: secret, key: password}}, userData: {fullName: "A & B", orgName: Example}}}}
---
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: vapp}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  powerOffMode: Hard
  bootstrap:
    vAppConfig:
      properties:
      - {key: hostname, value: {value: "{{ .V1alpha2.VM.Name }}"}}
      - {key: address, value: {value: "{{ V1alpha2_FormatIP V1alpha2_FirstIP \"\" }}"}}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: prep}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  powerOffMode: Hard
  network: {hostName: prepared}
  bootstrap: {linuxPrep: {timeZone: Europe/Sofia, password: {name: secret}, scriptText: {from: {name: secret, key: script}}}}
`)
	file := func(name, path string) string {
		t.Helper()
		return n.exec(name, "sh", "-c", "mkdir -p /run/look; grep -q /run/look /proc/mounts || mount -o ro /dev/sr0 /run/look; cat /run/look/"+path)
	}
	for _, name := range []string{"sysprep", "vapp", "prep"} {
		n.agent(name)
	}
	unattend := file("sysprep", "unattend.xml")
	for _, want := range []string{"<ComputerName>WIN1</ComputerName>", "A &amp; B", n.field("vm/sysprep", ".status.network.primaryIP4")} {
		contains(t, unattend, want)
	}
	equal(t, "both names of the file", file("sysprep", "autounattend.xml"), unattend)
	address := n.field("vm/vapp", ".status.network.primaryIP4")
	env := file("vapp", "ovf-env.xml")
	contains(t, env, `oe:key="hostname" oe:value="vapp"`)
	contains(t, env, `oe:key="address" oe:value="`+address+`"`)
	n.guest("prep", "prepared", "uname", "-n")
	user := file("prep", "user-data")
	contains(t, user, "timezone: Europe/Sofia")
	contains(t, user, "name: root")
	eventually(t, "the script to have run after the rest", func() error {
		out, _ := n.try("exec", "prep", "--", "cat", "/run/customization")
		if !strings.Contains(out, "postcustomization") {
			return fmt.Errorf("it has run with %q", out)
		}
		return nil
	})
}
