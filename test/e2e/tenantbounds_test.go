//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tenantMachines is a tenant with the tiny image and a small class.
func tenantMachines(t *testing.T, spec string) *tenant {
	t.Helper()
	n := newTenant(t, "", spec)
	n.equip()
	return n
}

// equip gives a namespace the tiny image and a small class.
func (n *tenant) equip() {
	n.t.Helper()
	atollOK(n.t, "image", "import", tinyDisk(), "--name", "tiny", "-n", n.name)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineClass
metadata: {name: tiny}
spec: {hardware: {cpus: 1, memory: 192Mi}}
`)
}

func tinyDisk() string {
	return filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "build", "vm", "tiny.qcow2")
}

// bounded is what every refusal says: the namespace, the field that bounds, and who can change it.
func bounded(n *tenant, field string, more ...string) []string {
	return append([]string{n.name, field, "administrator"}, more...)
}

// TestTenantStorage: storage policies, each with its limit, for claims, for what pods and sets make, and for disks of
// virtual machines.
func TestTenantStorage(t *testing.T) {
	t.Parallel()
	free := strings.ToLower(strings.TrimPrefix(t.Name(), "Test")) + "-free" // has no limit of its own
	(&namespace{t: t}).storageClass(free, "volumeBindingMode: WaitForFirstConsumer")
	n := tenantMachines(t, fmt.Sprintf(`"storageClasses": [{"name": "atoll", "limit": "1200Mi"}, {"name": %q}], "resources": {"storageRequestLimit": "1300Mi"}`, free))
	n.storageClass(n.name+"-other", "")
	n.editor.apply(n.name, claim("one", "atoll", "")+"---"+fmt.Sprintf(writer, "user", "atoll", "one"))
	n.ready("user")
	n.editor.apply(n.name, machine("box", "tiny")) // its disk is of the same policy
	n.power("box", "PoweredOn")
	large := strings.Replace(claim("two", "atoll", ""), "64Mi", "1120Mi", 1)
	n.editor.refused(n.name, large, "exceeded quota: "+n.name+"-storagequota", "limited: atoll.storageclass.storage.k8s.io/requests.storage=1200Mi", "used", "administrator")
	// The sum bounds what no policy does.
	n.editor.refused(n.name, strings.Replace(claim("two", free, ""), "64Mi", "1280Mi", 1), "exceeded quota: "+n.name, "limited: requests.storage=1300Mi", "used", "administrator")
	n.editor.apply(n.name, claim("small", free, ""))
	n.editor.refused(n.name, claim("two", n.name+"-other", ""), bounded(n, "spec.storageClasses", n.name+"-other", "atoll")...)
	n.editor.refused(n.name, claim("two", `""`, ""), bounded(n, "spec.storageClasses")...)
	n.editor.refused(n.name, strings.Replace(machine("second", "tiny"), "storageClass: atoll", "storageClass: "+n.name+"-other", 1), bounded(n, "spec.storageClasses")...)
	n.editor.denied([]string{"-n", n.name, "patch", "pvc", "one", "--type=merge", "-p", `{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`}, "exceeded quota")
	n.largeMachine()
	n.furtherDisk(n.name+"-other", bounded(n, "spec.storageClasses", n.name+"-other", "atoll")...)
	// A claim inside of a pod is a claim too.
	n.editor.refused(n.name, ephemeralPod(n.name+"-other"), bounded(n, "spec.storageClasses")...)
	// A set with claims of another policy is refused, and of one with too large claims there is nothing: the set says why.
	n.editor.refused(n.name, setOf("policy", n.name+"-other", "16Mi"), bounded(n, "spec.storageClasses", "spec.volumeClaimTemplates data", n.name+"-other")...)
	n.editor.apply(n.name, setOf("sum", free, "1280Mi"))
	n.says("statefulset/sum", "limited: requests.storage=1300Mi")
	equal(t, "claims", n.kubectl("get", "pvc", "one", "small", "-o", "name")+n.kubectl("get", "pvc", "-l", "app", "-o", "name"), "persistentvolumeclaim/one\npersistentvolumeclaim/small")
	eventually(t, "the status", func() error {
		s, err := n.tryStatus()
		if got := s.used("storage"); !strings.HasSuffix(got, "/1300Mi") || strings.HasPrefix(got, "0/") {
			return fmt.Errorf("storage: %q", got)
		}
		if got := s.used("storageclass/atoll"); !strings.HasSuffix(got, "/1200Mi") || strings.HasPrefix(got, "0/") {
			return fmt.Errorf("storageclass/atoll: %q", got)
		}
		return err
	})
}

// ephemeralPod has a claim of a StorageClass inside of it.
func ephemeralPod(class string) string {
	return `
apiVersion: v1
kind: Pod
metadata: {name: ephemeral}
spec:
  containers: [{name: box, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"], volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, ephemeral: {volumeClaimTemplate: {spec: {storageClassName: ` + class + `, accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}}}}]
`
}

// setOf is a StatefulSet with a claim of a StorageClass for each pod.
func setOf(name, class, size string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: %[1]s}
spec:
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      containers: [{name: box, image: busybox, volumeMounts: [{name: data, mountPath: /data}]}]
  volumeClaimTemplates:
    - metadata: {name: data}
      spec: {storageClassName: %[2]s, accessModes: [ReadWriteOnce], resources: {requests: {storage: %[3]s}}}
`, name, class, size)
}

// largeMachine is one whose own disk is more than what is left of its policy: it has none, and says why.
func (n *tenant) largeMachine() {
	n.t.Helper()
	claims := func() string { return n.kubectl("get", "pvc", "-o", "name") }
	before := claims()
	n.editor.apply(n.name, strings.Replace(machine("large", "tiny"), "spec: {", "spec: {powerState: PoweredOff, advanced: {bootDiskCapacity: 1088Mi}, ", 1))
	n.lacks("large", "VirtualMachineStorageReady", "the boot disk cannot be made", "exceeded quota: "+n.name+"-storagequota",
		"requested: atoll.storageclass.storage.k8s.io/requests.storage=1088Mi", "limited: atoll.storageclass.storage.k8s.io/requests.storage=1200Mi", "administrators can change it")
	equal(n.t, "claims", claims(), before)
}

// furtherDisk adds a disk of a StorageClass to the machine box: there is no claim for it, and the machine says why.
func (n *tenant) furtherDisk(class string, wants ...string) {
	n.t.Helper()
	claims := func() string { return n.kubectl("get", "pvc", "-o", "name") }
	before := claims()
	n.editor.kubectl("-n", n.name, "patch", "vm", "box", "--type=merge", "-p",
		`{"spec":{"volumes":[{"name":"more","persistentVolumeClaim":{"claimName":"more","instanceVolumeClaim":{"storageClass":"`+class+`","size":"16Mi"}}}]}}`)
	eventually(n.t, "the machine to say why it has no further disk", func() error {
		said, err := n.tryField("vm/box", `.status.volumes[?(@.name=="more")].error`)
		for _, want := range append(wants, "PersistentVolumeClaim more cannot be made") {
			if !strings.Contains(said, want) {
				return fmt.Errorf("it says %q, want %q", said, want)
			}
		}
		return err
	})
	equal(n.t, "claims", claims(), before)
}

// TestTenantEncryption: what is not encrypted is refused, volumes and disks of virtual machines alike.
func TestTenantEncryption(t *testing.T) {
	t.Parallel()
	n := tenantMachines(t, `"encryption": {"required": true}`)
	key := n.name + "-key"
	t.Cleanup(func() { _, _ = kubectl(context.Background(), "", "delete", "secret", key, "-n", "atoll-keys") })
	feed(t, bytes.NewReader(bytes.Repeat([]byte{7}, 32)), "create", "secret", "generic", key, "-n", "atoll-keys", "--from-file=key=/dev/stdin")
	n.storageClass(key, "parameters: {encryption: "+key+"}")
	n.editor.refused(n.name, claim("data", "atoll", ""), bounded(n, "spec.encryption")...)
	n.editor.refused(n.name, machine("box", "tiny"), bounded(n, "spec.encryption")...)
	n.editor.refused(n.name, ephemeralPod("atoll"), bounded(n, "spec.encryption", "spec.volumes[0].ephemeral")...)
	n.editor.refused(n.name, setOf("set", "atoll", "16Mi"), bounded(n, "spec.encryption", "spec.volumeClaimTemplates data")...)
	n.editor.apply(n.name, claim("data", key, "")+"---"+fmt.Sprintf(writer, "one", "atoll", "data"))
	n.ready("one")
	n.editor.apply(n.name, strings.Replace(machine("box", "tiny"), "storageClass: atoll", "storageClass: "+key, 1))
	n.power("box", "PoweredOn")
	n.furtherDisk("atoll", bounded(n, "spec.encryption", "which does not encrypt")...)
	n.editor.apply(n.name, ephemeralPod(key)+"---"+setOf("set", key, "16Mi"))
	n.ready("ephemeral")
}

// TestTenantMachines: classes and content sources.
func TestTenantMachines(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", `"vmClasses": [{"name": "best-effort-small"}], "contentSources": [{"name": "default", "type": "ContentLibrary"}]`)
	display := n.name + "-tiny"
	atollOK(t, "image", "import", tinyDisk(), "--name", display)
	t.Cleanup(func() { _, _ = tryHost(context.Background(), "", "image", "rm", "--vm", display) })
	atollOK(t, "image", "import", tinyDisk(), "--name", "tiny", "-n", n.name)
	eventually(t, "the classes to be those that are allowed", func() error {
		return n.lists("virtualmachineclass.vmoperator.vmware.com/best-effort-small\n", "virtualmachineclasses", "-o", "name")
	})
	n.editor.refused(n.name, machine("box", "best-effort-large"), bounded(n, "spec.vmClasses", "best-effort-large", "best-effort-small")...)
	n.editor.refused(n.name, strings.Replace(machine("box", "best-effort-small"), "imageName: tiny", "imageName: "+display, 1), bounded(n, "spec.contentSources")...)
	n.editor.refused(n.name, bootClaim("copy", "ClusterVirtualMachineImage/"+clusterImage(t, display), "128Mi"), bounded(n, "spec.contentSources")...)
	n.setsAndDiscs(display)
	n.editor.denied([]string{"-n", n.name, "create", "-f", writeFile(t, `{"apiVersion": "vmoperator.vmware.com/v1alpha5", "kind": "VirtualMachineClass", "metadata": {"name": "mine"}, "spec": {"hardware": {"cpus": 64, "memory": "1Ti"}}}`)}, "forbidden")
	n.editor.apply(n.name, strings.Replace(machine("box", "best-effort-small"), "spec: {", "spec: {powerState: PoweredOff, ", 1))
	n.editor.denied([]string{"-n", n.name, "patch", "vm", "box", "--type=merge", "-p", `{"spec":{"className":"guaranteed-8xlarge"}}`}, bounded(n, "spec.vmClasses")...)
	// The administrator widens the list, and it is so.
	n.declare(`"vmClasses": [{"name": "best-effort-small"}, {"name": "best-effort-xsmall"}]`)
	eventually(t, "another class", func() error {
		_, err := n.try("get", "virtualmachineclass", "best-effort-xsmall")
		return err
	})
	n.editor.kubectl("-n", n.name, "get", "virtualmachineclass", "best-effort-xsmall")
}

// setsAndDiscs holds replica sets of machines and CD-ROMs to the classes and content sources; display is an image of none of
// them. What is within them is taken.
func (n *tenant) setsAndDiscs(display string) {
	n.t.Helper()
	set := func(class, image string) string {
		return fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineReplicaSet
metadata: {name: set}
spec:
  replicas: 0
  selector: {matchLabels: {app: set}}
  template:
    metadata: {labels: {app: set}}
    spec: {className: %s, imageName: %s, storageClass: atoll}
`, class, image)
	}
	disc := func(image string) string {
		return strings.Replace(machine("disc", "best-effort-small"), "spec: {", "spec: {powerState: PoweredOff, guestID: otherLinux64Guest, hardware: {cdrom: [{name: cd1, image: "+image+"}]}, ", 1)
	}
	outside := "{kind: ClusterVirtualMachineImage, name: " + clusterImage(n.t, display) + "}"
	n.editor.refused(n.name, set("best-effort-large", "tiny"), bounded(n, "spec.vmClasses", "best-effort-large", "best-effort-small")...)
	n.editor.refused(n.name, set("best-effort-small", display), bounded(n, "spec.contentSources")...)
	n.editor.refused(n.name, disc(outside), bounded(n, "spec.contentSources", "ClusterVirtualMachineImage/")...)
	n.editor.apply(n.name, set("best-effort-small", "tiny"))
	n.editor.denied([]string{"-n", n.name, "patch", "vmrs", "set", "--type=merge", "-p", `{"spec":{"template":{"spec":{"className":"best-effort-large"}}}}`}, bounded(n, "spec.vmClasses")...)
	own := n.kubectl("get", "virtualmachineimages", "-o", "jsonpath={.items[0].metadata.name}")
	n.editor.apply(n.name, disc("{kind: VirtualMachineImage, name: "+own+"}"))
	n.editor.denied([]string{"-n", n.name, "patch", "vm", "disc", "--type=merge", "-p", `{"spec":{"hardware":{"cdrom":[{"name":"cd1","image":{"kind":"ClusterVirtualMachineImage","name":"` + clusterImage(n.t, display) + `"}}]}}}`}, bounded(n, "spec.contentSources")...)
}

// clusterImage is the name of the image for all namespaces with a display name.
func clusterImage(t *testing.T, display string) string {
	t.Helper()
	var name string
	eventually(t, "the image "+display, func() error {
		out, err := kubectl(t.Context(), "", "get", "clustervirtualmachineimages", "-o", `jsonpath={range .items[*]}{.status.name} {.metadata.name}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == display {
				name = f[1]
				return nil
			}
		}
		return fmt.Errorf("%w: images are %q", err, out)
	})
	return name
}

