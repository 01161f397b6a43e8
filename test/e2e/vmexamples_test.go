//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// examples is the directory of the manifests that the documentation tells people to apply.
func examples() string {
	return filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "examples", "vm")
}

// exampleMachines is a namespace with the images that the examples name, all of them the tiny one, and with smaller classes.
func exampleMachines(t *testing.T, images ...string) *namespace {
	t.Helper()
	n := machines(t)
	image := tinyDisk()
	for _, name := range images {
		atollOK(t, "image", "import", image, "--name", name, "-n", n.name)
		n.imageOf(name)
	}
	// Every namespace has these classes; here they take less.
	for class, spec := range map[string]string{
		"best-effort-xsmall": `{"hardware":{"cpus":1,"memory":"192Mi"}}`,
		"best-effort-small":  `{"hardware":{"cpus":1,"memory":"192Mi"}}`,
		"guaranteed-small":   `{"hardware":{"cpus":1,"memory":"512Mi"},"policies":{"resources":{"requests":{"cpu":"100m","memory":"512Mi"},"limits":{"cpu":"1","memory":"512Mi"}}}}`,
	} {
		eventually(t, "class "+class, func() error {
			_, err := n.try("patch", "vmclass", class, "--type=merge", "-p", `{"spec":`+spec+`}`)
			return err
		})
	}
	return n
}

// applyExamples applies files of examples/vm.
func (n *namespace) applyExamples(names ...string) {
	n.t.Helper()
	for _, name := range names {
		n.kubectl("apply", "-f", filepath.Join(examples(), name+".yaml"))
	}
}

// TestMachineExamples: every file of examples/vm is taken, and those about one machine run, as far as a tiny guest can.
func TestMachineExamples(t *testing.T) {
	t.Parallel()
	n := exampleMachines(t, "debian-12", "windows")
	files, err := filepath.Glob(filepath.Join(examples(), "*.yaml"))
	if err != nil || len(files) < 18 {
		t.Fatalf("examples: %q, %v", files, err)
	}
	for _, file := range files {
		contains(t, n.kubectl("create", "--dry-run=server", "-f", file), "created (server dry run)")
	}
	n.applyExamples("minimal", "minimal-v1alpha2", "cloud-init-raw", "cloud-init", "linux-prep", "hardware", "class", "sysprep")
	n.aboutMinimal()
	n.power("minimal-v1alpha2", "PoweredOn")
	n.guest("cloud-init-raw", "hello from user data", "sh", "-c", "cat /tmp/hello /tmp/first-boot")
	n.kubectl("wait", "vm/cloud-init", "--for=condition=Ready", timeout(crowdPatience))
	n.condition("cloud-init", "GuestBootstrap", "True", "")
	equal(t, "what cloud-init has done", n.exec("cloud-init", "cat", "/etc/hello", "/etc/motd", "/run/first-boot"), "hello from inline.example.org\nkept in a Secret\n")
	n.guest("linux-prep", "postcustomization", "cat", "/var/log/customization")
	n.guest("linux-prep", "prepared", "uname", "-n")
	n.aboutHardware()
	n.condition("hardware", "Ready", "False", "the readiness probe has not succeeded")
	n.exec("hardware", "vmware-rpctool", "info-set guestinfo.state up")
	n.condition("hardware", "Ready", "True", "")
	equal(t, "processors of the class", n.field("vmclass/custom", ".spec.hardware.cpus"), "2")
	n.power("sysprep", "PoweredOff")
	n.exampleOfInstalling()
	n.nobodyWaits()
}

