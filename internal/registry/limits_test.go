package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/registry/store"
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

// slow is a body that goes on when it is told to.
func slow() (body io.Reader, begin, end func()) {
	r, w := io.Pipe()
	return r, func() { _, _ = w.Write([]byte("{")) }, func() { _ = w.Close() }
}

// TestManifestsAtTheSameTime have a bound in all and one of each project, and end when they do not go on.
func TestManifestsAtTheSameTime(t *testing.T) {
	h := start(t)
	h.reg.bodies = newBudget(2*firstBody, firstBody)
	h.reg.bodies.within = time.Millisecond
	h.reg.stallWithin, h.reg.manifestWithin = time.Hour, time.Hour
	tokens := map[string]string{}
	for project, who := range map[string]string{"shop": "olga", "bank": "root", "library": "root"} {
		_, tokens[project] = h.token(who, passwords()[who], "repository:"+project+"/web:pull,push")
	}
	put := func(project string, body io.Reader) (int, string) {
		status, header, _ := h.do(http.MethodPut, "/v2/"+project+"/web/manifests/1", tokens[project], body, nil)
		return status, header.Get("Retry-After")
	}
	var wg sync.WaitGroup
	var ends []func()
	occupy := func(project string) {
		body, begin, end := slow()
		ends = append(ends, end)
		wg.Go(func() {
			if status, _ := put(project, body); status != http.StatusBadRequest {
				t.Errorf("half a manifest: %d", status)
			}
		})
		begin() // the server has asked for the body, or the client has buffered it
		for h.reg.bodies.taken(project) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	occupy("shop")
	if status, retry := put("shop", strings.NewReader("{}")); status != http.StatusTooManyRequests || retry == "" {
		t.Errorf("another one of the project: %d, %q", status, retry)
	}
	if status, _ := put("bank", strings.NewReader("[]")); status != http.StatusBadRequest {
		t.Errorf("one of another project: %d", status)
	}
	occupy("bank")
	if status, _ := put("library", strings.NewReader("{}")); status != http.StatusTooManyRequests {
		t.Errorf("one too many in all: %d", status)
	}
	for _, end := range ends {
		end()
	}
	wg.Wait()
	// One user does not get around the bound of a project by taking another one.
	ends = nil
	h.reg.bodies, h.reg.senders = newBudget(maxBodies, maxBodiesPerProject), newBudget(2*firstBody, firstBody)
	h.reg.senders.within = time.Millisecond
	occupy("bank")
	if status, _ := put("library", strings.NewReader("{}")); status != http.StatusTooManyRequests {
		t.Errorf("one too many of a user: %d", status)
	}
	if status, _ := put("shop", strings.NewReader("[]")); status != http.StatusBadRequest {
		t.Errorf("one of another user: %d", status)
	}
	ends[0]()
	wg.Wait()
	if status, _ := put("shop", strings.NewReader("[]")); status != http.StatusBadRequest {
		t.Errorf("when all have ended: %d", status)
	}
	h.reg.stallWithin = 20 * time.Millisecond
	body, begin, end := slow()
	defer end()
	wg.Go(begin)
	if status, _ := put("shop", body); status != http.StatusRequestTimeout {
		t.Errorf("one that does not go on: %d", status)
	}
	wg.Wait()
	if n := h.reg.bodies.taken("shop"); n != 0 {
		t.Errorf("%d bytes are taken", n)
	}
}

// TestManifestsThatDoNotCome: who opens many requests and sends nothing stops nobody.
func TestManifestsThatDoNotCome(t *testing.T) {
	h := start(t)
	h.reg.bodies.within = time.Millisecond
	h.reg.stallWithin, h.reg.manifestWithin = time.Hour, time.Hour
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	put := func(body io.Reader) int {
		status, _, _ := h.do(http.MethodPut, "/v2/shop/web/manifests/1", token, body, nil)
		return status
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range 2 * maxBodiesPerProject / store.MaxManifest {
		body, begin, end := slow()
		defer end()
		wg.Go(func() { put(body) })
		begin()
		for h.reg.bodies.taken("shop") < int64(i+1)*firstBody {
			time.Sleep(time.Millisecond)
		}
	}
	if status := put(strings.NewReader("[" + strings.Repeat(" ", store.MaxManifest-2) + "]")); status != http.StatusBadRequest {
		t.Errorf("a large one meanwhile: %d", status)
	}
	if status := put(strings.NewReader("[" + strings.Repeat(" ", store.MaxManifest-1) + "]")); status != http.StatusRequestEntityTooLarge {
		t.Errorf("one that is too large: %d", status)
	}
	if status := put(io.MultiReader(strings.NewReader(strings.Repeat(" ", store.MaxManifest+1)))); status != http.StatusRequestEntityTooLarge {
		t.Errorf("one that does not say so: %d", status)
	}
}

// taken is what a key has.
func (b *budget) taken(key string) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.by[key]
}

// hanging is an API server that does not answer whose tokens are until it is released.
type hanging struct {
	*cluster
	asked   chan struct{}
	release chan struct{}
}

func (g *hanging) Review(ctx context.Context, token, audience string) (Identity, bool, error) {
	g.asked <- struct{}{}
	<-g.release
	return g.cluster.Review(ctx, token, audience)
}

// TestTokensOfNobody: who sends many of them does not have the API server asked for all at once.
func TestTokensOfNobody(t *testing.T) {
	h := start(t)
	api := &hanging{cluster: h.cluster, asked: make(chan struct{}, maxReviews), release: make(chan struct{})}
	h.reg.cfg.Authority = api
	h.reg.reviews.within = time.Millisecond
	var wg sync.WaitGroup
	for range maxReviewsPerSource {
		wg.Go(func() {
			if status, _ := h.token("x", webToken("none")); status != http.StatusUnauthorized {
				t.Errorf("a token of nobody: %d", status)
			}
		})
	}
	for range maxReviewsPerSource {
		<-api.asked
	}
	if status, _ := h.token("x", webToken("none")); status != http.StatusTooManyRequests {
		t.Errorf("one too many: %d", status)
	}
	// A token that does not even claim to be for the registry is not asked for.
	if status, _ := h.token("x", "eyJhbGciOiJSUzI1NiJ9.e30.sig"); status != http.StatusUnauthorized {
		t.Errorf("a token for something else: %d", status)
	}
	if status, _ := h.token("olga", passwords()["olga"]); status != http.StatusOK {
		t.Errorf("a password meanwhile: %d", status)
	}
	close(api.release)
	wg.Wait()
	if len(api.asked) != 0 {
		t.Errorf("asked %d times more", len(api.asked))
	}
}
