//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestTenantRoles asks the checks that VMware's own tests ask of the roles (View and Edit, in the namespace and in all),
// and what the roles mean beside virtual machines.
func TestTenantRoles(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	stranger := newActor(t, n.name+"-stranger")
	administrator := newActor(t, n.name+"-administrator", "administrators")
	here, all := []string{"-n", n.name}, []string{"-A"}
	check := func(p *actor, want bool, verb, resource string, where []string) {
		t.Helper()
		if got := p.can(verb, resource, where...); got != want {
			t.Errorf("%s %s %s %s: got %t, want %t", p.name, verb, resource, strings.Join(where, " "), got, want)
		}
	}
	n.owner.mayCreate("supervisornamespaces.atoll.dev") // by a binding of all owners, which comes by itself
	// The list of VM Operator's tests, in the words of kubectl once.
	eventually(t, "the role to count", func() error {
		_, err := n.editor.try("", "auth", "can-i", "create", "virtualmachine", "-n", n.name)
		return err
	})
	n.editor.denied([]string{"auth", "can-i", "create", "virtualmachine", "-A"}, "no")
	const vm = ".vmoperator.vmware.com"
	read := []string{"virtualmachineclasses" + vm, "virtualmachineimages" + vm, "virtualmachines" + vm, "virtualmachineservices" + vm, "virtualmachinepublishrequests" + vm, "virtualmachinewebconsolerequests" + vm}
	for _, resource := range read {
		for _, p := range []*actor{n.viewer, n.editor, n.owner} {
			check(p, true, "get", resource, here)
			check(p, false, "get", resource, all)
		}
		check(stranger, false, "get", resource, here)
		check(administrator, true, "get", resource, all)
	}
	for _, p := range []*actor{n.viewer, n.editor, n.owner} {
		check(p, true, "get", "clustervirtualmachineimages"+vm, nil)
	}
	for _, resource := range []string{"virtualmachines" + vm, "virtualmachineservices" + vm, "virtualmachinepublishrequests" + vm, "virtualmachinewebconsolerequests" + vm} {
		for _, p := range []*actor{n.editor, n.owner} {
			check(p, true, "create", resource, here)
			check(p, false, "create", resource, all)
		}
		check(n.viewer, false, "create", resource, here)
		check(stranger, false, "create", resource, here)
		check(administrator, true, "create", resource, all)
	}
	// verb, resource, and whether viewer, editor and owner may.
	for _, c := range []struct {
		verb, resource        string
		viewer, editor, owner bool
	}{
		{"list", "pods", true, true, true},
		{"get", "pods/log", true, true, true},
		{"create", "pods", false, true, true},
		{"create", "pods/exec", false, true, true},
		{"get", "secrets", false, true, true},
		{"create", "deployments.apps", false, true, true},
		{"delete", "persistentvolumeclaims", false, true, true},
		{"create", "networkpolicies.networking.k8s.io", false, true, true},
		{"create", "volumesnapshots.snapshot.storage.k8s.io", false, true, true},
		{"get", "resourcequotas", true, true, true},
		{"get", "repositories.registry.atoll.dev", true, true, true},
		{"update", "repositories.registry.atoll.dev", false, true, true},
		{"create", "supervisornamespaces.atoll.dev", false, false, true},
		// Bounds are not theirs to change.
		{"update", "resourcequotas", false, false, false},
		{"update", "limitranges", false, false, false},
		{"create", "virtualmachineclasses" + vm, false, false, false},
		{"create", "endpointslices.discovery.k8s.io", false, false, false},
		{"impersonate", "serviceaccounts", false, true, true}, // as upstream: they may run pods with them
		{"bind", "roles.rbac.authorization.k8s.io", false, false, false},
		{"escalate", "roles.rbac.authorization.k8s.io", false, false, false},
	} {
		check(n.viewer, c.viewer, c.verb, c.resource, here)
		check(n.editor, c.editor, c.verb, c.resource, here)
		check(n.owner, c.owner, c.verb, c.resource, here)
		check(stranger, false, c.verb, c.resource, here)
	}
	for _, resource := range []string{"nodes", "persistentvolumes", "namespaces", "users.atoll.dev", "clusterroles.rbac.authorization.k8s.io", "storageclasses.storage.k8s.io"} {
		for _, p := range []*actor{n.viewer, n.editor, n.owner, stranger} {
			check(p, false, "delete", resource, nil)
			check(p, false, "update", resource, nil)
		}
	}
	// And what happens, not only what is said to.
	n.editor.apply(n.name, sleeper)
	contains(t, n.viewer.kubectl("-n", n.name, "get", "pods"), "box")
	n.viewer.denied([]string{"-n", n.name, "delete", "pod", "box"}, "forbidden", "sso:"+n.viewer.name+"@atoll.local")
	stranger.denied([]string{"-n", n.name, "get", "pods"}, "forbidden", "sso:"+stranger.name+"@atoll.local")
	n.owner.kubectl("-n", n.name, "wait", "--for=condition=Ready", "pod/box", timeout(patience))
	equal(t, "exec as owner", n.owner.kubectl("-n", n.name, "exec", "box", "--", "hostname"), "box")
	n.viewer.denied([]string{"-n", n.name, "exec", "box", "--", "hostname"}, "forbidden", "pods/exec")
	contains(t, administrator.kubectl("get", "pods", "-A"), n.name)
}

