//go:build e2e && debian

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMachineDebian boots a Debian once, with the real cloud-init, qemu-guest-agent and sshd, under EFI with Secure Boot
// and a TPM, and does with it what needs those.
func TestMachineDebian(t *testing.T) {
	t.Parallel()
	image := filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "build", "vm", "debian-12.qcow2")
	if _, err := os.Stat(image); err != nil {
		t.Fatalf("%v; make test-debian builds it", err)
	}
	n := newNamespace(t)
	atollOK(t, "image", "import", image, "--name", "debian", "-n", n.name)
	key := filepath.Join(t.TempDir(), "key")
	if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: debian}
spec: {hardware: {cpus: 2, memory: 1Gi}}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: box}
spec:
  className: debian
  imageName: debian
  storageClass: atoll
  bootOptions: {firmware: efi, efiSecureBoot: Enabled}
  crypto: {vTPMMode: New}
  advanced: {bootDiskCapacity: 6Gi}
  network: {hostName: box, domainName: example.org}
  bootstrap:
    cloudInit:
      cloudConfig:
        timezone: Europe/Sofia
        users:
        - {name: ann, sudo: "ALL=(ALL) NOPASSWD:ALL", shell: /bin/bash, ssh_authorized_keys: [%q]}
        write_files: [{path: /etc/e2e, content: "{{ ds.meta_data.hostname }}\n", permissions: "0644"}]
        runcmd: [[sh, -c, "echo ran >>/etc/e2e"]]
`, strings.TrimSpace(string(public))))
	slow(t, 12*time.Minute, "cloud-init to be done", func() error {
		if got := n.field("vm/box", `.status.conditions[?(@.type=="GuestBootstrap")]['status','message']`); !strings.HasPrefix(got, "True") {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	equal(t, "what cloud-init wrote", n.exec("box", "cat", "/etc/e2e"), "box.example.org\nran")
	contains(t, n.exec("box", "cloud-init", "status", "--long"), "status: done")
	t.Logf("warnings of cloud-init: %s", n.exec("box", "sh", "-c", "grep -i warning /var/log/cloud-init.log || true"))
	contains(t, n.exec("box", "timedatectl", "show", "-p", "Timezone"), "Europe/Sofia")
	equal(t, "Secure Boot", n.exec("box", "sh", "-c", "od -An -tu1 -j4 /sys/firmware/efi/efivars/SecureBoot-*"), "1")
	contains(t, n.field("vm/box", ".status.crypto"), `"hasVTPM":true`)
	address := n.field("vm/box", ".status.network.primaryIP4")
	contains(t, n.exec("box", "ip", "addr"), address)
	equal(t, "guest of the status", n.field("vm/box", ".status.guest.guestFullName"), "Debian GNU/Linux 12 (bookworm)")

	ssh := exec.CommandContext(t.Context(), suite.atoll, "vm", "--data-dir", suite.dataDir, "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name,
		"ssh", "box", "--user", "ann", "-i", key, "--", "sudo", "uname", "-n")
	ssh.Env = append(os.Environ(), "HOME="+t.TempDir())
	if out, err := ssh.Output(); err != nil || strings.TrimSpace(string(out)) != "box" {
		t.Errorf("atoll vm ssh: %v\n%s", err, out)
	}

	n.exec("box", "sh", "-c", "echo frozen >/root/file") // and not synced
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineSnapshot
metadata: {name: quiet}
spec: {vmName: box, quiesce: {timeout: 2m}}
`)
	n.kubectl("wait", "vmsnapshot/quiet", "--for=condition=VirtualMachineSnapshotReady", timeout(crowdPatience))
	equal(t, "quiesced", n.field("vmsnapshot/quiet", ".status.quiesced"), "true")
	equal(t, "file systems after it", n.exec("box", "sh", "-c", "echo after >/root/file; sync; cat /root/file"), "after")
	n.vm("stop", "box")
	n.power("box", "PoweredOff")
}

// slow is eventually for what takes longer where guests are emulated.
func slow(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting for %s: %v", what, err)
		case <-time.After(2 * time.Second):
		}
	}
}
