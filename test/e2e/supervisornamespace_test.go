//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// supervisorNamespace makes one and waits until it is ready. What it has been used for is removed with it.
func supervisorNamespace(t *testing.T, name, spec string) *namespace {
	t.Helper()
	t.Cleanup(func() {
		ctx := context.Background()
		_, _ = kubectl(ctx, "", "annotate", "svns", name, "atoll.dev/delete-contents=true", "--overwrite")
		_, _ = kubectl(ctx, "", "delete", "svns", name, "--ignore-not-found", "--wait=false")
	})
	run(t, fmt.Sprintf("apiVersion: atoll.dev/v1alpha1\nkind: SupervisorNamespace\nmetadata: {name: %s}\nspec: %s\n", name, spec), "apply", "-f", "-")
	run(t, "", "wait", "svns/"+name, "--for=condition=Ready", timeout(patience))
	n := &namespace{t: t, name: name}
	n.account()
	return n
}

// TestSupervisorNamespaceLife: pods run within limits, drift is put right, shrinking evicts nothing, and deletion is
// refused while something is in it.
func TestSupervisorNamespaceLife(t *testing.T) {
	t.Parallel()
	n := supervisorNamespace(t, "e2e-life", `
  resources: {cpuLimit: "2", memoryLimit: 1Gi, storageRequestLimit: 1Gi, counts: {podCount: 2}}
  storageClasses: [{name: atoll, limit: 512Mi}]
  accessList: [{subjectType: User, subject: e2e-olga, role: Owner}]
  network: {isolation: Isolated}`)
	n.apply(script("web", "sleep infinity"))
	n.ready("web")
	eventually(t, "the use to be in the status", func() error {
		if got, err := n.tryField("svns/e2e-life", ".status.memory"); err != nil || got != "576Mi/1Gi" {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	contains(t, n.refused(claimOf("big", "atoll", "ReadWriteOnce", "1Gi", "")), "exceeded quota: e2e-life-storagequota")

	// Drift.
	n.kubectl("delete", "resourcequota", "e2e-life-quota")
	n.kubectl("label", "namespace", "e2e-life", "pod-security.kubernetes.io/enforce=privileged", "--overwrite")
	eventually(t, "drift to be put right", func() error {
		hard, err := n.try("get", "resourcequota", "e2e-life-quota", "-o", `jsonpath={.spec.hard.limits\.memory}`)
		if err != nil {
			return err
		}
		level, err := n.tryField("namespace/e2e-life", `.metadata.labels.pod-security\.kubernetes\.io/enforce`)
		if err != nil || hard != "1Gi" || level != "baseline" {
			return fmt.Errorf("%q, %q", hard, level)
		}
		return nil
	})

	// Shrinking.
	n.kubectl("patch", "svns", "e2e-life", "--type=merge", "-p", `{"spec":{"resources":{"memoryLimit":"256Mi"}}}`)
	eventually(t, "the condition to say what is over its limit", func() error {
		if got, err := n.tryField("svns/e2e-life", `.status.conditions[?(@.type=="WithinLimits")].message`); err != nil || !strings.Contains(got, "memory: 576Mi used, the limit is 256Mi") {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	second := script("second", "sleep infinity")
	eventually(t, "the quota to count", func() error { // what admission compares with is written a moment later
		out, err := kubectl(t.Context(), second, "-n", n.name, "apply", "--dry-run=server", "-f", "-")
		if err == nil || !strings.Contains(out, "limits.memory") {
			return fmt.Errorf("%q is not in: %s", "limits.memory", out)
		}
		return nil
	})
	contains(t, n.refused(second), "limits.memory")
	n.exec("web", "true")

	// Deletion.
	out, err := n.try("delete", "namespace", "e2e-life", "--wait=false")
	if err == nil {
		t.Error("the Namespace was deleted with what was in it")
	}
	contains(t, out, "1 Pod (web)")
	n.kubectl("delete", "svns", "e2e-life", "--wait=false")
	eventually(t, "the deletion to say what it waits for", func() error {
		if got, err := n.tryField("svns/e2e-life", `.status.conditions[?(@.type=="Deleting")].message`); err != nil || !strings.Contains(got, "1 Pod (web)") {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	n.exec("web", "true")
	n.kubectl("annotate", "svns", "e2e-life", "atoll.dev/delete-contents=true")
	run(t, "", "wait", "svns/e2e-life", "--for=delete", timeout(longPatience))
	if out, err := kubectl(t.Context(), "", "get", "namespace", "e2e-life"); err == nil {
		t.Errorf("the Namespace is still there: %s", out)
	}
}

// TestSupervisorNamespaceSelfService: an owner makes namespaces from a template, within it, and nobody else does.
func TestSupervisorNamespaceSelfService(t *testing.T) {
	t.Parallel()
	supervisorNamespace(t, "e2e-owned", `{accessList: [{subjectType: User, subject: e2e-otto, role: Owner}]}`)
	suite.template.Lock()
	t.Cleanup(func() {
		defer suite.template.Unlock()
		ctx := context.Background()
		for _, name := range []string{"e2e-made", "e2e-quick"} {
			_, _ = kubectl(ctx, "", "annotate", "svns", name, "atoll.dev/delete-contents=true", "--overwrite")
			_, _ = kubectl(ctx, "", "delete", "svns", name, "--ignore-not-found", timeout(patience))
		}
		_, _ = kubectl(ctx, "", "delete", "svnstemplate", "e2e-team", "--ignore-not-found")
	})
	run(t, `
apiVersion: atoll.dev/v1alpha1
kind: SupervisorNamespaceTemplate
metadata: {name: e2e-team}
spec:
  template: {resources: {memoryLimit: 1Gi}, network: {isolation: Isolated}}
  selfService: {enabled: true, maxPerUser: 2, default: true}
`, "apply", "-f", "-")
	as := func(user, stdin string, args ...string) (string, error) {
		return kubectl(t.Context(), stdin, append(args, "--as=sso:"+user+"@atoll.local", "--as-group=system:authenticated")...)
	}
	made := func(limit string) string {
		return fmt.Sprintf("apiVersion: atoll.dev/v1alpha1\nkind: SupervisorNamespace\nmetadata: {name: e2e-made}\nspec: {className: e2e-team, resources: {memoryLimit: %s}}\n", limit)
	}
	eventually(t, "an owner to be allowed to make namespaces", func() error {
		out, err := as("e2e-otto", "", "auth", "can-i", "create", "supervisornamespaces.atoll.dev")
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
	for user, limit := range map[string]string{"e2e-mallory": "1Gi", "e2e-otto": "2Gi"} {
		if out, err := as(user, made(limit), "create", "-f", "-"); err == nil {
			t.Errorf("%s made a namespace with %s: %s", user, limit, out)
		}
	}
	if out, err := as("e2e-otto", made("1Gi"), "create", "-f", "-"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, "its owner to see that it is ready", func() error {
		out, err := as("e2e-otto", "", "wait", "svns/e2e-made", "--for=condition=Ready", timeout(patience))
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
	if out, err := as("e2e-otto", "", "create", "namespace", "e2e-quick"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, "the namespace to be usable", func() error {
		out, err := as("e2e-otto", script("web", "sleep infinity"), "apply", "-n", "e2e-quick", "-f", "-")
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
	quick := &namespace{t: t, name: "e2e-quick"}
	quick.ready("web")
	if got := quick.field("networkpolicy/atoll-isolation", `.metadata.labels.atoll\.dev/tier`); got != "administrator" {
		t.Errorf("the tier of the isolation is %q", got)
	}
	if out, err := as("e2e-otto", "", "create", "namespace", "e2e-third"); err == nil || !strings.Contains(out, "allows 2 for each user") {
		t.Errorf("one too many: %v: %s", err, out)
	}
	// While it is being deleted it keeps its finalizer, so that the Namespace with what runs in it is not left behind.
	if out, err := as("e2e-otto", script("stay", "sleep infinity"), "apply", "-n", "e2e-made", "-f", "-"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := as("e2e-otto", "", "delete", "svns", "e2e-made", "--wait=false"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := as("e2e-otto", "", "patch", "svns", "e2e-made", "--type=merge", "-p", `{"metadata":{"finalizers":[]}}`); err == nil || !strings.Contains(out, "only an administrator changes finalizers") {
		t.Errorf("the finalizer: %v: %s", err, out)
	}
	if out, err := as("e2e-otto", "", "delete", "pod", "web", "-n", "e2e-quick", "--grace-period=1"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := as("e2e-otto", "", "delete", "namespace", "e2e-quick", "--wait=false"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run(t, "", "wait", "svns/e2e-quick", "--for=delete", timeout(longPatience))
}