// TestTenantAccess: a role comes and goes with the list, for a user and for a group, within seconds and with the session
// that there is.
func TestTenantAccess(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	group := n.name + "-team"
	host(t, "", "group", "create", group)
	t.Cleanup(func() { _, _ = tryHost(context.Background(), "", "group", "delete", group) })
	member := newActor(t, n.name+"-member", group)
	if member.can("get", "pods", "-n", n.name) {
		t.Fatal("a group that is on no list may read")
	}
	may := func(what string, want bool, verb string) {
		t.Helper()
		eventually(t, what, func() error {
			if got := member.can(verb, "pods", "-n", n.name); got != want {
				return fmt.Errorf("may %s pods: %t", verb, got)
			}
			return nil
		})
	}
	patch := func(list string) {
		t.Helper()
		run(t, "", "patch", "supervisornamespace", n.name, "--type=json", "-p", `[{"op": "replace", "path": "/spec/accessList", "value": `+list+`}]`)
	}
	patch(fmt.Sprintf(`[{"subjectType": "Group", "subject": %q, "role": "Edit"}]`, group))
	may("the group to edit", true, "create")
	patch(fmt.Sprintf(`[{"subjectType": "Group", "subject": %q, "role": "View"}]`, group))
	may("the group to lose the right to edit", false, "create")
	may("the group to see", true, "get")
	host(t, "", "group", "remove", group, member.name)
	may("who has left the group to see nothing", false, "get")
	host(t, "", "group", "add", group, member.name)
	may("who has come back to see", true, "get")
	// What somebody does to the bindings by hand is undone.
	run(t, "", "delete", "rolebinding", "atoll-view", "-n", n.name)
	may("drift to be put right", true, "get")
	patch(`[]`)
	may("who is on no list to see nothing", false, "get")
}

const limits = `"resources": {
	"cpuLimit": "1800m", "memoryLimit": "1200Mi", "cpuLimitDefault": "200m", "cpuRequestDefault": "10m", "memoryLimitDefault": "64Mi", "memoryRequestDefault": "64Mi",
	"counts": {"podCount": 4, "serviceCount": 1, "configMapCount": 3, "secretCount": 2, "deploymentCount": 1, "statefulSetCount": 0, "jobCount": 1, "virtualMachineCount": 2, "persistentVolumeClaimCount": 3,
		"daemonSetCount": 0, "replicaSetCount": 0, "replicationControllerCount": 0, "volumeSnapshotCount": 0, "virtualMachineSnapshotCount": 0, "contentLibraryItemCount": 1}
}`

