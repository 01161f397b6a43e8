package assets

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/zstd"
)

// testSet is a set with one file, "tool".
func testSet(t *testing.T, content string) *Set {
	t.Helper()
	sum := sha256.Sum256([]byte(content))
	manifest, err := json.Marshal(map[string]Entry{"tool": {Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])}})
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Load(fstest.MapFS{
		ManifestFile: {Data: manifest},
		"tool.zst":   {Data: z.EncodeAll([]byte(content), nil)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestExtract writes files that are missing, old or damaged, and warns of the damaged only.
func TestExtract(t *testing.T) {
	dir := t.TempDir()
	path, link, record := filepath.Join(dir, "tool"), filepath.Join(dir, "link"), filepath.Join(dir, "record")
	for _, step := range []struct {
		what, version string
		before        func() error
		log           string // what it must say
		warns         bool
	}{
		{"missing", "one", func() error { return nil }, "file written", false},
		{"there", "one", func() error { return nil }, "", false},
		{"new version", "two", func() error { return nil }, "file written", false},
		{"damaged", "two", func() error { return os.WriteFile(path, []byte("tw?"), 0o600) }, "a file was damaged and is written again", true},
		{"damaged through its link", "two", func() error { return os.WriteFile(link, nil, 0o600) }, "a file was damaged and is written again", true},
		{"gone", "two", func() error { return os.Remove(path) }, "file written", false},
		{"link gone", "two", func() error { return os.Remove(link) }, "", false},
	} {
		if err := step.before(); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		targets := []Target{{Name: "tool", Path: path, Mode: 0o755, Links: []string{link}}}
		if err := testSet(t, step.version).Extract(targets, record, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		if !strings.Contains(log.String(), step.log) || (step.log == "" && log.Len() > 0) || strings.Contains(log.String(), "level=WARN") != step.warns {
			t.Errorf("%s: logged %q", step.what, log.String())
		}
		for _, name := range []string{path, link} {
			got, err := os.ReadFile(name)
			info, statErr := os.Stat(name)
			if err := errors.Join(err, statErr); err != nil {
				t.Fatalf("%s: %v", step.what, err)
			}
			if string(got) != step.version || info.Mode() != 0o755 {
				t.Errorf("%s: %s is %q, mode %v", step.what, name, got, info.Mode())
			}
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".tool.*")); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
}

func TestLoadRefuses(t *testing.T) {
	if _, err := Load(fstest.MapFS{}); !errors.Is(err, ErrMissing) {
		t.Errorf("without a manifest: %v", err)
	}
	if _, err := Load(fstest.MapFS{ManifestFile: {Data: []byte("{")}}); err == nil {
		t.Error("half a manifest was read")
	}
	s := testSet(t, "one")
	dir := t.TempDir()
	if err := s.Extract([]Target{{Name: "other", Path: filepath.Join(dir, "other")}}, filepath.Join(dir, "record"), slog.New(slog.DiscardHandler)); !errors.Is(err, ErrMissing) {
		t.Errorf("a file that is not in the set: %v", err)
	}
	s.manifest["tool"] = Entry{Size: 3, SHA256: strings.Repeat("0", 64)}
	path := filepath.Join(dir, "tool")
	err := s.Extract([]Target{{Name: "tool", Path: path, Mode: 0o755}}, filepath.Join(dir, "record"), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "does not match the manifest") {
		t.Errorf("an embedded file that is not what it should be: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the wrong file was written: %v", err)
	}
}