// TestMachineExamplesTogether: the examples of machines that belong together, and of what is put to a machine.
func TestMachineExamplesTogether(t *testing.T) {
	t.Parallel()
	n := exampleMachines(t)
	if err := bridge(t, "vm-lab0", "198.18.9.1/24"); err != nil { // the host may have the addresses of the example itself
		t.Fatal(err)
	}
	n.applyExamples("group", "service", "replicaset", "network", "volumes", "vapp")

	n.kubectl("wait", "vmg/shop", "--for=condition=Ready", timeout(crowdPatience))
	n.power("shop-app", "PoweredOn")
	began := n.time("vmg/shop", ".status.lastUpdatedPowerStateTime")
	if after := n.time("pod/shop-app", ".metadata.creationTimestamp").Sub(began); after < 9*time.Second { // of ten; the times are in whole seconds
		t.Errorf("the second machine of the group was started %s after the group", after)
	}

	n.kubectl("wait", "vm/web-0", "vm/web-1", "--for=condition=Ready", timeout(crowdPatience))
	service := "http://" + net.JoinHostPort(n.field("service/vmweb", ".spec.clusterIP"), "80") + "/"
	for _, who := range []string{"web-0", "web-1"} { // one after the other, as it happens
		eventually(t, "the VirtualMachineService to be answered by "+who, func() error { return get(t, service, "hello from "+who) })
	}

	n.kubectl("wait", "vmrs/workers", "--for=condition=VirtualMachinesReady", timeout(crowdPatience))
	equal(t, "replicas", n.field("vmrs/workers", ".status.readyReplicas"), "2")

	n.guest("network", "192.0.2.10/24", "ip", "addr", "show", "eth1")
	n.guest("network", "198.51.100.0/24 via 192.0.2.1", "ip", "route")

	n.agent("volumes")
	eventually(t, "the disks to be attached", func() error {
		return n.fieldIs("vm/volumes", ".status.volumes[*].attached", "true true true")
	})
	n.guest("volumes", fmt.Sprintln(512<<20/512), "cat", "/sys/block/nvme0n1/size")
	n.guest("volumes", fmt.Sprintf("%[1]d\n%[1]d\n", 1<<30/512), "sh", "-c", "cat /sys/block/sd*/size")

	n.agent("vapp")
	env := n.seedFile("vapp", "ovf-env.xml")
	for key, value := range map[string]string{"hostname": "vapp", "management_ip": n.address("vapp")} {
		contains(t, env, fmt.Sprintf("oe:key=%q oe:value=%q", key, value))
	}
	n.nobodyWaits()
}

// nobodyWaits for guests to shut down when the namespace goes.
func (n *namespace) nobodyWaits() {
	n.t.Helper()
	for vm := range strings.FieldsSeq(n.kubectl("get", "vm", "-o", "name")) {
		n.kubectl("patch", vm, "--type=merge", "-p", `{"spec":{"powerOffMode":"Hard"}}`)
	}
}

// aboutMinimal applies the examples about the machine of minimal.yaml.
func (n *namespace) aboutMinimal() {
	n.t.Helper()
	n.agent("minimal")
	n.applyExamples("snapshot", "publish", "web-console")
	n.kubectl("wait", "vmsnapshot/before-upgrade", "--for=condition=VirtualMachineSnapshotReady", timeout(crowdPatience))
	equal(n.t, "the snapshot is quiesced", n.field("vmsnapshot/before-upgrade", ".status.quiesced"), "true")
	n.shown("golden", "True")
	eventually(n.t, "the ticket for the screen", func() error {
		response, err := n.tryField("virtualmachinewebconsolerequest/minimal", ".status.response")
		if err == nil && response == "" {
			err = fmt.Errorf("there is none")
		}
		return err
	})
}

// aboutHardware: the guest of hardware.yaml has booted securely, and has what else the file says.
func (n *namespace) aboutHardware() {
	t := n.t
	t.Helper()
	n.agent("hardware")
	equal(t, "attributes and value of the variable", n.exec("hardware", "sh", "-c", "cd /sys/firmware/efi/efivars && mount -t efivarfs none . && xxd -p $PWD/SecureBoot-*"), "0600000001") // on
	equal(t, "UUID", strings.ToLower(n.exec("hardware", "cat", "/sys/class/dmi/id/product_uuid")), "6a746f6c-6c00-4000-8000-000000000042")
	equal(t, "MTU", n.exec("hardware", "cat", "/sys/class/net/eth0/mtu"), "1400")
	names := n.exec("hardware", "cat", "/etc/resolv.conf")
	contains(t, names, "nameserver 192.0.2.53")
	contains(t, names, "search example.org")
}

// exampleOfInstalling boots from a disc. It comes from here and not from the web server that the file names.
func (n *namespace) exampleOfInstalling() {
	t := n.t
	t.Helper()
	disc := bootableISO(t, "this is the installer")
	content, err := os.ReadFile(disc)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(examples(), "iso-install.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	const url = "http: {url: https://images.example.com/installer.iso}"
	contains(t, string(text), url)
	n.apply(strings.Replace(string(text), url, fmt.Sprintf("upload: {fileName: disc.iso, checksum: {algorithm: SHA256, value: %s}}", hex.EncodeToString(sum[:])), 1))
	eventually(t, "the machine to wait for its disc", func() error {
		if got, err := n.tryField("vm/iso-install", `.status.conditions[?(@.type=="VirtualMachineHardwareCDROMVerified")].message`); err != nil || !strings.Contains(got, "VirtualMachineImage vmi-c0a75ef17e958263c is not") {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
	atollOK(t, "image", "import", disc, "--item", "installer", "-n", n.name)
	n.logs("iso-install", "this is the installer")
}