// TestTenantQuota: processors, memory and counts bound pods and virtual machines together.
func TestTenantQuota(t *testing.T) {
	t.Parallel()
	n := tenantMachines(t, limits)
	sized := func(name, cpu, memory string) string {
		return strings.Replace(strings.Replace(sleeper, "name: box}", "name: "+name+"}", 1), "name: box, image", fmt.Sprintf("resources: {limits: {cpu: %s, memory: %s}, requests: {cpu: 10m, memory: 64Mi}}, name: box, image", cpu, memory), 1)
	}
	n.editor.apply(n.name, sized("one", "500m", "512Mi")) // 64 MiB more for the micro-VM
	n.editor.apply(n.name, machine("box", "tiny"))        // 192 MiB, and 192 more
	n.power("box", "PoweredOn")
	n.beyond()
	for what, c := range map[string]struct {
		yaml  string
		wants []string
	}{
		"memory":     {sized("two", "100m", "512Mi"), []string{"limits.memory", "requested", "used", "limited", n.name}},
		"processors": {sized("two", "1300m", "64Mi"), []string{"limits.cpu=1", "requested", "used", "limited", n.name}},
		"machines":   {machine("third", "tiny"), []string{"virtualmachines.vmoperator.vmware.com", n.name}},
		"sets":       {`{"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "s"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "busybox"}]}}}}`, []string{"statefulsets.apps"}},
	} {
		t.Log(what)
		n.editor.refused(n.name, c.yaml, append(c.wants, "administrator")...)
	}
	n.counts()
	n.editor.apply(n.name, `{"apiVersion": "imageregistry.vmware.com/v1alpha1", "kind": "ContentLibraryItemImportRequest", "metadata": {"name": "more"}, "spec": {"source": {"url": "https://example.com/disk.img"}, "target": {"library": {"name": "default"}}}}`)
	n.says("contentlibraryitemimportrequest/more", "exceeded quota: "+n.name+"-quota, requested: count/contentlibraryitems.imageregistry.vmware.com=1")
	// What says nothing itself gets the defaults, and a sum that shows.
	n.editor.apply(n.name, strings.Replace(sleeper, "name: box}", "name: plain}", 1))
	equal(t, "defaults", n.field("pod/plain", ".spec.containers[0].resources"), `{"limits":{"cpu":"200m","memory":"64Mi"},"requests":{"cpu":"10m","memory":"64Mi"}}`)
	eventually(t, "the status to count pods and the machine", func() error {
		s, err := n.tryStatus()
		for resource, want := range map[string]string{"memory": "1088Mi/1200Mi", "count/pods": "3/4", "count/virtualmachines": "2/2"} {
			if got := s.used(resource); got != want {
				return fmt.Errorf("%s: got %q, want %q", resource, got, want)
			}
		}
		if len(s.Status.Top) == 0 {
			return fmt.Errorf("nothing is in status.top")
		}
		return err
	})
	// A running pod does not grow past the limit either, nor does the machine: it stays as it is, and says why.
	n.editor.denied([]string{"-n", n.name, "patch", "pod", "one", "--subresource=resize", "-p", `{"spec":{"containers":[{"name":"box","resources":{"limits":{"memory":"1Gi"}}}]}}`}, "limits.memory")
	n.editor.kubectl("-n", n.name, "patch", "vm", "box", "--type=merge", "-p", `{"spec":{"className":"larger"}}`)
	n.lacks("box", "VirtualMachineClassConfigurationSynced", "exceeded quota: "+n.name+"-quota", "limits.memory")
	equal(t, "the machine's memory", n.field("pod/box", ".spec.containers[0].resources.limits.memory"), "192Mi")
	equal(t, "the sum afterwards", n.status().used("memory"), "1088Mi/1200Mi")
	contains(t, n.viewer.kubectl("describe", "supervisornamespace", n.name), "1200Mi")
	// The machine that had no room starts when there is some.
	n.declare(strings.NewReplacer(`"1800m"`, `"3"`, `"1200Mi"`, `"2Gi"`).Replace(limits))
	n.power("other", "PoweredOn")
}

// beyond makes a machine that is more than what is left of processors and memory: it has no pod, and says why.
func (n *tenant) beyond() {
	n.t.Helper()
	n.apply(`{"apiVersion": "vmoperator.vmware.com/v1alpha5", "kind": "VirtualMachineClass", "metadata": {"name": "larger"}, "spec": {"hardware": {"cpus": 1, "memory": "448Mi"}}}`)
	n.editor.apply(n.name, machine("other", "larger"))
	n.lacks("other", "VirtualMachineConditionPlacementReady", "the pod cannot be made", "exceeded quota: "+n.name+"-quota", "requested: limits.cpu=", ",limits.memory=", "used: limits.cpu=", "limited: limits.cpu=1800m,limits.memory=1200Mi", "administrators can change it")
	equal(n.t, "pods of the machine", n.kubectl("get", "pod", "other", "-o", "name", "--ignore-not-found"), "")
}

// lacks waits until a condition of a machine is False and says why.
func (n *tenant) lacks(machine, condition string, wants ...string) {
	n.t.Helper()
	eventually(n.t, condition+" of "+machine+" to be False", func() error {
		said, err := n.tryField("vm/"+machine, `.status.conditions[?(@.type=="`+condition+`")]['status','message']`)
		for _, want := range append(wants, "False") {
			if !strings.Contains(said, want) {
				return fmt.Errorf("it says %q, want %q", said, want)
			}
		}
		return err
	})
}

