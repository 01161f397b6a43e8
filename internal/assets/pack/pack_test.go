package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/assets"
)

// TestRoundTrip packs files, extracts them, and checks what is done on changes
// and damage.
func TestRoundTrip(t *testing.T) {
	src, packedDir, out := t.TempDir(), t.TempDir(), t.TempDir()
	file := filepath.Join(src, "pod")
	writeAndPack := func(content string) *assets.Set {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := pack(packedDir, []string{"pod=" + file}); err != nil {
			t.Fatal(err)
		}
		set, err := assets.Load(os.DirFS(packedDir))
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	target := assets.Target{
		Name: "pod", Path: filepath.Join(out, "pod"), Mode: 0o755,
		Links: []string{filepath.Join(out, "shim"), filepath.Join(out, "plugin")},
	}
	var log bytes.Buffer
	extract := func(set *assets.Set) os.FileInfo {
		t.Helper()
		log.Reset()
		logger := slog.New(slog.NewTextHandler(&log, nil))
		if err := set.Extract([]assets.Target{target}, filepath.Join(out, "record"), logger); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(target.Path)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range target.Links {
			if other, err := os.Lstat(link); err != nil || !os.SameFile(info, other) {
				t.Errorf("%s is not a link to %s (%v)", link, target.Path, err)
			}
		}
		return info
	}

	first := writeAndPack(strings.Repeat("one", 10000))
	a := extract(first)
	if a.Mode().Perm() != 0o755 {
		t.Errorf("mode = %o", a.Mode().Perm())
	}
	if err := os.Remove(target.Links[1]); err != nil {
		t.Fatal(err)
	}
	if b := extract(first); !os.SameFile(a, b) || log.Len() != 0 {
		t.Errorf("an unchanged file was written again: %s", log.String())
	}
	c := extract(writeAndPack("two"))
	if os.SameFile(a, c) || strings.Contains(log.String(), "damaged") {
		t.Errorf("a new version was not written in one step, or called damaged: %s", log.String())
	}
	if err := os.WriteFile(target.Path, []byte("tw0"), 0o600); err != nil {
		t.Fatal(err)
	}
	extract(writeAndPack("two"))
	if got, _ := os.ReadFile(target.Path); string(got) != "two" || !strings.Contains(log.String(), "damaged") {
		t.Errorf("damage: content %q, log %s", got, log.String())
	}
}

func TestMissing(t *testing.T) {
	if _, err := assets.Load(os.DirFS(t.TempDir())); !errors.Is(err, assets.ErrMissing) {
		t.Errorf("Load without a manifest = %v, want ErrMissing", err)
	}
	dir := t.TempDir()
	if err := pack(dir, []string{"pod=" + os.Args[0]}); err != nil {
		t.Fatal(err)
	}
	set, err := assets.Load(os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := set.Entry("vmlinux"); !errors.Is(err, assets.ErrMissing) {
		t.Errorf("Entry of a file that is not there = %v, want ErrMissing", err)
	}
	if err := pack(dir, []string{"nonsense"}); err == nil {
		t.Error("pack accepted an argument without a file")
	}
}
