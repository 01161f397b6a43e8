//go:build e2e

package e2e

import (
	"bytes"
	"context"
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
	atollOK(t, "image", "import", tinyDisk(), "--name", "tiny", "-n", n.name)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineClass
metadata: {name: tiny}
spec: {hardware: {cpus: 1, memory: 192Mi}}
`)
	return n
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
	n := tenantMachines(t, `"storageClasses": [{"name": "atoll", "limit": "1200Mi"}], "resources": {"storageRequestLimit": "1300Mi"}`)
	n.storageClass(n.name+"-other", "")
	n.editor.apply(n.name, claim("one", "atoll", "")+"---"+fmt.Sprintf(writer, "user", "atoll", "one"))
	n.ready("user")
	n.editor.apply(n.name, machine("box", "tiny")) // its disk is of the same policy
	n.power("box", "PoweredOn")
	large := strings.Replace(claim("two", "atoll", ""), "64Mi", "1120Mi", 1)
	n.editor.refused(n.name, large, "atoll.storageclass.storage.k8s.io/requests.storage", "used", "limited", n.name)
	n.editor.refused(n.name, claim("two", n.name+"-other", ""), bounded(n, "spec.storageClasses", n.name+"-other", "atoll")...)
	n.editor.refused(n.name, claim("two", `""`, ""), bounded(n, "spec.storageClasses")...)
	n.editor.refused(n.name, strings.Replace(machine("second", "tiny"), "storageClass: atoll", "storageClass: "+n.name+"-other", 1), bounded(n, "spec.storageClasses")...)
	n.editor.denied([]string{"-n", n.name, "patch", "pvc", "one", "--type=merge", "-p", `{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`}, "exceeded quota")
	// A claim inside of a pod is a claim too.
	n.editor.refused(n.name, `
apiVersion: v1
kind: Pod
metadata: {name: ephemeral}
spec:
  containers: [{name: box, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"], volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, ephemeral: {volumeClaimTemplate: {spec: {storageClassName: `+n.name+`-other, accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}}}}]
`, bounded(n, "spec.storageClasses")...)
	eventually(t, "the status", func() error {
		s := n.status()
		if got := s.used("storageclass/atoll"); !strings.HasSuffix(got, "/1200Mi") || strings.HasPrefix(got, "0/") {
			return fmt.Errorf("storageclass/atoll: %q", got)
		}
		return nil
	})
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
	n.editor.apply(n.name, claim("data", key, "")+"---"+fmt.Sprintf(writer, "one", "atoll", "data"))
	n.ready("one")
	n.editor.apply(n.name, strings.Replace(machine("box", "tiny"), "storageClass: atoll", "storageClass: "+key, 1))
	n.power("box", "PoweredOn")
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
		return is(n.kubectl("get", "virtualmachineclasses", "-o", "name"), "virtualmachineclass.vmoperator.vmware.com/best-effort-small\n")
	})
	n.editor.refused(n.name, machine("box", "best-effort-large"), bounded(n, "spec.vmClasses", "best-effort-large", "best-effort-small")...)
	n.editor.refused(n.name, strings.Replace(machine("box", "best-effort-small"), "imageName: tiny", "imageName: "+display, 1), bounded(n, "spec.contentSources")...)
	n.editor.refused(n.name, bootClaim("copy", "ClusterVirtualMachineImage/"+clusterImage(t, display), "128Mi"), bounded(n, "spec.contentSources")...)
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
		out := n.editor.kubectl("-n", n.name, "get", "deployment", "evil", "-o", `jsonpath={.status.conditions[?(@.type=="ReplicaFailure")].message}`)
		if !strings.Contains(out, "spec.images") || !strings.Contains(out, n.name) {
			return fmt.Errorf("it says %q", out)
		}
		return nil
	})
	// Privileged is a thing of the pod's own kernel once it is allowed.
	n.declare(`"podRuntime": {"privilegedAllowed": true}`)
	n.editor.apply(n.name, with("image: busybox", "securityContext: {privileged: true}, image: busybox"))
	n.ready("other")
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
		if c := n.status().condition("Ready"); c.Status != "False" || !strings.Contains(c.Message, "zone elsewhere does not exist") {
			return fmt.Errorf("condition Ready is %+v", c)
		}
		return nil
	})
	n.editor.apply(n.name, strings.Replace(sleeper, "name: box}", "name: later}", 1))
	n.says("pod/later", "didn't match")
	n.editor.refused(n.name, strings.Replace(strings.Replace(sleeper, "name: box}", "name: direct}", 1), "spec:", "spec:\n  nodeName: "+node, 1), bounded(n, "spec.zones")...)
	equal(t, "the pod that was there", n.field("pod/box", ".status.phase"), "Running")
}

// TestTenantSelfService: an owner makes a namespace from a template, within it, and nobody else does.
func TestTenantSelfService(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	template := n.name + "-template"
	n.clusterObject("supervisornamespacetemplate", template, fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: SupervisorNamespaceTemplate
metadata: {name: %s}
spec:
  selfService: {enabled: true, maxPerUser: 1}
  template:
    resources: {memoryLimit: 2Gi, counts: {podCount: 5}}
    storageClasses: [{name: atoll, limit: 1Gi}]
    network: {isolation: Isolated}
`, template))
	object := func(name, class, rest string) string {
		return fmt.Sprintf(`{"apiVersion": "atoll.dev/v1alpha1", "kind": "SupervisorNamespace", "metadata": {"name": %q}, "spec": {%s%s}}`, name, class, rest)
	}
	mine, class := n.name+"-mine", fmt.Sprintf(`"className": %q`, template)
	create := func(p *actor, text string) (string, error) { return p.try(text, "create", "-f", "-") }
	t.Cleanup(func() {
		_, _ = kubectl(context.Background(), "", "delete", "supervisornamespace", mine, "--ignore-not-found")
	})
	for what, c := range map[string]struct {
		who  *actor
		text string
		want string
	}{
		"editor":     {n.editor, object(mine, class, ""), "forbidden"},
		"viewer":     {n.viewer, object(mine, class, ""), "forbidden"},
		"no class":   {n.owner, object(mine, "", ""), "className"},
		"wider":      {n.owner, object(mine, class, `, "resources": {"memoryLimit": "4Gi"}`), "memoryLimit"},
		"privileged": {n.owner, object(mine, class, `, "podRuntime": {"privilegedAllowed": true}`), "privilegedAllowed"},
		"open":       {n.owner, object(mine, class, `, "network": {"isolation": "Open"}`), "isolation"},
		"storage":    {n.owner, object(mine, class, `, "storageClasses": [{"name": "gold"}]`), "storageClasses"},
		"system":     {n.owner, object("kube-system", class, ""), "kube-system"},
		"taken":      {n.owner, object("default", class, ""), "default"},
	} {
		if out, err := create(c.who, c.text); err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v, want a refusal with %q\n%s", what, err, c.want, out)
		}
	}
	if out, err := create(n.owner, object(mine, class, `, "resources": {"memoryLimit": "1Gi"}`)); err != nil {
		t.Fatal(err, out)
	}
	eventually(t, "the owner to work in it", func() error {
		_, err := n.owner.try("", "-n", mine, "create", "configmap", "works")
		return err
	})
	equal(t, "the limit", run(t, "", "get", "resourcequota", mine+"-quota", "-n", mine, "-o", `jsonpath={.spec.hard.limits\.memory}`), "1Gi")
	equal(t, "isolation from the template", run(t, "", "get", "supervisornamespace", mine, "-o", "jsonpath={.status.effective.network.isolation}"), "Isolated")
	if out, err := create(n.owner, object(mine+"2", class, "")); err == nil || !strings.Contains(out, "maxPerUser") && !strings.Contains(out, "1") {
		t.Errorf("a second one: %v\n%s", err, out)
	}
	n.editor.denied([]string{"-n", mine, "get", "configmaps"}, "forbidden")
	n.editor.denied([]string{"delete", "supervisornamespace", mine}, "forbidden")
	n.owner.denied([]string{"patch", "supervisornamespace", mine, "--type=merge", "-p", `{"spec":{"resources":{"memoryLimit":"64Gi"}}}`})
	n.owner.kubectl("-n", mine, "delete", "configmap", "works")
	n.owner.kubectl("delete", "supervisornamespace", mine, "--timeout=180s")
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "object")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestNamespaceExamples: what the documentation tells people to apply is taken, all of it.
func TestNamespaceExamples(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	suite.template.Lock() // there can be one default, and one of the examples is that
	defer suite.template.Unlock()
	examples := filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "examples", "namespaces")
	for _, file := range []string{"shop.yaml", "closed.yaml", "template.yaml"} {
		contains(t, run(t, "", "create", "--dry-run=server", "-f", filepath.Join(examples, file)), "created")
	}
	robot, err := os.ReadFile(filepath.Join(examples, "robot.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	n.apply(strings.Replace(string(robot), "namespace: shop", "namespace: "+n.name, 1))
	run(t, "", "apply", "--dry-run=server", "-f", filepath.Join(filepath.Dir(examples), "demo", "namespace.yaml"))
}
