//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// machines is a namespace with the tiny image and a small class.
func machines(t *testing.T) *namespace {
	t.Helper()
	n := newNamespace(t)
	atollOK(t, "image", "import", tinyDisk(), "--name", "tiny", "-n", n.name)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineClass
metadata: {name: tiny}
spec: {hardware: {cpus: 1, memory: 192Mi}}
`)
	return n
}

// vm is `atoll vm` in the namespace.
func (n *namespace) vm(args ...string) string {
	n.t.Helper()
	return atollOK(n.t, append([]string{"vm", "--kubeconfig", suite.dataDir + "/admin.kubeconfig", "-n", n.name}, args...)...)
}

// tryVM is vm for what may fail.
func (n *namespace) tryVM(args ...string) (string, error) {
	return tryHost(n.t.Context(), "", append([]string{"vm", "--kubeconfig", suite.dataDir + "/admin.kubeconfig", "-n", n.name}, args...)...)
}

// createBox makes the machine box and waits until its guest is up.
func (n *namespace) createBox() {
	n.t.Helper()
	n.vm("create", "box", "--image", "tiny", "--class", "tiny", "--no-bootstrap")
	n.agent("box")
}

// agent waits until the guest agent of a machine answers.
func (n *namespace) agent(name string) {
	n.t.Helper()
	eventually(n.t, "the guest agent of "+name, func() error {
		_, err := n.try("exec", name, "--", "/atoll/heartbeat")
		return err
	})
}

// power waits for a machine's power state.
func (n *namespace) power(name, want string) {
	n.t.Helper()
	eventually(n.t, name+" to be "+want, func() error {
		if got, err := n.tryField("vm/"+name, ".status.powerState"); err != nil || got != want {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// TestMachineSnapshots: with and without memory, a tree, going back running and stopped, deleting from the middle.
func TestMachineSnapshots(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	n.exec("box", "sh", "-c", "echo first >/data/file; echo lives >/tmp/memory; sync")
	if out := n.vm("snapshot", "box", "--name", "first", "--memory"); !strings.Contains(out, "snapshot first of box is taken") {
		t.Fatal(out)
	}
	n.exec("box", "sh", "-c", "echo second >/data/file; echo dies >/tmp/memory; sync")
	n.vm("snapshot", "box", "--name", "second", "--quiesce")
	equal(t, "first and second are quiesced", n.kubectl("get", "vmsnapshot", "-o", `jsonpath={range .items[*]}{.metadata.name}:{.status.quiesced} {end}`), "first: second:true")
	n.exec("box", "sh", "-c", "echo thawed >/data/file; sync")
	if got := n.kubectl("get", "volumesnapshot", "-o", "jsonpath={.items[*].status.readyToUse}"); got != "true true" {
		t.Errorf("VolumeSnapshots are ready: %q", got)
	}
	n.quiesceDeaf()
	n.vm("revert", "box", "first")
	n.agent("box")
	if got := n.exec("box", "sh", "-c", "cat /data/file /tmp/memory"); got != "first\nlives\n" {
		t.Errorf("back with memory: %q", got)
	}
	// The next one is a second child. One without memory leaves the machine off.
	n.exec("box", "sh", "-c", "echo third >/data/file; sync")
	n.vm("stop", "box", "--hard")
	n.vm("snapshot", "box", "--name", "third")
	if got := n.field("vmsnapshot/first", ".status.children[*].name"); got != "second third" {
		t.Errorf("children of first: %q", got)
	}
	n.vm("revert", "box", "first") // with memory, so it runs
	n.agent("box")
	equal(t, "back with memory from being off", n.exec("box", "sh", "-c", "cat /data/file /tmp/memory"), "first\nlives")
	n.vm("revert", "box", "second")
	n.power("box", "PoweredOff")
	n.vm("start", "box")
	n.agent("box")
	if got := n.exec("box", "cat", "/data/file"); got != "second\n" {
		t.Errorf("back without memory: %q", got)
	}
	n.kubectl("delete", "vmsnapshot", "first", timeout(longPatience))
	eventually(t, "the children to be roots", func() error {
		if got, err := n.tryField("vm/box", ".status.rootSnapshots[*].name"); err != nil || got != "second third" {
			return fmt.Errorf("roots are %q", got)
		}
		return nil
	})
	n.vm("revert", "box", "third", "--start")
	n.agent("box")
	if got := n.exec("box", "cat", "/data/file"); got != "third\n" {
		t.Errorf("back after a deletion: %q", got)
	}
	if out := n.vm("snapshots", "box"); !strings.Contains(out, "third *") {
		t.Errorf("snapshots:\n%s", out)
	}
	n.vm("delete", "box")
	eventually(t, "the snapshots to go with the machine", func() error {
		if left, err := n.try("get", "vmsnapshot,volumesnapshot", "-o", "name"); err != nil || left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
}

// quiesceDeaf asks for file systems at rest while the guest agent does not answer.
func (n *namespace) quiesceDeaf() {
	n.t.Helper()
	n.console("touch /run/agent-off; echo si$((40+2))lent", "si42lent") // what is asked of it now gets no answer
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineSnapshot
metadata: {name: deaf}
spec: {vmName: box, quiesce: {timeout: 5s}}
`)
	eventually(n.t, "the snapshot to say what is wrong", func() error {
		got, err := n.tryField("vmsnapshot/deaf", `.status.conditions[?(@.status=="False")].message`)
		if err != nil || !strings.Contains(got, "freezing the file systems of the guest") {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
	n.console("rm /run/agent-off; echo ans$((40+2))wers", "ans42wers")
	n.agent("box")
	n.kubectl("delete", "vmsnapshot", "deaf", timeout(longPatience))
}

// TestMachineServices: machines of a replica set behind a VirtualMachineService, with a pod behind a plain Service.
func TestMachineServices(t *testing.T) {
	t.Parallel()
	n := machines(t)
	port := 20000 + len(n.name)*7
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineService
metadata: {name: web}
spec:
  type: LoadBalancer
  ports: [{name: http, port: %d, protocol: TCP, targetPort: 80}]
  selector: {app: web}
---
apiVersion: vmoperator.vmware.com/v1alpha3
kind: VirtualMachineReplicaSet
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      className: tiny
      imageName: tiny
      storageClass: atoll
      readinessProbe: {guestHeartbeat: {}}
---
apiVersion: v1
kind: Service
metadata: {name: both}
spec: {selector: {app: web}, ports: [{port: 8000, targetPort: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: pod, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, "mkdir /w; echo hello from a pod >/w/index.html; exec httpd -f -p 80 -h /w"]
    readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 2, timeoutSeconds: 10}
`, port))
	n.kubectl("wait", "vmrs/web", "--for=condition=VirtualMachinesReady", timeout(crowdPatience))
	eventually(t, "the machine to answer at the node's address", func() error {
		address, err := n.tryField("vmservice/web", ".status.loadBalancer.ingress[0].ip")
		if err != nil {
			return err
		}
		return get(t, fmt.Sprintf("http://%s/", net.JoinHostPort(address, fmt.Sprint(port))), "hello from web-")
	})
	both := "http://" + net.JoinHostPort(n.field("service/both", ".spec.clusterIP"), "8000") + "/"
	for _, who := range []string{"a pod", "web-"} { // one after the other, as it happens
		eventually(t, "the plain Service to be answered by "+who, func() error { return get(t, both, "hello from "+who) })
	}
	n.kubectl("delete", "pod", "pod")
	// A port of the host is not to be had at the host's address, in whatever way it is asked for.
	if out, err := n.try("patch", "service", "web", "--type=json", "-p", `[{"op": "replace", "path": "/spec/ports/0/port", "value": 6443}]`); err == nil || !strings.Contains(out, "belong to the host") {
		t.Errorf("port 6443 of the host: %v, %s", err, out)
	}
	n.kubectl("annotate", "vmservice", "web", "atoll.dev/ingress=203.0.113.1")
	n.kubectl("patch", "vmservice", "web", "--type=json", "-p", `[{"op": "replace", "path": "/spec/ports/0/port", "value": 6443}]`)
	eventually(t, "the service to have an address of its own", func() error {
		switch address, err := n.tryField("vmservice/web", ".status.loadBalancer.ingress[0].ip"); {
		case err != nil:
			return err
		case address == "", address == suite.address:
			return fmt.Errorf("it has %q", address)
		default:
			return get(t, fmt.Sprintf("http://%s/", net.JoinHostPort(address, "6443")), "hello from web-")
		}
	})
	n.kubectl("scale", "vmrs/web", "--replicas=2")
	eventually(t, "two endpoints", func() error {
		got, err := n.try("get", "endpointslice", "-l", "kubernetes.io/service-name=web", "-o", "jsonpath={.items[*].endpoints[*].conditions.ready}")
		if err != nil || got != "true true" {
			return fmt.Errorf("endpoints are ready: %q", got)
		}
		return nil
	})
	n.deafEndpoint()
	n.kubectl("scale", "vmrs/web", "--replicas=0")
	eventually(t, "no machines", func() error {
		if left, err := n.try("get", "vm", "-o", "name"); err != nil || left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
}

// deafEndpoint: a machine whose guest agent answers no more gets no connections by either Service, the other still does.
func (n *namespace) deafEndpoint() {
	n.t.Helper()
	names := strings.Fields(n.kubectl("get", "vm", "-l", "app=web", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(names) != 2 {
		n.t.Fatalf("machines are %q", names)
	}
	// The command has to be answered first, if it can be.
	_, _ = n.delivered(names[0], "sh", "-c", "setsid sh -c 'sleep 20; touch /run/agent-off' </dev/null >/dev/null 2>&1 &")
	for _, service := range []string{"web", "both"} {
		eventually(n.t, "the endpoint of a deaf machine not to be ready", func() error {
			var errs []error
			for i, want := range []string{"false", "true"} {
				errs = append(errs, n.lists(want, "endpointslice", "-l", "kubernetes.io/service-name="+service, "-o", `jsonpath={.items[*].endpoints[?(@.targetRef.name=="`+names[i]+`")].conditions.ready}`))
			}
			return errors.Join(errs...)
		})
	}
	n.condition(names[0], "Ready", "False", "the readiness probe")
}

// get reads a page that must hold the text.
func get(t *testing.T, url, text string) error {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Close = true // who answered before rules were there is not asked again
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", url, err)
	}
	if !strings.Contains(string(body), text) {
		return fmt.Errorf("%s says %s %q", url, resp.Status, body)
	}
	return nil
}

// TestMachineGroup: members of a group of the oldest version start one after the other, and stop together. That of the
// examples is of the newest.
func TestMachineGroup(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineGroup
metadata: {name: app}
spec:
  powerState: PoweredOff
  bootOrder:
  - members: [{name: db}]
  - powerOnDelay: 10s
    members: [{name: front}]
`)
	n.vm("create", "db", "--image", "tiny", "--class", "tiny", "--no-bootstrap", "--group", "app", "--off")
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: front}
spec: {groupName: app, className: tiny, imageName: tiny, storageClass: atoll, powerState: PoweredOff}
`)
	n.kubectl("wait", "vmg/app", "--for=condition=Ready", timeout(longPatience))
	n.kubectl("patch", "vmg/app", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOn"}}`)
	n.power("db", "PoweredOn")
	n.power("front", "PoweredOn")
	if after := n.time("pod/front", ".metadata.creationTimestamp").Sub(n.time("vmg/app", ".status.lastUpdatedPowerStateTime")); after < 9*time.Second { // of ten; the times are in whole seconds
		t.Errorf("front was started after %s", after)
	}
	n.kubectl("wait", "vmg/app", "--for=condition=Ready", timeout(longPatience))
	n.kubectl("patch", "vmg/app", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOff","powerOffMode":"Hard"}}`)
	n.power("db", "PoweredOff")
	n.power("front", "PoweredOff")
}

// exported writes a machine's disk into files, brings the appliance in as an image, and makes the machine plain of it, with
// nothing but the name.
func (n *namespace) exported(name, image string) {
	t := n.t
	t.Helper()
	dir := t.TempDir()
	for _, format := range []string{"vmdk", "qcow2"} {
		file := filepath.Join(dir, image+"."+format)
		n.vm("export", name, "-f", file)
		if out, err := exec.CommandContext(t.Context(), "qemu-img", "check", "-f", format, file).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	file := filepath.Join(dir, image+".ova")
	n.vm("export", name, "-f", file)
	atollOK(t, "image", "import", file, "-n", n.name)
	home := t.TempDir()
	cmd := exec.CommandContext(t.Context(), suite.atoll, "vm", "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "create", "plain", "--image", image)
	cmd.Env = append(os.Environ(), "HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("atoll vm create: %v\n%s", err, out)
	}
	contains(t, string(out), "plain is running at ")
	contains(t, string(out), "made an ssh key for you: "+filepath.Join(home, ".atoll", "id_ed25519"))
}

// TestPublishMachine: a machine becomes images that others are made of: published, cloned, and by way of a file.
func TestPublishMachine(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	n.exec("box", "sh", "-c", "echo mine >/data/file; sync")
	if out := n.vm("publish", "box", "--item", "golden"); !strings.Contains(out, "is published as golden") {
		t.Fatal(out)
	}
	n.shown("golden", "True")
	contains(t, n.vm("clone", "box", "copy"), "copy is running at ")
	n.exported("box", "exported")
	for _, name := range []string{"copy", "plain"} {
		n.agent(name)
		equal(t, "the file in "+name, n.exec(name, "cat", "/data/file"), "mine")
	}
	if out := n.vm("ls"); strings.Count(out, "Running") != 3 || !strings.Contains(out, "best-effort-small") {
		t.Errorf("atoll vm ls:\n%s", out)
	}
	for _, version := range []string{"v1alpha2", "v1alpha5"} {
		out := n.kubectl("get", "virtualmachines."+version+".vmoperator.vmware.com", "box")
		equal(t, "columns of "+version, strings.Join(strings.Fields(out)[:5], " "), "NAME POWER-STATE AGE box PoweredOn")
		wide := n.kubectl("get", "virtualmachines."+version+".vmoperator.vmware.com", "box", "-o", "wide")
		equal(t, "more columns of "+version, strings.Join(strings.Fields(wide)[:11], " "), strings.Join([]string{
			"NAME POWER-STATE CLASS IMAGE PRIMARY-IP4 AGE box PoweredOn tiny",
			n.field("virtualmachines."+version+".vmoperator.vmware.com/box", map[string]string{"v1alpha2": ".spec.imageName", "v1alpha5": ".spec.image.name"}[version]), n.field("vm/box", ".status.network.primaryIP4"),
		}, " "))
	}
	about := n.vm("describe", "plain")
	for _, want := range []string{"best-effort-small (2 CPUs, 4 GiB)", "exported", n.field("vm/plain", ".status.biosUUID"), "VirtualMachineCreated", "Events:"} {
		contains(t, about, want)
	}
	if uuid := n.field("vm/copy", ".status.biosUUID"); uuid == "" || uuid == n.field("vm/box", ".status.biosUUID") {
		t.Errorf("the clone has the UUID %q", uuid)
	}
	// In the oldest version: another name is published, and the same is refused.
	publish := func(request, item string) {
		n.apply(fmt.Sprintf("apiVersion: vmoperator.vmware.com/v1alpha2\nkind: VirtualMachinePublishRequest\nmetadata: {name: %s}\nspec: {source: {name: box}, target: {item: {name: %s}}}\n", request, item))
	}
	publish("other", "silver")
	n.shown("silver", "True")
	publish("again", "golden")
	eventually(t, "the name to be refused", func() error {
		if got, err := n.tryField("vmpub/again", `.status.conditions[?(@.type=="TargetValid")].reason`); err != nil || got != "TargetItemAlreadyExists" {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}
