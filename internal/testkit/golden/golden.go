// Package golden compares generated text with files under testdata.
//
// It is for tests only. A test calls Compare with a file name; with the
// environment variable UPDATE_GOLDEN=1 the file is rewritten instead, for the
// author to look at the change. What can go wrong: the file is missing, which
// fails the test.
package golden

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Compare fails the test when got differs from testdata/<name>.
func Compare(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got == string(want) {
		return
	}
	t.Errorf("text differs from %s; run with UPDATE_GOLDEN=1 and look at the change; first difference: %s", path, difference(string(want), got))
}

// difference shows the first line that is not the same.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		var a, b string
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			return "want " + a + ", got " + b
		}
	}
	return "none"
}
