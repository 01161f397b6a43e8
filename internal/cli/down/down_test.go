package down

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/datadir"
)

// TestRefusesForeignDirectory: a wrong --data-dir must not lose anything.
func TestRefusesForeignDirectory(t *testing.T) {
	root := t.TempDir()
	precious := filepath.Join(root, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tree, err := datadir.New(root)
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{
		Tree: tree.WithRun(t.TempDir()), Purge: true, Logger: slog.New(slog.DiscardHandler),
		Progress: func(line string) { t.Errorf("did something: %s", line) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "does not look like") {
		t.Errorf("Run = %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

func TestLooksLikeOurs(t *testing.T) {
	for files, want := range map[string]bool{
		"":                        true,
		"lock logs":               true,
		"settings.json anything":  true,
		"lock passwd":             false,
		"home":                    false,
		"bin lock logs something": false,
	} {
		tree, err := datadir.New(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		for name := range strings.FieldsSeq(files) {
			if err := os.WriteFile(filepath.Join(tree.Root(), name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := looksLikeOurs(tree); got != want {
			t.Errorf("a directory with %q looks like ours: %v", files, got)
		}
	}
}

// TestPodsCgroup: the pods of one instance end, never those of another.
func TestPodsCgroup(t *testing.T) {
	seen := map[string]bool{}
	for _, root := range []string{datadir.DefaultRoot, "/srv/a", "/srv/b"} {
		tree, err := datadir.New(root)
		if err != nil {
			t.Fatal(err)
		}
		name := podsCgroup(tree)
		if name == "" || strings.Contains(name, "/") || seen[name] {
			t.Errorf("the group of %s is %q", root, name)
		}
		seen[name] = true
	}
	if !seen["kubepods"] {
		t.Errorf("groups %v", seen)
	}
}
