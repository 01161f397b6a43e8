package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

const ociManifest = "application/vnd.oci.image.manifest.v1+json"

// manifest pushes a manifest of the image's config, with layers, and n bytes of annotations.
func (h *harness) manifest(token, reference string, own *v1.Manifest, layers string, n int) (status int, answer, digest string) {
	h.t.Helper()
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s],"annotations":{"a":%q}}`,
		ociManifest, own.Config.MediaType, own.Config.Digest, own.Config.Size, layers, reference+strings.Repeat("x", n))
	sum := sha256.Sum256([]byte(body))
	status, _, answer = h.do(http.MethodPut, "/v2/shop/web/manifests/"+reference, token, strings.NewReader(body), map[string]string{"Content-Type": ociManifest})
	return status, answer, hex.EncodeToString(sum[:])
}

// pushed pushes a small image and returns its manifest.
func (h *harness) pushed(ref string, who string) *v1.Manifest {
	h.t.Helper()
	img := h.image(16, 1)
	h.push(ref, img, h.as(who))
	m, err := img.Manifest()
	if err != nil {
		h.t.Fatal(err)
	}
	return m
}

// TestQuotaOfManifests: what is refused is not on disk, and what is deleted counts for as long as it is there.
func TestQuotaOfManifests(t *testing.T) {
	h := start(t)
	h.change(func() { h.settings["shop"] = atoll.NamespaceRegistry{Quota: quantity(3 << 20)} })
	own := h.pushed("shop/web:1", "olga")
	used := func() int64 {
		n, err := h.reg.Usage(t.Context(), "shop")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push,delete")
	before := used()
	status, answer, digest := h.manifest(token, "big", own, "", 3<<20)
	if status != http.StatusForbidden || !strings.Contains(answer, "quota") {
		t.Errorf("%d %s", status, answer)
	}
	if _, err := os.Stat(filepath.Join(h.dir, "docker/registry/v2/blobs/sha256", digest[:2], digest)); err == nil {
		t.Error("what was refused is on disk")
	}
	if got := used(); got != before {
		t.Errorf("used %d after a refusal, before %d", got, before)
	}
	// Two of 2 MiB do not fit, not even when the first is deleted.
	status, answer, digest = h.manifest(token, "half", own, "", 2<<20)
	if status != http.StatusCreated {
		t.Fatal(status, answer)
	}
	full := used()
	// The same again takes nothing.
	if status, answer, _ := h.manifest(token, "half", own, "", 2<<20); status != http.StatusCreated || used() != full {
		t.Errorf("%d %s, used %d, before %d", status, answer, used(), full)
	}
	if status, _, answer := h.do(http.MethodDelete, "/v2/shop/web/manifests/sha256:"+digest, token, nil, nil); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	if got := used(); got != full {
		t.Errorf("used %d after deleting, before %d", got, full)
	}
	if status, _, _ := h.manifest(token, "other", own, "", 2<<20); status != http.StatusForbidden {
		t.Errorf("a second one beside what was deleted: %d", status)
	}
	// It can be had back for nothing, and deleted again.
	if status, answer, _ := h.manifest(token, "half", own, "", 2<<20); status != http.StatusCreated || used() != full {
		t.Errorf("%d %s, used %d, before %d", status, answer, used(), full)
	}
	if status, _, answer := h.do(http.MethodDelete, "/v2/shop/web/manifests/sha256:"+digest, token, nil, nil); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	age(t, h.dir, 3*time.Hour)
	h.collect(false)
	if got := used(); got != before {
		t.Errorf("used %d after the collection, before %d", got, before)
	}
	if status, answer, _ := h.manifest(token, "other", own, "", 2<<20); status != http.StatusCreated {
		t.Errorf("when there is room: %d %s", status, answer)
	}
}

// TestLayersFromElsewhere: the digest of another project's layer does not get into a manifest, whatever it is called.
func TestLayersFromElsewhere(t *testing.T) {
	h := start(t)
	foreign, own := h.pushed("bank/vault:1", "root"), h.pushed("shop/web:1", "olga")
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	for i, c := range []struct{ mediaType, urls, says string }{
		{"application/vnd.oci.image.layer.v1.tar+gzip", "", "MANIFEST_BLOB_UNKNOWN"},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "", "MANIFEST_BLOB_UNKNOWN"},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", `,"urls":["https://elsewhere.example/l"]`, "has urls"},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar", `,"URLS":["https://elsewhere.example/l"]`, "has urls"},
		{"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", `,"urls":["https://elsewhere.example/l"]`, "has urls"},
	} {
		l := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d%s}`, c.mediaType, foreign.Layers[0].Digest, foreign.Layers[0].Size, c.urls)
		if status, answer, _ := h.manifest(token, fmt.Sprintf("t%d", i), own, l, 0); status < 400 || !strings.Contains(answer, c.says) {
			t.Errorf("%+v: %d %s", c, status, answer)
		}
	}
	tags, err := remote.List(h.ref("shop/web:x").Context(), h.as("olga")...)
	if err != nil || len(tags) != 1 {
		t.Errorf("%v, %v", tags, err)
	}
}
