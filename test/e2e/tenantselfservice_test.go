//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTenantSelfService: an owner makes a namespace from a template, within it, and so does who is listed; nobody else does.
func TestTenantSelfService(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	guest, stranger := newActor(t, n.name+"-guest"), newActor(t, n.name+"-stranger")
	template := n.name + "-template"
	n.clusterObject("supervisornamespacetemplate", template, fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: SupervisorNamespaceTemplate
metadata: {name: %s}
spec:
  selfService: {enabled: true, maxPerUser: 1, subjects: [{subjectType: User, subject: %s}]}
  template:
    resources: {memoryLimit: 2Gi, counts: {podCount: 5}}
    storageClasses: [{name: atoll, limit: 1Gi}]
    network: {isolation: Isolated}
`, template, guest.name))
	object := func(name, class, rest string) string {
		return fmt.Sprintf(`{"apiVersion": "atoll.dev/v1alpha1", "kind": "SupervisorNamespace", "metadata": {"name": %q}, "spec": {%s%s}}`, name, class, rest)
	}
	other := newTenant(t, "-other", "")
	plain := n.name + "-plain" // a Namespace without bounds
	n.clusterObject("namespace", plain, "{apiVersion: v1, kind: Namespace, metadata: {name: "+plain+"}}")
	mine, class := n.name+"-mine", fmt.Sprintf(`"className": %q`, template)
	create := func(p *actor, text string) (string, error) { return p.try(text, "create", "-f", "-") }
	t.Cleanup(func() {
		_, _ = kubectl(context.Background(), "", "delete", "supervisornamespace", mine, mine+"3", "--ignore-not-found")
	})
	n.owner.mayCreate("supervisornamespaces.atoll.dev")
	for what, c := range map[string]struct {
		who  *actor
		text string
		want string
	}{
		"editor":     {n.editor, object(mine, class, ""), "forbidden"},
		"stranger":   {stranger, object(mine, class, ""), "forbidden"},
		"viewer":     {n.viewer, object(mine, class, ""), "forbidden"},
		"no class":   {n.owner, object(mine, "", ""), "className"},
		"wider":      {n.owner, object(mine, class, `, "resources": {"memoryLimit": "4Gi"}`), "memoryLimit"},
		"privileged": {n.owner, object(mine, class, `, "podRuntime": {"privilegedAllowed": true}`), "privilegedAllowed"},
		"open":       {n.owner, object(mine, class, `, "network": {"isolation": "Open"}`), "isolation"},
		"storage":    {n.owner, object(mine, class, `, "storageClasses": [{"name": "gold"}]`), "storageClasses"},
		"system":     {n.owner, object("kube-system", class, ""), "kube-system"},
		"system too": {n.owner, object("default", class, ""), "default"},
		"taken":      {n.owner, object(plain, class, ""), "there is a Namespace " + plain + " already: choose another name"},
		"another's":  {n.owner, object(other.name, class, ""), "there is a Namespace " + other.name + " already: choose another name"},
		"adopted":    {n.owner, strings.Replace(object(plain, class, ""), `"metadata": {`, `"metadata": {"annotations": {"atoll.dev/adopt": "true"}, `, 1), "only an administrator sets annotation atoll.dev/adopt"},
	} {
		if out, err := create(c.who, c.text); err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v, want a refusal with %q\n%s", what, err, c.want, out)
		}
	}
	if out, err := create(n.owner, object(mine, class, `, "resources": {"memoryLimit": "1Gi"}`)); err != nil {
		t.Fatal(err, out)
	}
	n.owner.applySoon(mine, "{apiVersion: v1, kind: ConfigMap, metadata: {name: works}}")
	equal(t, "the limit", run(t, "", "get", "resourcequota", mine+"-quota", "-n", mine, "-o", `jsonpath={.spec.hard.limits\.memory}`), "1Gi")
	equal(t, "isolation from the template", run(t, "", "get", "supervisornamespace", mine, "-o", "jsonpath={.status.effective.network.isolation}"), "Isolated")
	if out, err := create(n.owner, object(mine+"2", class, "")); err == nil || !strings.Contains(out, "has 1 namespaces of SupervisorNamespaceTemplate "+template+", which allows 1 for each user") {
		t.Errorf("a second one: %v\n%s", err, out)
	}
	n.editor.denied([]string{"-n", mine, "get", "configmaps"}, "forbidden")
	n.editor.denied([]string{"delete", "supervisornamespace", mine}, "forbidden")
	n.owner.denied([]string{"patch", "supervisornamespace", mine, "--type=merge", "-p", `{"spec":{"resources":{"memoryLimit":"64Gi"}}}`}, "spec.resources.memoryLimit", "64Gi", "is above that of the template")
	equal(t, "the limit afterwards", run(t, "", "get", "resourcequota", mine+"-quota", "-n", mine, "-o", `jsonpath={.spec.hard.limits\.memory}`), "1Gi")
	n.owner.kubectl("-n", mine, "delete", "configmap", "works")
	n.owner.kubectl("delete", "supervisornamespace", mine, timeout(longPatience))
	// Who is listed owns no namespace before, and what is made is theirs.
	text := object(mine, class, "")
	eventually(t, "who is listed to make one", func() error {
		_, err := create(guest, text)
		if err != nil && n.fieldIs("svns/"+mine, `.metadata.annotations.atoll\.dev/creator`, "sso:"+guest.name+"@atoll.local") == nil {
			return nil // only the answer got lost
		}
		return err
	})
	eventually(t, "who is listed to work in it", func() error {
		_, err := guest.try("", "-n", mine, "get", "configmaps")
		return err
	})
	if out, err := create(guest, object(mine+"2", class, "")); err == nil || !strings.Contains(out, "which allows 1 for each user") {
		t.Errorf("a second one of who is listed: %v\n%s", err, out)
	}
	stranger.denied([]string{"-n", mine, "get", "configmaps"}, "forbidden")
	run(t, "", "patch", "supervisornamespacetemplate", template, "--type=merge", "-p", `{"spec":{"selfService":{"subjects":[]}}}`)
	guest.kubectl("delete", "supervisornamespace", mine, timeout(longPatience))
	eventually(t, "who is listed no more to make none", func() error {
		out, err := create(guest, strings.Replace(text, mine, mine+"3", 1))
		if err == nil {
			_, err = guest.try("", "delete", "supervisornamespace", mine+"3", timeout(longPatience))
			return errors.Join(errors.New("they did"), err)
		}
		return is(fmt.Sprint(strings.Contains(out, "forbidden")), "true")
	})
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
