//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestAttackMachines: an owner of another namespace does nothing with a virtual machine, its consoles, its disks and its
// snapshots, and who may only look does nothing but that. What is refused is possible for whoever has the role Edit.
func TestAttackMachines(t *testing.T) {
	t.Parallel()
	m, v := two(t, "")
	v.equip()
	v.editor.apply(v.name, strings.Replace(machine("server", "tiny"), "spec: {", "spec: {volumes: [{name: data, persistentVolumeClaim: {claimName: data}}], ", 1)+"---"+claim("data", "atoll", ""))
	v.agent("server")
	boot := v.exec("server", "cat", "/proc/sys/kernel/random/boot_id")
	m.owner.attempt(v.reads(m.owner))
	m.owner.attempt(v.acts(m.owner))
	m.owner.commands(v, "ls", "console", "stop")
	v.viewer.attempt(v.acts(v.viewer))
	v.viewer.commands(v, "stop --hard", "restart", "console", "snapshot --name mine", "publish --item mine")
	for what, a := range v.reads(v.viewer) {
		if out, err := v.viewer.try("", a.args...); err != nil {
			t.Errorf("%s: a viewer could not: %v\n%s", what, err, out)
		}
	}
	equal(t, "boots of the machine", v.exec("server", "cat", "/proc/sys/kernel/random/boot_id"), boot)
	equal(t, "its power state", v.field("vm/server", ".spec.powerState"), "PoweredOn")
	equal(t, "objects that were made", v.kubectl("get", "vmsnapshot,volumesnapshot,vmpub,virtualmachinewebconsolerequests,vmservice", "-o", "name"), "")
	equal(t, "claims", v.kubectl("get", "pvc", "data", "-o", "jsonpath={.spec.resources.requests.storage}"), "64Mi")

	// The same by who may.
	administrator := newActor(t, v.name+"-administrator", "administrators")
	may := []*actor{v.editor, v.owner, administrator}
	for _, p := range may {
		equal(t, "exec as "+p.name, p.exec(v.name, "server", "cat", "/proc/sys/kernel/random/boot_id"), boot)
		v.allowed(p)
		if out, err := p.atoll("", "vm", "-n", v.name, "snapshot", "server", "--name", p.name); err != nil {
			t.Error(err, out)
		}
	}
	for i, p := range may {
		v.changeBy(p, fmt.Sprintf("%dMi", 65+i))
	}
	for _, p := range may {
		v.renewBy(p)
	}
}

// exec runs a command in a machine as this person. What did not get to the guest agent is sent again.
func (p *actor) exec(namespace, machine string, command ...string) (out string) {
	p.t.Helper()
	eventually(p.t, "a command of "+p.name+" to get to "+machine, func() (err error) {
		out, err = p.try("", append([]string{"-n", namespace, "exec", machine, "--"}, command...)...)
		if undelivered(out) {
			return err
		}
		if err != nil {
			p.t.Fatalf("as %s: %v", p.name, err)
		}
		return nil
	})
	return out
}

// allowed asks for what others may not, by somebody who may; nothing changes.
func (n *tenant) allowed(p *actor) {
	n.t.Helper()
	for what, a := range n.acts(p) {
		switch args := strings.Join(a.args, " "); {
		case strings.Contains(args, " create -f "):
			p.kubectl(append(a.args, "--dry-run=server")...)
		case strings.Contains(args, " get --raw "): // it is not asked for as a stream, which is another error
			if out, err := p.try("", a.args...); err == nil || strings.Contains(out, "orbidden") {
				n.t.Errorf("%s as %s: %v\n%s", what, p.name, err, out)
			}
		}
	}
}

// changeBy has somebody start the machine server, if it is off, and stop it, label it and grow its claim.
func (n *tenant) changeBy(p *actor, size string) {
	n.t.Helper()
	power := func(command, want string, flags ...string) {
		n.t.Helper()
		if out, err := p.atoll("", append([]string{"vm", "-n", n.name, command, "server"}, flags...)...); err != nil {
			n.t.Errorf("%s as %s: %v\n%s", command, p.name, err, out)
		}
		n.power("server", want)
	}
	if n.field("vm/server", ".status.powerState") == "PoweredOff" {
		power("start", "PoweredOn", "--no-wait")
	}
	power("stop", "PoweredOff", "--hard")
	acts := n.acts(p)
	label, growth := acts["label"].args, acts["growth"].args
	label[len(label)-1] = "app=" + p.name
	p.kubectl(append(label, "--overwrite")...)
	equal(n.t, "the label by "+p.name, n.field("vm/server", ".metadata.labels.app"), p.name)
	growth[len(growth)-1] = strings.Replace(growth[len(growth)-1], "1Gi", size, 1)
	p.kubectl(growth...)
	equal(n.t, "growth by "+p.name, n.field("pvc/data", ".spec.resources.requests.storage"), size)
}