// counts makes one object after the other of each kind whose number is bounded, until it is enough.
func (n *tenant) counts() {
	n.t.Helper()
	object := func(group, kind, spec string) string {
		return `{"apiVersion": "` + group + `", "kind": "` + kind + `", "metadata": {"name": "NAME"}, "spec": ` + spec + `}`
	}
	const template = `"template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "busybox"}]}}`
	const selected = `{"selector": {"matchLabels": {"a": "b"}}, "replicas": 0, ` + template + `}`
	for resource, c := range map[string]struct {
		text string
		most int
	}{
		"services":               {object("v1", "Service", `{"ports": [{"port": 80}]}`), 1},
		"configmaps":             {`{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "NAME"}}`, 3},
		"secrets":                {`{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "NAME"}}`, 2},
		"persistentvolumeclaims": {object("v1", "PersistentVolumeClaim", `{"storageClassName": "atoll", "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}`), 3},
		"replicationcontrollers": {object("v1", "ReplicationController", `{"selector": {"a": "b"}, "replicas": 0, `+template+`}`), 0},
		"deployments.apps":       {object("apps/v1", "Deployment", selected), 1},
		"replicasets.apps":       {object("apps/v1", "ReplicaSet", selected), 0},
		"daemonsets.apps":        {object("apps/v1", "DaemonSet", `{"selector": {"matchLabels": {"a": "b"}}, `+template+`}`), 0},
		"jobs.batch":             {object("batch/v1", "Job", `{"suspend": true, "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "busybox"}]}}}`), 1},
		"volumesnapshots.snapshot.storage.k8s.io":       {object("snapshot.storage.k8s.io/v1", "VolumeSnapshot", `{"source": {"persistentVolumeClaimName": "none"}}`), 0},
		"virtualmachinesnapshots.vmoperator.vmware.com": {object("vmoperator.vmware.com/v1alpha5", "VirtualMachineSnapshot", `{"vmName": "box"}`), 0},
		"contentlibraryitems.imageregistry.vmware.com":  {object("imageregistry.vmware.com/v1alpha1", "ContentLibraryItem", `{"name": "NAME", "source": {"http": {"url": "https://example.com/disk.img"}}}`), 1},
	} {
		have := func() int {
			return len(strings.Fields(n.kubectl("get", resource, "-o", "name")))
		}
		before, made, said := have(), 0, ""
		for ; made < 6; made++ {
			out, err := n.editor.try(strings.ReplaceAll(c.text, "NAME", fmt.Sprintf("x%d", made)), "-n", n.name, "create", "-f", "-")
			if err != nil {
				said = out
				break
			}
		}
		n.editor.says(said, "exceeded quota: "+n.name+"-quota", "count/"+resource, "used", "limited", "administrator")
		if got := have(); got != c.most || before+made != c.most {
			n.t.Errorf("%s: there were %d, %d could be made, %d are there; the limit is %d", resource, before, made, got, c.most)
		}
	}
}

// TestTenantShrinks: a limit below what is used is taken, shown, evicts nothing and lets nothing more in; then it can
// grow. An administrator does it who has logged in, and only they change what it expands into, which is put right again.
func TestTenantShrinks(t *testing.T) {
	t.Parallel()
	n := administered(t, `"resources": {"memoryLimit": "1Gi", "memoryLimitDefault": "128Mi", "counts": {"podCount": 5}}`)
	n.editor.apply(n.name, sleeper)
	n.ready("box")
	uid := n.field("pod/box", ".metadata.uid")
	n.is("WithinLimits", "True", "")
	n.declare(`"resources": {"memoryLimit": "100Mi", "memoryLimitDefault": "64Mi", "counts": {"podCount": 0}}`)
	n.is("WithinLimits", "False", "memory")
	n.editor.refusedSoon(n.name, strings.Replace(sleeper, "name: box}", "name: other}", 1), "exceeded quota", n.name)
	equal(t, "the pod", n.field("pod/box", ".metadata.uid")+n.field("pod/box", ".status.phase"), uid+"Running")
	equal(t, "exec in it", n.editor.kubectl("-n", n.name, "exec", "box", "--", "echo", "alive"), "alive")
	contains(t, host(t, "", "ns", "describe", n.name), "OverLimit")
	n.declare(`"resources": {"memoryLimit": "1Gi", "memoryLimitDefault": "128Mi", "counts": {"podCount": 5}}`)
	n.is("WithinLimits", "True", "")
	n.editor.applySoon(n.name, strings.Replace(sleeper, "name: box}", "name: other}", 1))
	widen := []string{"-n", n.name, "patch", "resourcequota", n.name + "-quota", "--type=merge", "-p", `{"spec":{"hard":{"limits.memory":"1Ti"}}}`}
	n.owner.denied(widen, "orbidden", "sso:"+n.owner.name+"@atoll.local")
	contains(t, n.administrator.kubectl(widen...), "patched")
	eventually(t, "the quota to be as it is declared", func() error {
		return n.fieldIs("resourcequota/"+n.name+"-quota", `.spec.hard.limits\.memory`, "1Gi")
	})
}

