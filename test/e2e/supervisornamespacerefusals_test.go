//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// bad is a SupervisorNamespace, a template or what an administrator types, that must be refused.
type bad struct{ what, name, spec string }

// TestSupervisorNamespaceRefusals: what an administrator gets wrong is refused, with the field and what is wrong with it.
func TestSupervisorNamespaceRefusals(t *testing.T) {
	t.Parallel()
	administrator := newActor(t, "e2e-refusals", "administrators")
	const name = "e2e-refused"
	t.Cleanup(func() {
		_, _ = kubectl(context.Background(), "", "delete", "svns", name, "--ignore-not-found", "--wait=false")
	})
	apply := func(b bad) (string, error) {
		return administrator.try(fmt.Sprintf("apiVersion: atoll.dev/v1alpha1\nkind: SupervisorNamespace\nmetadata: {name: %s}\nspec: %s\n", b.name, b.spec), "apply", "-f", "-")
	}
	for _, c := range []struct {
		bad
		wants []string
	}{
		{bad{"an amount that is none", name, `{resources: {memoryLimit: lots}}`}, []string{"spec.resources.memoryLimit", `"lots"`}},
		{bad{"an amount below zero", name, `{resources: {cpuLimit: "-1"}}`}, []string{"spec.resources.cpuLimit", "must not be negative"}},
		{bad{"a count below zero", name, `{resources: {counts: {podCount: -1}}}`}, []string{"spec.resources.counts.podCount", "greater than or equal to 0"}},
		{bad{"a count that is none", name, `{resources: {counts: {podCount: many}}}`}, []string{"spec.resources.counts.podCount", "integer"}},
		{bad{"more reserved than there may be", name, `{resources: {memoryLimit: 1Gi, memoryReservation: 2Gi}}`}, []string{"spec.resources.memoryReservation", "is above memoryLimit", "1Gi"}},
		{bad{"a default that is above the limit", name, `{resources: {cpuLimit: "1", cpuLimitDefault: "2"}}`}, []string{"spec.resources.cpuLimitDefault", "is above cpuLimit"}},
		{bad{"more of a storage class than of all", name, `{resources: {storageRequestLimit: 1Gi}, storageClasses: [{name: atoll, limit: 2Gi}]}`}, []string{"spec.storageClasses[0].limit", "is above resources.storageRequestLimit"}},
		{bad{"a list with nothing in it", name, `{vmClasses: []}`}, []string{"spec.vmClasses", "an empty list is ambiguous", "leave it out"}},
		{bad{"two of one name", name, `{hosts: [a, a]}`}, []string{"spec.hosts[1]", "Duplicate"}},
		{bad{"two roles for one", name, `{accessList: [{subjectType: User, subject: a, role: Owner}, {subjectType: User, subject: a, role: View}]}`}, []string{"spec.accessList[1]", "already with role Owner", "keep one of them"}},
		{bad{"a role that is none", name, `{accessList: [{subjectType: User, subject: a, role: King}]}`}, []string{"spec.accessList[0].role", "King", "Owner"}},
		{bad{"a person with prefix", name, `{accessList: [{subjectType: User, subject: "sso:a@atoll.local", role: Edit}]}`}, []string{"spec.accessList[0].subject"}},
		{bad{"a network that is none", name, `{network: {isolation: DenyAll, egressCIDRs: [192.0.2.0/33]}}`}, []string{"spec.network.egressCIDRs[0]", "192.0.2.0/33"}},
		{bad{"a mode that is none", name, `{network: {isolation: Closed}}`}, []string{"spec.network.isolation", "Closed", "Isolated"}},
		{bad{"a class of encryption without encryption", name, `{encryption: {className: corp}}`}, []string{"spec.encryption.className", "encryption.required"}},
		{bad{"a pattern that is none", name, `{registry: {immutableTags: ["["]}}`}, []string{"spec.registry.immutableTags[0]"}},
		{bad{"a field that is not there", name, `{resources: {memoryLimits: 1Gi}}`}, []string{"memoryLimits", "unknown field"}},
		{bad{"a template that is not there", name, `{className: e2e-none}`}, []string{"spec.className", "e2e-none", "does not exist"}},
		{bad{"a name of the system", "kube-mine", `{}`}, []string{"kube-mine", "system's own namespaces", "choose another"}},
		{bad{"the name of the library", "library", `{}`}, []string{"library", "choose another"}},
		{bad{"a name with a dot", "a.b", `{}`}, []string{"a.b", "DNS label"}},
	} {
		out, err := apply(c.bad)
		if err == nil {
			t.Errorf("%s was accepted", c.what)
			run(t, "", "delete", "svns", c.name, "--wait=false")
			continue
		}
		for _, want := range c.wants {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %q is not in: %s", c.what, want, out)
			}
		}
	}
	staleObject(t, administrator, name, apply)
	templateCycle(t, administrator)
}