// renewBy has somebody delete the machine server and its claim, and make them again.
func (n *tenant) renewBy(p *actor) {
	n.t.Helper()
	acts := n.acts(p)
	for _, object := range []string{"delete", "drop a claim"} {
		p.kubectl(append(acts[object].args, timeout(longPatience))...)
	}
	eventually(n.t, "nothing to be left of them", func() error { return n.lists("", "vm,pvc", "-o", "name") })
	p.apply(n.name, strings.Replace(machine("server", "tiny"), "spec: {", "spec: {powerState: PoweredOff, ", 1)+"---"+claim("data", "atoll", ""))
	n.power("server", "PoweredOff")
}

// reads are what a viewer may do with the machine server and its claim.
func (n *tenant) reads(p *actor) map[string]attack {
	get := func(what ...string) attack {
		return attack{args: append([]string{"-n", n.name, "get"}, what...), wants: []string{"orbidden", "sso:" + p.name + "@atoll.local"}}
	}
	return map[string]attack{
		"the machine":   get("vm", "server", "-o", "yaml"),
		"machines":      get("virtualmachines"),
		"classes":       get("virtualmachineclasses"),
		"images":        get("virtualmachineimages"),
		"snapshots":     get("vmsnapshot"),
		"published":     get("vmpub"),
		"claims":        get("pvc", "data"),
		"its pod":       get("pod", "server"),
		"what it wrote": {args: []string{"-n", n.name, "logs", "server", "--tail=1"}, wants: get().wants},
	}
}

// acts are what a viewer may not do with them, nor a stranger.
func (n *tenant) acts(p *actor) map[string]attack {
	in := func(args ...string) attack {
		return attack{args: append([]string{"-n", n.name}, args...), wants: []string{"orbidden", "sso:" + p.name + "@atoll.local"}}
	}
	create := func(group, kind, spec string) attack {
		return in("create", "-f", writeFile(n.t, fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: mine}\nspec: %s\n", group, kind, spec)))
	}
	raw := func(path string) attack {
		return in("get", "--raw", "/apis/subresources.atoll.dev/v1alpha1/namespaces/"+n.name+"/virtualmachines/server/"+path)
	}
	const vmware, core = "vmoperator.vmware.com/v1alpha5", "v1"
	return map[string]attack{
		"exec":         in("exec", "server", "--", "id"),
		"attach":       in("attach", "server"),
		"port-forward": in("port-forward", "server", "18097:80"),
		"console":      raw("console"),
		"screen":       raw("vnc"),
		"web console":  create(vmware, "VirtualMachineWebConsoleRequest", "{name: server, publicKey: none}"),
		"power off":    in("patch", "vm", "server", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOff"}}`),
		"resize":       in("patch", "vm", "server", "--type=merge", "-p", `{"spec":{"className":"best-effort-small"}}`),
		"label":        in("label", "vm", "server", "app=mine"),
		"status":       in("patch", "vm", "server", "--subresource=status", "--type=merge", "-p", `{"status":{"powerState":"PoweredOff"}}`),
		"delete":       in("delete", "vm", "server"),
		"delete a pod": in("delete", "pod", "server"),
		"evict":        in("create", "--raw", "/api/v1/namespaces/"+n.name+"/pods/server/eviction", "-f", writeFile(n.t, `{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "server", "namespace": "`+n.name+`"}}`)),
		"a machine":    in("create", "-f", writeFile(n.t, machine("mine", "tiny"))),
		"a snapshot":   create(vmware, "VirtualMachineSnapshot", "{vmName: server}"),
		"publish":      create(vmware, "VirtualMachinePublishRequest", "{source: {name: server}, target: {item: {name: mine}}}"),
		"a service":    create(vmware, "VirtualMachineService", "{type: ClusterIP, ports: [{name: http, port: 80, targetPort: 80, protocol: TCP}], selector: {app: mine}}"),
		"of a volume":  create("snapshot.storage.k8s.io/v1", "VolumeSnapshot", "{source: {persistentVolumeClaimName: data}}"),
		"a claim":      create(core, "PersistentVolumeClaim", "{storageClassName: atoll, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}"),
		"growth":       in("patch", "pvc", "data", "--type=merge", "-p", `{"spec":{"resources":{"requests":{"storage":"1Gi"}}}}`),
		"drop a claim": in("delete", "pvc", "data"),
	}
}

// commands tries commands of `atoll vm` on the machine server, each of which must be refused.
func (p *actor) commands(n *tenant, list ...string) {
	p.t.Helper()
	for _, c := range list {
		f := strings.Fields(c)
		out, err := p.atoll("", append([]string{"vm", f[0], "-n", n.name, "server"}, f[1:]...)...)
		if err == nil || !strings.Contains(out, "orbidden") || !strings.Contains(out, "sso:"+p.name+"@atoll.local") {
			p.t.Errorf("atoll vm %s as %s: %v\n%s", c, p.name, err, out)
		}
	}
}
