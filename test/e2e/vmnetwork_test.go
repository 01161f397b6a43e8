//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
)

// bridge makes a bridge of this host, with an address.
func bridge(t *testing.T, name, address string, options ...string) error {
	t.Helper()
	commands := [][]string{append([]string{"ip", "link", "add", name, "type", "bridge"}, options...), {"ip", "addr", "add", address, "dev", name}, {"ip", "link", "set", name, "up"}}
	for _, c := range commands {
		if out, err := exec.CommandContext(t.Context(), c[0], c[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", c, err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", name).Run() })
	return nil
}

// TestMachineNetworks: the first interface has the pod's address, by DHCP as well; a second interface is on a bridge of the host, in a VLAN where the kernel can do that; what cannot
// be is said in a condition. The default Network of the namespace is the one that VMware's clients look for.
func TestMachineNetworks(t *testing.T) {
	t.Parallel()
	n := machines(t)
	const lan = "e2e-lan0"
	noVLANs := bridge(t, lan, "198.18.7.1/24", "vlan_filtering", "1")
	if noVLANs != nil {
		_ = exec.CommandContext(t.Context(), "ip", "link", "del", lan).Run()
		if err := bridge(t, lan, "198.18.7.1/24"); err != nil {
			t.Fatal(err)
		}
	}
	var primary string
	eventually(t, "the default Network", func() error {
		var err error
		if primary, err = n.try("get", "networks.netoperator.vmware.com", "-l", "capv.vmware.com/is-default-network=true", "-o", "jsonpath={.items[*].metadata.name}"); err == nil && primary == "" {
			err = fmt.Errorf("there is none")
		}
		return err
	})
	network := func(name, spec string) string {
		return fmt.Sprintf("---\napiVersion: netoperator.vmware.com/v1alpha1\nkind: Network\nmetadata: {name: %s}\nspec: {%s}\n", name, spec)
	}
	n.apply(network("lan", "type: bridge, bridge: {name: "+lan+"}") + network("gone", "type: bridge, bridge: {name: e2e-none0}") + network("tagged", "type: vsphere-distributed, bridge: {name: "+lan+", vlan: 42}"))
	machine := func(name, second, rest string) string {
		return fmt.Sprintf(`---
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  powerOffMode: Hard
  network:
    interfaces:
    - {name: eth0, network: {apiVersion: netoperator.vmware.com/v1alpha1, kind: Network, name: %[2]s}}
    - {name: eth1, network: {kind: Network, name: %[3]s}%[4]s}
`, name, primary, second, rest)
	}
	n.apply(machine("box", "lan", ", addresses: [198.18.7.10/24]") + machine("lost", "gone", "") + machine("other", "unknown", ""))
	n.agent("box")
	// Who asks by DHCP gets the address of the pod, from the host beside it.
	var ip string
	eventually(t, "the address of the pod", func() (err error) {
		if ip, err = n.tryField("pod/box", ".status.podIP"); err == nil && ip == "" {
			err = errors.New("it has none")
		}
		return err
	})
	n.guest("box", "lease of "+ip+" obtained", "sh", "-c", "udhcpc -i eth0 -n -q -s /etc/udhcpc.sh 2>&1")
	eventually(t, "the guest to answer on the bridge", func() error { return get(t, "http://198.18.7.10/", "hello from box") })
	contains(t, n.exec("box", "ip", "addr", "show", "eth1"), "198.18.7.10/24")
	eventually(t, "the status to have what the agent says of eth1", func() error {
		got, err := n.tryField("vm/box", `.status.network.interfaces[?(@.name=="eth1")].ip.addresses[*].address`)
		if err == nil && !strings.Contains(got, "198.18.7.10/24") {
			err = fmt.Errorf("it has %q", got)
		}
		return err
	})
	equal(t, "networks of its interfaces", sortedWords(n.kubectl("get", "networkinterfaces.netoperator.vmware.com", "-l", "vmoperator.vmware.com/vm-name=box", "-o", "jsonpath={.items[*].spec.networkName}")), "lan "+primary)
	says := func(name, text string) {
		t.Helper()
		eventually(t, name+" to say "+text, func() error {
			if got, err := n.try("get", "vm", name, "-o", "jsonpath={.status.conditions[*].message}"); err != nil || !strings.Contains(got, text) {
				return fmt.Errorf("it says %s", got)
			}
			return nil
		})
	}
	says("lost", "e2e-none0")
	says("other", "Network unknown does not exist")

	// A port that belongs to the host is served at an address of its own, as the control plane of a guest cluster wants it.
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineService
metadata: {name: control, annotations: {netoperator.vmware.com/network-name: primary}}
spec: {type: LoadBalancer, ports: [{name: apiserver, port: 6443, protocol: TCP, targetPort: 80}], selector: {app: box}}
`)
	eventually(t, "the service to answer at port 6443", func() error {
		address, err := n.tryField("vmservice/control", ".status.loadBalancer.ingress[0].ip")
		if err != nil || address == "" {
			why, _ := n.tryField("vmservice/control", `.metadata.annotations.atoll\.dev/problem`)
			return fmt.Errorf("no address: %s", why)
		}
		return get(t, "http://"+net.JoinHostPort(address, "6443")+"/", "hello from box")
	})

	n.apply(machine("tagged", "tagged", ", addresses: [198.18.8.10/24]"))
	if noVLANs != nil {
		t.Logf("this kernel has no bridges with VLANs, so only the refusal is tested: %v", noVLANs)
		says("tagged", "vlan_filtering")
		return
	}
	n.agent("tagged")
	out, err := exec.CommandContext(t.Context(), "bridge", "vlan", "show").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "42 PVID") {
		t.Errorf("VLANs of the bridge: %v\n%s", err, out)
	}
	if _, err := n.try("exec", "tagged", "--", "ping", "-c1", "-W2", "198.18.7.10"); err == nil {
		t.Error("the VLAN is not apart")
	}
}

func sortedWords(text string) string {
	words := strings.Fields(text)
	if len(words) == 2 && words[0] > words[1] {
		words[0], words[1] = words[1], words[0]
	}
	return strings.Join(words, " ")
}

// TestMachineGroupPublish: a group becomes images, one of each member. One of the members has an encrypted boot disk.
func TestMachineGroupPublish(t *testing.T) {
	t.Parallel()
	n := machines(t)
	provider := n.name + "-keys"
	t.Cleanup(func() { _, _ = kubectl(context.Background(), "", "delete", "secret", provider, "-n", "atoll-keys") })
	run(t, "", "create", "secret", "generic", provider, "-n", "atoll-keys", "--from-literal=first="+strings.Repeat("1", 32))
	n.apply(fmt.Sprintf(`
apiVersion: encryption.vmware.com/v1alpha1
kind: EncryptionClass
metadata: {name: gold}
spec: {keyProvider: %s, keyID: first}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineGroup
metadata: {name: app}
spec: {powerState: PoweredOn, bootOrder: [{members: [{name: plain}, {name: secret}]}]}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: plain}
spec: {groupName: app, className: tiny, imageName: tiny, storageClass: atoll, powerOffMode: Hard}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: secret}
spec: {groupName: app, className: tiny, imageName: tiny, storageClass: atoll, powerOffMode: Hard, crypto: {encryptionClassName: gold}}
`, provider))
	n.agent("secret")
	n.exec("secret", "sh", "-c", "echo hidden >/data/file; sync")
	eventually(t, "the boot disk to be known as encrypted", func() error {
		return n.fieldIs("vm/secret", ".status.crypto.encrypted", `["Disks"]`)
	})
	claim := strings.TrimSpace(n.kubectl("get", "pvc", "-l", "vmoperator.vmware.com/vm-name=secret", "-o", "jsonpath={.items[0].metadata.name}"))
	contains(t, atollOK(t, "volume", "ls", "--datastore", "default", "-o", "wide"), provider+"/first")
	equal(t, "key of the claim", n.field("pvc/"+claim, `.metadata.annotations.csi\.vsphere\.encryption-class`), "gold")
	n.agent("plain")
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineGroupPublishRequest
metadata: {name: app}
spec: {source: app, target: default}
`)
	n.kubectl("wait", "virtualmachinegrouppublishrequest/app", "--for=condition=Complete", timeout(crowdPatience))
	images := n.kubectl("get", "virtualmachinegrouppublishrequest/app", "-o", "jsonpath={.status.images[*].imageName}")
	if len(strings.Fields(images)) != 2 {
		t.Errorf("images: %q", images)
	}
	contains(t, n.kubectl("get", "vmi"), strings.Fields(images)[0])
}
