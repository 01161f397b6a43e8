//go:build integration

package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDebianPackages needs apt and the Debian archive.
func TestDebianPackages(t *testing.T) {
	dir := writeRecipe(t, map[string]string{RecipeFile: minimal + "debian: [busybox-static, hostname]\n"})
	cache := t.TempDir()
	first := mustBuild(t, dir, cache)
	if second := mustBuild(t, dir, cache); !second.Cached || second.Archive != first.Archive {
		t.Errorf("second build: %+v", second)
	}
	fresh := t.TempDir() // but of the same lists: the archive may change at any time
	if err := os.Symlink(filepath.Join(cache, "apt"), filepath.Join(fresh, "apt")); err != nil {
		t.Fatal(err)
	}
	other := mustBuild(t, dir, fresh)
	a, errA := fileSHA256(first.Archive)
	b, errB := fileSHA256(other.Archive)
	if errA != nil || errB != nil || a != b {
		t.Errorf("two builds differ: %s %s %v %v", a, b, errA, errB)
	}
}

func TestUnknownDebianPackage(t *testing.T) {
	dir := writeRecipe(t, map[string]string{RecipeFile: minimal + "debian: [no-such-package-here]\n"})
	recipe, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Build(t.Context(), recipe, Options{CacheDir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "Unable to locate package no-such-package-here") {
		t.Errorf("got %v", err)
	}
}