// TestTenantDeletion: it asks for emptiness and says what is in the way; the annotation deletes what is there, and
// nothing stays: no pod, no machine, no volume, no image, no right. An administrator does it who has logged in.
func TestTenantDeletion(t *testing.T) {
	t.Parallel()
	n := administered(t, "")
	n.equip()
	n.editor.docker().artifact(n.name+"/app", 1000)
	n.editor.apply(n.name, claim("data", "atoll", "")+"---"+fmt.Sprintf(writer, "box", "atoll", "data")+"---"+machine("server", "tiny"))
	n.ready("box")
	n.power("server", "PoweredOn")
	rights := []string{"get", "clusterroles,clusterrolebindings", "-l", "atoll.dev/supervisor-namespace=" + n.name, "-o", "name"}
	volumes := []string{"get", "pv", "-o", `jsonpath={range .items[?(@.spec.claimRef.namespace=="` + n.name + `")]}{.metadata.name} {end}`}
	// Projects of others may go while all are looked at.
	project := func() (bool, error) {
		out, err := tryHost(t.Context(), "", "registry", "usage", "-o", "json")
		return strings.Contains(out, `"`+n.name+`"`), err
	}
	contains(t, run(t, "", rights...), "atoll:namespace-owner:"+n.name)
	eventually(t, "the project to be in the registry", func() error {
		there, err := project()
		return errors.Join(err, is(fmt.Sprint(there), "true"))
	})
	kept := strings.Fields(run(t, "", volumes...))
	if len(kept) != 2 {
		t.Fatalf("volumes of the pod and the machine: %q", kept)
	}
	n.editor.denied([]string{"delete", "supervisornamespace", n.name}, "orbidden")
	n.administrator.kubectl("delete", "supervisornamespace", n.name, "--wait=false")
	n.is("Deleting", "True", "2 Pods (box, server)")
	for _, want := range []string{"1 VirtualMachine (server)", "2 PersistentVolumeClaims (", "data", "1 ContentLibraryItem (", "bytes of images in its registry project", "atoll.dev/delete-contents"} {
		contains(t, n.status().condition("Deleting").Message, want)
	}
	equal(t, "the pod meanwhile", n.field("pod/box", ".status.phase"), "Running")
	equal(t, "the machine meanwhile", n.field("vm/server", ".status.powerState"), "PoweredOn")
	equal(t, "the volumes meanwhile", run(t, "", volumes...), strings.Join(kept, " "))
	n.administrator.kubectl("annotate", "supervisornamespace", n.name, "atoll.dev/delete-contents=true")
	eventually(t, "everything to be gone", func() error {
		for _, object := range []string{"supervisornamespace", "namespace"} {
			if out, err := kubectl(t.Context(), "", "get", object, n.name); err == nil || !strings.Contains(out, "NotFound") {
				return fmt.Errorf("%s: %w %s", object, err, out)
			}
		}
		disks, err := tryHost(t.Context(), "", "volume", "ls", "-o", "json")
		if err != nil {
			return err
		}
		for _, name := range kept {
			if strings.Contains(disks, name) {
				return fmt.Errorf("volume %s is still there: %s", name, disks)
			}
		}
		if there, err := project(); err != nil || there {
			return fmt.Errorf("the project is in the registry: %t, %w", there, err)
		}
		for _, args := range [][]string{rights, volumes} {
			if out, err := kubectl(t.Context(), "", args...); err != nil || out != "" {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		return nil
	})
}

// machine is a virtual machine of the tiny image.
func machine(name, class string) string {
	return fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: %s}
spec: {className: %s, imageName: tiny, storageClass: atoll}
`, name, class)
}
