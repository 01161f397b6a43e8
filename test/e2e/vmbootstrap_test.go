//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// condition waits until a condition of a machine has a status, and says a text.
func (n *namespace) condition(name, kind, status, text string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s of %s to be %s", kind, name, status), func() error {
		got, err := n.tryField("vm/"+name, fmt.Sprintf(`.status.conditions[?(@.type==%q)]['status','reason','message']`, kind))
		if err != nil || !strings.HasPrefix(got, status) || !strings.Contains(got, text) {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// TestMachineCloudInit: cloud-init's configuration in the object, of the oldest version, and in a Secret. What is done once
// is done again for a new instance only; what is wrong is said before the start, what fails is said after it. The machine
// keeps its hardware address, and is ready when its probe is.
func TestMachineCloudInit(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(`
apiVersion: v1
kind: Secret
metadata: {name: inline}
stringData: {greeting: from a Secret}
---
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: box}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  powerOffMode: Hard
  network: {hostName: inline}
  readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 2}
  bootstrap:
    cloudInit:
      sshAuthorizedKeys: [ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFake ann@example.org]
      cloudConfig:
        write_files:
        - {path: /data/hello, content: "hello from {{ ds.meta_data.hostname }}"}
        - {path: /data/secret, content: {name: inline, key: greeting}}
        runcmd: ["echo once >>/data/runs"]
`)
	n.agent("box")
	n.condition("box", "GuestBootstrap", "True", "")
	equal(t, "what cloud-init has done", n.exec("box", "sh", "-c", "cd /data; for f in hello secret runs; do echo $(cat $f); done"), "hello from inline\nfrom a Secret\nonce")
	uuid := n.field("vm/box", ".spec.biosUUID")
	equal(t, "meta-data", n.seedFile("box", "meta-data"), "hostname: inline\ninstance-id: "+uuid+"\nlocal-hostname: inline\npublic-keys:\n- ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFake ann@example.org")
	mac := n.field("vm/box", ".status.network.interfaces[0].ip.macAddr")
	n.condition("box", "Ready", "False", "the readiness probe has not succeeded")
	n.exec("box", "sh", "-c", "setsid sh -c 'while :; do nc -l -p 8080; done' </dev/null >/dev/null 2>&1 &")
	n.condition("box", "Ready", "True", "")

	change := func(cloudInit string) {
		t.Helper()
		n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"bootstrap":{"cloudInit":`+cloudInit+`}}}`)
	}
	cycle := func() {
		t.Helper()
		n.exec("box", "sync")
		n.vm("stop", "box", "--hard")
		n.vm("start", "box")
		n.agent("box")
		n.guest("box", "status: done", "cloud-init", "status", "--wait")
		equal(t, "hardware address", n.exec("box", "cat", "/sys/class/net/eth0/address"), mac)
	}
	done := func(what, want string) {
		t.Helper()
		eventually(t, what, func() error {
			return n.execIs("box", want+"\n", "sh", "-c", "echo $(cat /data/runs) $(ls /data | grep new)")
		})
	}
	change(`{"cloudConfig":{"write_files":[{"path":"/data/new","content":"new"}],"runcmd":["echo again >>/data/runs"]}}`)
	cycle()
	done("what is done once, at the next start", "once")
	change(`{"instanceID":"second","waitOnNetwork4":true}`)
	cycle()
	contains(t, n.seedFile("box", "meta-data"), "instance-id: second\nlocal-hostname: inline\npublic-keys:\n- ssh-ed25519 ")
	contains(t, n.seedFile("box", "meta-data"), "wait-on-network:\n  ipv4: true\n  ipv6: false\n")
	done("what is done for another instance", "once again new")

	secret := func(text string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: raw}\nstringData: {user-data: %q}\n", text)
	}
	n.apply(secret("#cloud-config\nruncmd: [echo\n"))
	n.exec("box", "sync")
	n.vm("stop", "box", "--hard")
	change(`{"instanceID":"third","cloudConfig":null,"rawCloudConfig":{"name":"raw","key":"user-data"}}`)
	n.kubectl("patch", "vm", "box", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOn"}}`)
	n.condition("box", "VirtualMachineBootstrapReady", "False", `"user-data" of "raw"`)
	n.apply(secret("#cloud-config\nwrite_files: [{path: /proc/none/file, content: x}]\nruncmd: [echo raw >>/data/runs]\n"))
	n.condition("box", "VirtualMachineBootstrapReady", "True", "")
	n.condition("box", "GuestBootstrap", "False", "write_files[0]")
	done("what is done in spite of that", "once again raw new")
}

// seedFile reads a file of the disk that is made of the bootstrap of a machine.
func (n *namespace) seedFile(name, path string) string {
	n.t.Helper()
	return n.exec(name, "sh", "-c", "mkdir -p /run/look; grep -q /run/look /proc/mounts || mount -o ro /dev/sr0 /run/look; cat /run/look/"+path)
}

// address is a machine's first, once it has one.
func (n *namespace) address(name string) (address string) {
	n.t.Helper()
	eventually(n.t, "the address of "+name, func() error {
		var err error
		if address, err = n.tryField("vm/"+name, ".status.network.primaryIP4"); err == nil && address == "" {
			err = errors.New("it has none")
		}
		return err
	})
	return address
}

// TestMachineSeeds: what sysprep, vApp and linuxPrep make of machines of the oldest version and of the newest, as a guest
// sees it. Sysprep and vApp of the newest are in TestMachineAppliance.
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
apiVersion: vmoperator.vmware.com/v1alpha2
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
    linuxPrep: {timeZone: Europe/Sofia, hardwareClockIsUTC: true}
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
	for _, name := range []string{"sysprep", "vapp", "prep"} {
		n.agent(name)
	}
	unattend := n.seedFile("sysprep", "unattend.xml")
	for _, want := range []string{"<ComputerName>WIN1</ComputerName>", "A &amp; B", n.address("sysprep")} {
		contains(t, unattend, want)
	}
	equal(t, "both names of the file", n.seedFile("sysprep", "autounattend.xml"), unattend)
	address := n.address("vapp")
	env := n.seedFile("vapp", "ovf-env.xml")
	contains(t, env, `oe:key="hostname" oe:value="vapp"`)
	contains(t, env, `oe:key="address" oe:value="`+address+`"`)
	contains(t, n.seedFile("vapp", "user-data"), "timezone: Europe/Sofia")
	n.guest("prep", "prepared", "uname", "-n")
	user := n.seedFile("prep", "user-data")
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
