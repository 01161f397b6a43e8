//go:build integration

package registry

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestConformance runs the conformance suite of the OCI distribution specification, which is pinned in
// tools/conformance, against the registry. It fails when something that has worked fails; what does not is listed.
func TestConformance(t *testing.T) {
	program := filepath.Join(t.TempDir(), "conformance")
	build := exec.Command("go", "build", "-o", program, "github.com/opencontainers/distribution-spec/conformance")
	build.Dir = filepath.Join("..", "..", "tools", "conformance")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the suite: %v\n%s", err, out)
	}
	h := start(t)
	results := t.TempDir()
	run := exec.Command(program)
	run.Dir = results
	run.Env = append(os.Environ(), "OCI_REGISTRY="+h.host(), "OCI_TLS=insecure", "OCI_REPO1=shop/one", "OCI_REPO2=shop/two",
		"OCI_USERNAME=olga", "OCI_PASSWORD="+passwords()["olga"], "OCI_RESULTS_DIR="+results, "OCI_VERSION=1.1")
	out, err := run.CombinedOutput()
	t.Logf("%v\n%s", err, tail(string(out), 60))
	junit, err := os.ReadFile(filepath.Join(results, "junit.xml"))
	if err != nil {
		t.Fatal(err)
	}
	failed := failures(string(junit))
	known := map[string]bool{}
	text, err := os.ReadFile(filepath.Join("testdata", "conformance-failures.json"))
	if err == nil {
		var list []string
		if err := json.Unmarshal(text, &list); err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			known[n] = true
		}
	}
	for _, f := range failed {
		if !known[f] {
			t.Errorf("fails: %s", f)
		}
	}
	t.Logf("%d of %d tests fail", len(failed), strings.Count(string(junit), "<testcase "))
}

// failures are the names of the test cases of a report that failed.
func failures(junit string) []string {
	var out []string
	for _, c := range strings.Split(junit, "<testcase ")[1:] {
		if !strings.Contains(c, "<failure") && !strings.Contains(c, "<error") {
			continue
		}
		_, rest, _ := strings.Cut(c, `name="`)
		name, _, _ := strings.Cut(rest, `"`)
		out = append(out, name)
	}
	return out
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
