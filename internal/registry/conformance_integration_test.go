//go:build integration

package registry

import (
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestConformance runs the conformance suite of the OCI distribution specification, which is pinned in
// tools/conformance, against the registry: all of version 1.1 but manifests and uploads by sha512, which distribution
// does not know.
func TestConformance(t *testing.T) {
	program := filepath.Join(t.TempDir(), "conformance")
	build := exec.Command("go", "build", "-o", program, "github.com/opencontainers/distribution-spec/conformance")
	build.Dir = filepath.Join("..", "..", "tools", "conformance")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the suite: %v\n%s", err, out)
	}
	h := start(t)
	results := t.TempDir()
	ca := filepath.Join(results, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	run := exec.Command(program)
	run.Dir = results
	run.Env = append(os.Environ(), "OCI_REGISTRY="+h.host(), "OCI_TLS=enabled", "SSL_CERT_FILE="+ca, "OCI_REPO1=shop/one", "OCI_REPO2=shop/two",
		"OCI_USERNAME=olga", "OCI_PASSWORD="+passwords()["olga"], "OCI_RESULTS_DIR="+results, "OCI_VERSION=1.1", "OCI_DATA_SHA512=false",
		"OCI_DATA_NONDISTRIBUTABLE=false") // deprecated since 1.1, and refused: they name blobs without having them
	out, err := run.CombinedOutput()
	if err != nil {
		t.Errorf("%v", err)
	}
	t.Log(tail(string(out), 65))
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