// staleObject: of two administrators who edit the same object, the second is told.
func staleObject(t *testing.T, administrator *actor, name string, apply func(bad) (string, error)) {
	t.Helper()
	if _, err := apply(bad{"good", name, `{resources: {memoryLimit: 1Gi}}`}); err != nil {
		t.Fatal(err)
	}
	// The controller writes as well, so that what the first has read must be the last of it.
	administrator.kubectl("wait", "svns/"+name, "--for=condition=Ready", timeout(patience))
	mine := administrator.kubectl("get", "svns", name, "-o", "yaml")
	run(t, "", "patch", "svns", name, "--type=merge", "-p", `{"spec":{"resources":{"memoryLimit":"2Gi"}}}`)
	out, err := administrator.try(strings.Replace(mine, "memoryLimit: 1Gi", "memoryLimit: 3Gi", 1), "replace", "-f", "-")
	if err == nil || !strings.Contains(out, "the object has been modified") {
		t.Errorf("replacing what another has changed meanwhile: %v\n%s", err, out)
	}
	equal(t, "the limit", administrator.kubectl("get", "svns", name, "-o", "jsonpath={.spec.resources.memoryLimit}"), "2Gi")
}

// templateCycle: templates are not based on each other.
func templateCycle(t *testing.T, administrator *actor) {
	t.Helper()
	template := func(name, base string) string {
		return fmt.Sprintf("apiVersion: atoll.dev/v1alpha1\nkind: SupervisorNamespaceTemplate\nmetadata: {name: %s}\nspec: {basedOn: %q, template: {resources: {memoryLimit: 1Gi}}}\n", name, base)
	}
	t.Cleanup(func() {
		_, _ = kubectl(context.Background(), "", "delete", "svnstemplate", "e2e-chicken", "e2e-egg", "--ignore-not-found")
	})
	administrator.refused("default", template("e2e-chicken", "e2e-none"), "spec.basedOn", "e2e-none", "does not exist")
	administrator.apply("default", template("e2e-chicken", ""))
	administrator.apply("default", template("e2e-egg", "e2e-chicken"))
	administrator.refused("default", template("e2e-chicken", "e2e-egg"), "spec.basedOn", "e2e-chicken -> e2e-egg -> e2e-chicken")
	administrator.refused("default", strings.Replace(template("e2e-egg", ""), "memoryLimit: 1Gi", "memoryLimit: lots", 1), "spec.template.resources.memoryLimit", `"lots"`)
}