// TestTenantPods: images, the runtime, privileged containers, and hosts.
func TestTenantPods(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", `"images": ["busybox", "docker.io/library/busybox*", "registry.atoll.local/library/**"]`)
	pod := func(change func(string) string) string {
		return change(strings.Replace(sleeper, "name: box}", "name: other}", 1))
	}
	with := func(old, text string) string {
		return pod(func(s string) string { return strings.Replace(s, old, text, 1) })
	}
	n.editor.apply(n.name, sleeper)
	for what, c := range map[string]struct {
		yaml  string
		wants []string
	}{
		"image":           {with("image: busybox", "image: docker.io/library/nginx"), bounded(n, "spec.images", "docker.io/library/nginx")},
		"init image":      {with("  containers:", "  initContainers: [{name: i, image: evil.example/x}]\n  containers:"), bounded(n, "spec.images", "evil.example/x")},
		"lookalike":       {with("image: busybox", "image: evil.example/docker.io/library/busybox"), bounded(n, "spec.images")},
		"image as volume": {with("  containers:", "  volumes: [{name: v, image: {reference: evil.example/x}}]\n  containers:"), bounded(n, "spec.images", "evil.example/x")},
		"runc":            {with("spec:", "spec:\n  runtimeClassName: runc"), bounded(n, "spec.podRuntime")},
		"host network":    {with("spec:", "spec:\n  hostNetwork: true"), []string{n.name, "administrator"}},
		"host files":      {with("  containers:", "  volumes: [{name: v, hostPath: {path: /}}]\n  containers:"), []string{n.name, "administrator"}},
		"privileged":      {with("image: busybox", "securityContext: {privileged: true}, image: busybox"), bounded(n, "spec.podRuntime.privilegedAllowed")},
	} {
		t.Log(what)
		n.editor.refused(n.name, c.yaml, c.wants...)
	}
	n.ready("box")
	n.editor.denied([]string{"-n", n.name, "debug", "box", "--image=docker.io/library/nginx", "--profile=baseline", "--", "true"}, bounded(n, "spec.images")...)
	n.editor.denied([]string{"-n", n.name, "debug", "box", "--image=busybox", "--profile=sysadmin", "--", "true"}, n.name, "privileged", "administrator")
	// What a Deployment makes is held to the same, and says so.
	n.editor.kubectl("-n", n.name, "create", "deployment", "evil", "--image=evil.example/x")
	eventually(t, "the deployment to say why it has no pods", func() error {
		out, err := n.editor.try("", "-n", n.name, "get", "deployment", "evil", "-o", `jsonpath={.status.conditions[?(@.type=="ReplicaFailure")].message}`)
		if err != nil || !strings.Contains(out, "spec.images") || !strings.Contains(out, n.name) {
			return fmt.Errorf("it says %q", out)
		}
		return nil
	})
	n.editor.kubectl("-n", n.name, "delete", "deployment", "evil")
	// Privileged is a thing of the pod's own kernel once it is allowed.
	n.declare(`"podRuntime": {"privilegedAllowed": true}`)
	n.editor.applySoon(n.name, with("image: busybox", "securityContext: {privileged: true}, image: busybox"))
	n.ready("other")
	n.onTheHost()
}

// onTheHost has pods that need the host where an administrator allows that, counted like all others, and no more when it
// is taken back.
func (n *tenant) onTheHost() {
	t := n.t
	t.Helper()
	needs := func(name, spec string) string {
		return strings.Replace(strings.Replace(sleeper, "name: box}", "name: "+name+"}", 1), "spec:", "spec:\n  runtimeClassName: runc\n  "+spec, 1)
	}
	const files = "volumes: [{name: v, hostPath: {path: /}}]"
	privileged := strings.Replace(needs("root", "hostPID: true"), "image: busybox", "securityContext: {privileged: true}, image: busybox", 1)
	debug := []string{"-n", n.name, "debug", "plain", "--image=busybox", "--profile=sysadmin", "--attach=false", "--quiet", "--", "sleep", "100000"}
	mounted := strings.Replace(needs("files", files), "image: busybox", "volumeMounts: [{name: v, mountPath: /host, readOnly: true}], image: busybox", 1)
	n.declare(`"podRuntime": {"policy": "Runc"}, "resources": {"memoryLimit": "1Gi", "memoryLimitDefault": "64Mi", "counts": {"podCount": 4}}`)
	n.editor.applySoon(n.name, needs("plain", "restartPolicy: Always")+"---"+mounted)
	n.ready("plain")
	n.ready("files")
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "the kernel under runc", n.exec("plain", "cat", "/proc/sys/kernel/osrelease"), string(kernel))
	n.exec("files", "test", "-e", "/host"+suite.dataDir+"/admin.kubeconfig")
	// Under runc nobody but the policy of the namespace is between a privileged container and the host.
	n.editor.refused(n.name, privileged, bounded(n, "spec.podRuntime.privilegedAllowed", "spec.containers[0].securityContext.privileged")...)
	n.editor.denied(debug, bounded(n, "spec.podRuntime.privilegedAllowed", "spec.ephemeralContainers[0].securityContext.privileged")...)
	eventually(t, "them to be counted", func() error {
		s, err := n.tryStatus()
		return errors.Join(err, is(s.used("count/pods"), "4/4"))
	})
	n.editor.refused(n.name, needs("fifth", "restartPolicy: Always"), "exceeded quota: "+n.name+"-quota", "pods=4", "administrator")
	n.declare(`"podRuntime": {"policy": "Runc", "privilegedAllowed": true}`)
	n.editor.applySoon(n.name, privileged)
	n.ready("root")
	first, err := os.ReadFile("/proc/1/comm")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "the host's first process", n.exec("root", "cat", "/proc/1/comm"), string(first))
	n.editor.kubectl(debug...)
	n.declare(`"podRuntime": {"policy": "MicroVM", "privilegedAllowed": true}`)
	n.editor.refusedSoon(n.name, needs("fifth", "restartPolicy: Always"), bounded(n, "spec.podRuntime")...)
	n.editor.denied(debug, bounded(n, "spec.podRuntime.policy")...)
	n.editor.refused(n.name, needs("sixth", files), bounded(n, "spec.podRuntime")...)
	equal(t, "what ran already", n.field("pod/plain", ".status.phase"), "Running")
}

// TestTenantHosts: pods and machines run on the hosts of the namespace only.
func TestTenantHosts(t *testing.T) {
	t.Parallel()
	node := strings.Fields(run(t, "", "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))[0]
	n := tenantMachines(t, fmt.Sprintf(`"hosts": [%q]`, node))
	n.editor.apply(n.name, sleeper)
	n.ready("box")
	n.want(`"zones": [{"name": "elsewhere"}]`)
	eventually(t, "the zone to be missed", func() error {
		s, err := n.tryStatus()
		if c := s.condition("Ready"); c.Status != "False" || !strings.Contains(c.Message, "zone elsewhere does not exist") {
			return fmt.Errorf("condition Ready is %+v, %w", c, err)
		}
		return nil
	})
	n.editor.refusedSoon(n.name, strings.Replace(strings.Replace(sleeper, "name: box}", "name: direct}", 1), "spec:", "spec:\n  nodeName: "+node, 1), bounded(n, "spec.zones")...)
	n.editor.apply(n.name, strings.Replace(sleeper, "name: box}", "name: later}", 1))
	n.editor.apply(n.name, machine("server", "tiny"))
	eventually(t, "the machine's pod", func() error {
		_, err := n.try("get", "pod", "server")
		return err
	})
	for _, name := range []string{"later", "server"} {
		n.says("pod/"+name, "didn't match")
		contains(t, n.field("pod/"+name, ".spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"), "elsewhere")
		equal(t, "the node of "+name, n.field("pod/"+name, ".spec.nodeName"), "")
	}
	if state := n.field("vm/server", ".status.powerState"); state == "PoweredOn" {
		t.Errorf("the machine is %s where it may not be", state)
	}
	equal(t, "the pod that was there", n.field("pod/box", ".status.phase"), "Running")
	n.elsewhere(node)
}

// elsewhere has a namespace whose hosts are others, and one in the zone that the node is in.
func (n *tenant) elsewhere(node string) {
	t := n.t
	t.Helper()
	n.want(`"hosts": ["elsewhere"]`)
	n.is("Ready", "False", "host elsewhere does not exist")
	named := func(name, spec string) string {
		return strings.Replace(strings.Replace(sleeper, "name: box}", "name: "+name+"}", 1), "spec:", "spec:"+spec, 1)
	}
	n.editor.refusedSoon(n.name, named("direct", "\n  nodeName: "+node), bounded(n, "spec.hosts", "only elsewhere")...)
	n.editor.apply(n.name, named("outside", ""))
	n.says("pod/outside", "didn't match")
	zone := []string{"label", "node", node, "topology.kubernetes.io/zone=" + n.name}
	t.Cleanup(func() {
		_, _ = kubectl(context.Background(), "", "label", "node", node, "topology.kubernetes.io/zone-")
	})
	run(t, "", zone...)
	n.declare(fmt.Sprintf(`"zones": [{"name": %q}]`, n.name))
	n.editor.applySoon(n.name, named("direct", "\n  nodeName: "+node))
	n.ready("direct")
	n.editor.apply(n.name, named("inside", ""))
	n.ready("inside")
	equal(t, "the node of the pod of other hosts", n.field("pod/outside", ".spec.nodeName"), "")
}
