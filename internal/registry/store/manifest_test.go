package store

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestLinksOfWhatGoes: a directory that is removed while the links below another are read has none.
func TestLinksOfWhatGoes(t *testing.T) {
	dir := t.TempDir()
	kept := filepath.Join(dir, "sha256", "abc")
	if err := os.MkdirAll(kept, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(kept, "link"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// As if they went after they were listed.
	if err := os.Symlink("gone", filepath.Join(dir, "sha512")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sha256", "def"), 0o700); err != nil {
		t.Fatal(err)
	}
	got, err := (&Store{}).links(dir)
	if err != nil || len(got) != 1 || got[0].digest != "sha256:abc" || time.Since(got[0].used) > time.Hour {
		t.Errorf("%v, %v", got, err)
	}
}