// TestSupervisorNamespaceReferences: what a spec names and is not there is told in a condition, by its field, and counts
// when it comes; a Namespace that exists is taken over only when an administrator says so.
func TestSupervisorNamespaceReferences(t *testing.T) {
	t.Parallel()
	name := newNamespace(t).name
	n := &tenant{namespace: &namespace{t: t, name: name}}
	run(t, "", "label", "namespace", name, "team=before")
	t.Cleanup(func() { // newNamespace deletes the Namespace, which deletes this
		_, _ = kubectl(context.Background(), "", "annotate", "svns", name, "atoll.dev/delete-contents=true", "--overwrite")
	})
	class, person := name+"-class", name+"-person"
	run(t, fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: SupervisorNamespace
metadata: {name: %s}
spec:
  accessList: [{subjectType: User, subject: %s, role: View}, {subjectType: Group, subject: staff, domain: nowhere.example, role: View}]
  storageClasses: [{name: %s}]
  vmClasses: [{name: huge}]
  hosts: [elsewhere]
`, name, person, class), "apply", "-f", "-")
	n.is("Ready", "False", "atoll.dev/adopt=true")
	if out, err := n.try("get", "resourcequota", name+"-quota"); err == nil {
		t.Errorf("something was put into somebody else's namespace: %s", out)
	}
	run(t, "", "annotate", "svns", name, "atoll.dev/adopt=true")
	for _, want := range []string{"spec.storageClasses[0]: StorageClass " + class + " does not exist", "spec.vmClasses[0]: VirtualMachineClass huge", "spec.hosts[0]: host elsewhere"} {
		n.is("Ready", "False", want)
	}
	n.is("PeopleKnown", "False", "spec.accessList[0]: User "+person+" does not exist")
	n.is("PeopleKnown", "False", "spec.accessList[1]: no IdentityProvider has domain nowhere.example")
	newActor(t, person)
	n.storageClass(class, "")
	run(t, "", "patch", "svns", name, "--type=json", "-p", `[{"op": "remove", "path": "/spec/accessList/1"}, {"op": "remove", "path": "/spec/vmClasses"}, {"op": "remove", "path": "/spec/hosts"}]`)
	n.is("PeopleKnown", "True", "")
	n.is("Ready", "True", "")
	equal(t, "the label from before", n.field("namespace/"+name, ".metadata.labels.team"), "before")
}

// TestNamespaceForItsPeople: owners and viewers see limits and use with `atoll ns`, for people and for programs, and
// nothing of other namespaces. A template that becomes stricter holds for what was made from it.
func TestNamespaceForItsPeople(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", `"resources": {"memoryLimit": "3Gi", "counts": {"configMapCount": 7}}`)
	stranger := newActor(t, n.name+"-stranger")
	ns := func(p *actor, args ...string) string {
		t.Helper()
		out, err := p.atoll("", append([]string{"ns"}, args...)...)
		if err != nil {
			t.Errorf("as %s: %v", p.name, err)
		}
		return out
	}
	for _, p := range []*actor{n.owner, n.viewer} {
		contains(t, ns(p, "ls"), n.name)
		for _, want := range []string{"Owners:", n.owner.name, "of 3 GiB"} {
			contains(t, ns(p, "describe", n.name), want)
		}
		ns(p, "top", n.name)
		for _, args := range [][]string{{"ls", n.name, "-o", "json"}, {"ls", n.name, "-o", "yaml"}} {
			contains(t, ns(p, args...), n.name)
		}
		var list any
		if out := ns(p, "ls", n.name, "-o", "json"); json.Unmarshal([]byte(out), &list) != nil {
			t.Errorf("no JSON: %s", out)
		}
		if out, err := p.atoll("", "ns", "edit", n.name, "--memory-limit", "4Gi"); err == nil || !strings.Contains(out, "administrator") && !strings.Contains(out, "forbidden") {
			t.Errorf("%s raises a limit: %v\n%s", p.name, err, out)
		}
	}
	if out, err := stranger.atoll("", "ns", "describe", n.name); err == nil || strings.Contains(out, "3 GiB") {
		t.Errorf("a stranger sees it: %v\n%s", err, out)
	}
	if out, _ := stranger.atoll("", "ns", "ls"); strings.Contains(out, n.name) {
		t.Errorf("a stranger lists it:\n%s", out)
	}

	template, made := n.name+"-template", n.name+"-made"
	t.Cleanup(func() {
		ctx := context.Background()
		_, _ = kubectl(ctx, "", "delete", "svns", made, "--ignore-not-found", timeout(longPatience))
		_, _ = kubectl(ctx, "", "delete", "svnstemplate", template, "--ignore-not-found")
	})
	run(t, fmt.Sprintf("apiVersion: atoll.dev/v1alpha1\nkind: SupervisorNamespaceTemplate\nmetadata: {name: %s}\nspec: {template: {resources: {memoryLimit: 3Gi}}, selfService: {enabled: true, maxPerUser: 1}}\n", template), "apply", "-f", "-")
	mine := strings.NewReplacer("anna-tests", made, "className: small", "className: "+template).Replace(example(t, "namespaces/mine.yaml"))
	if out, err := n.owner.try(mine, "create", "-f", "-"); err != nil {
		t.Fatal(err, out)
	}
	own := &tenant{namespace: &namespace{t: t, name: made}}
	own.settled()
	limit := func() string { return own.field("resourcequota/"+made+"-quota", `.spec.hard.limits\.memory`) }
	equal(t, "the limit", limit(), "2Gi")
	run(t, "", "patch", "svnstemplate", template, "--type=merge", "-p", `{"spec":{"template":{"resources":{"memoryLimit":"1Gi"}}}}`)
	own.is("WithinTemplate", "False", "spec.resources.memoryLimit")
	equal(t, "the limit of a stricter template", limit(), "1Gi")
	run(t, "", "patch", "svns", made, "--type=merge", "-p", `{"spec":{"resources":{"memoryLimit":"5Gi"}}}`) // an administrator may
	eventually(t, "what an administrator has widened", func() error {
		if got := limit(); got != "5Gi" {
			return fmt.Errorf("the limit is %s", got)
		}
		return nil
	})
}

// TestTenantVolumeClasses: volumes have the EncryptionClass that the administrator names, which nobody else makes, and
// the VolumeAttributesClasses of their policy.
func TestTenantVolumeClasses(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	n.want(`"encryption": {"required": true, "className": "corp"}, "storageClasses": [{"name": "atoll", "volumeAttributesClasses": ["slow"]}]`)
	n.is("Ready", "False", "spec.encryption.className: EncryptionClass "+n.name+"/corp does not exist")
	const corp = `
apiVersion: encryption.vmware.com/v1alpha1
kind: EncryptionClass
metadata: {name: corp}
spec: {keyProvider: default}
`
	n.owner.refusedSoon(n.name, corp, bounded(n, "spec.encryption.className", "which only administrators make")...)
	n.apply(corp)
	n.settled()
	n.owner.denied([]string{"-n", n.name, "delete", "encryptionclass", "corp"}, "spec.encryption.className")

	const annotation = "csi.vsphere.encryption-class"
	eventually(t, "a claim that says nothing to have the class", func() error {
		out, err := n.editor.try(claim("data", "atoll", ""), "-n", n.name, "create", "--dry-run=server", "-o", "yaml", "-f", "-")
		if err != nil || !strings.Contains(out, annotation+": corp") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	n.editor.refusedSoon(n.name, strings.Replace(claim("data", "atoll", ""), "{name: data}", "{name: data, annotations: {"+annotation+": mine}}", 1), bounded(n, "spec.encryption.className", "only corp", `"mine"`)...)
	n.editor.refusedSoon(n.name, claim("data", "atoll", ", volumeAttributesClassName: fast"), bounded(n, "spec.storageClasses[0].volumeAttributesClasses", "only slow", `"fast"`)...)
	if out, err := n.editor.try(claim("data", "atoll", ", volumeAttributesClassName: slow"), "-n", n.name, "create", "--dry-run=server", "-f", "-"); err != nil {
		t.Errorf("a class that may be used: %v\n%s", err, out)
	}
}
