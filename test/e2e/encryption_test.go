//go:build e2e

package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// classCondition waits for a condition of an EncryptionClass; its message holds the text.
func (n *namespace) classCondition(class, kind, status, text string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("condition %s of %s to be %s", kind, class, status), func() error {
		got, err := n.tryField("encryptionclass/"+class, fmt.Sprintf(".status.conditions[?(@.type=='%s')]['status','message']", kind))
		if err != nil || !strings.HasPrefix(got, status+" ") || !strings.Contains(got, text) {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// atollOK runs a command of atoll on the suite's data directory and returns what it said.
func atollOK(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), suite.atoll, append(args, "--data-dir", suite.dataDir)...).CombinedOutput()
	if err != nil {
		t.Fatalf("atoll %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestEncryptionClass: a claim names a class as on vSphere; the class says what is wrong with its key; keys
// rotate while the volume is in use, and the old one can go.
func TestEncryptionClass(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	provider := n.name + "-corp"
	t.Cleanup(func() { _, _ = kubectl(context.Background(), "", "delete", "secret", provider, "-n", "atoll-keys") })
	class := func(name, provider, key string) {
		n.apply(fmt.Sprintf(`
apiVersion: encryption.vmware.com/v1alpha1
kind: EncryptionClass
metadata: {name: %s}
spec: {keyProvider: %s, keyID: %q}
`, name, provider, key))
	}
	class("gold", provider, "first")
	n.classCondition("gold", "Ready", "False", fmt.Sprintf("no key provider %q", provider))
	n.apply(strings.Replace(claim("data", "atoll", ""), "{name: data}", `{name: data, annotations: {csi.vsphere.encryption-class: gold}}`, 1))
	n.apply(fmt.Sprintf(writer, "one", "atoll", "data"))
	n.says("pvc/data", "atoll-keys/"+provider)
	ones := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("1", 32)))
	run(t, "", "create", "secret", "generic", provider, "-n", "atoll-keys", "--from-literal=second="+strings.Repeat("2", 32))
	n.classCondition("gold", "Ready", "False", `no key "first"`)
	secret := func(patch string) {
		t.Helper()
		run(t, "", "patch", "secret", provider, "-n", "atoll-keys", "--type=json", "-p", patch)
	}
	secret(fmt.Sprintf(`[{"op": "add", "path": "/data/first", "value": "%s"}]`, ones))
	n.classCondition("gold", "Ready", "True", `key "first"`)
	n.ready("one")
	n.exec("one", "sh", "-c", "echo kept > /data/file && sync")
	n.classCondition("gold", "KeysCurrent", "True", "1 of 1")
	contains(t, atollOK(t, "volume", "ls", "--datastore", "default", "-o", "wide"), provider+"/first")

	// Another key, by the object.
	class("gold", provider, "second")
	eventually(t, "the second key", func() error {
		if got, err := n.tryField("encryptionclass/gold", ".status.keyID"); err != nil || got != "second" {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	n.classCondition("gold", "KeysCurrent", "True", "1 of 1")
	secret(`[{"op": "remove", "path": "/data/first"}]`)

	// By the command, and then another pod with neither of the old keys.
	contains(t, atollOK(t, "encryption", "rotate", n.name+"/gold"), "was made")
	contains(t, atollOK(t, "encryption", "ls"), n.name+"/gold")
	secret(`[{"op": "remove", "path": "/data/second"}]`)
	n.kubectl("delete", "pod", "one")
	n.apply(fmt.Sprintf(writer, "two", "atoll", "data"))
	n.ready("two")
	equal(t, "after rotation", n.exec("two", "cat", "/data/file"), "kept")

	// The claim names another class; the first one is not needed any more.
	class("silver", provider, "")
	n.kubectl("annotate", "--overwrite", "pvc", "data", "csi.vsphere.encryption-class=silver")
	n.says("pvc/data", "EncryptionClassChanged")
	n.classCondition("silver", "KeysCurrent", "True", "1 of 1")
	n.kubectl("delete", "encryptionclass", "gold")
	n.kubectl("delete", "pod", "two")

	// The volume's own key.
	handle := "default/" + n.bound("data")
	eventually(t, "a new key of the volume", func() error {
		out, err := exec.CommandContext(t.Context(), suite.atoll, "volume", "rotate-key", handle, "--data-dir", suite.dataDir).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out) // the pod has the volume still
		}
		return nil
	})

	// Another key under the name of the one that the volume needs.
	id := n.field("encryptionclass/silver", ".status.keyID")
	good := run(t, "", "get", "secret", provider, "-n", "atoll-keys", "-o", fmt.Sprintf("jsonpath={.data['%s']}", id))
	set := func(value string) {
		secret(fmt.Sprintf(`[{"op": "replace", "path": "/data/%s", "value": "%s"}]`, id, value))
	}
	set(ones)
	n.classCondition("silver", "KeysCurrent", "False", "another key")
	n.apply(fmt.Sprintf(writer, "three", "atoll", "data"))
	n.says("pod/three", "another key")
	set(good)
	n.ready("three")
	equal(t, "in the end", n.exec("three", "cat", "/data/file"), "kept")
}
