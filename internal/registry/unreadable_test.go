package registry

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// unreadable puts a directory in the place of a file, which cannot be read then, until the returned function is called.
func unreadable(t *testing.T, file string) (mend func()) {
	t.Helper()
	if err := os.Rename(file, file+".aside"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".aside", file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCollectWhenTheDiskDoesNotSay: what cannot be read is not what is not there.
func TestCollectWhenTheDiskDoesNotSay(t *testing.T) {
	for _, broken := range []string{"manifest", "tag", "link"} {
		t.Run(broken, func(t *testing.T) {
			h := start(t)
			img := h.image(2000, 2)
			h.push("shop/web:1", img, h.as("olga"))
			age(t, h.dir, 8*24*time.Hour)
			digest, _ := img.Digest()
			root := filepath.Join(h.dir, "docker/registry/v2")
			file := map[string]string{
				"manifest": filepath.Join(root, "blobs/sha256", digest.Hex[:2], digest.Hex, "data"),
				"tag":      filepath.Join(root, "repositories/shop/web/_manifests/tags/1/current/link"),
			}[broken]
			var mend func()
			if file != "" {
				mend = unreadable(t, file)
			} else {
				// A link to itself can be listed, but not looked at.
				dir := filepath.Join(root, "repositories/shop/web/_manifests/revisions/sha256", digest.Hex)
				mend = loop(t, dir)
			}
			if report, err := h.reg.Collect(t.Context(), false); err == nil || report.Manifests+report.Layers+report.Blobs != 0 {
				t.Errorf("%+v, %v: want an error and nothing removed", report, err)
			}
			mend()
			if err := h.pull("shop/web:1", h.as("olga")); err != nil {
				t.Errorf("what is tagged is gone: %v", err)
			}
			if _, err := h.reg.Collect(t.Context(), false); err != nil {
				t.Errorf("when the disk is well again: %v", err)
			}
		})
	}
}

// loop puts a link to itself in the place of a directory.
func loop(t *testing.T, dir string) (mend func()) {
	t.Helper()
	aside := filepath.Join(filepath.Dir(filepath.Dir(dir)), "aside")
	if err := os.Rename(dir, aside); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Base(dir), dir); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(aside, dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestImmutableTagThatCannotBeRead is neither overwritten nor deleted.
func TestImmutableTagThatCannotBeRead(t *testing.T) {
	h := start(t)
	one := h.image(512, 1)
	h.push("shop/web:v1", one, h.as("olga"))
	h.change(func() { h.settings["shop"] = immutable("web:v*") })
	mend := unreadable(t, filepath.Join(h.dir, "docker/registry/v2/repositories/shop/web/_manifests/tags/v1/current/link"))
	digest, _ := one.Digest()
	raw, err := h.image(512, 1).RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push,delete")
	for method, reference := range map[string]string{http.MethodPut: "v1", http.MethodDelete: digest.String()} {
		status, _, body := h.do(method, "/v2/shop/web/manifests/"+reference, token, bytes.NewReader(raw), nil)
		if status != http.StatusInternalServerError || !strings.Contains(body, "cannot be read") {
			t.Errorf("%s: %d %s", method, status, body)
		}
	}
	mend()
	if err := h.pull("shop/web:v1", h.as("olga")); err != nil {
		t.Error(err)
	}
}
