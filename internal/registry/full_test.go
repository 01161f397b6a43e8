package registry

import (
	"net/http"
	"strings"
	"testing"
)

// TestFullDisk: on a disk that has no more room than what is kept for the host nothing is pushed, whichever way it
// comes, and who pushes is told why; pulls, deletes and collections go on.
func TestFullDisk(t *testing.T) {
	before := start(t)
	before.push("shop/web:1", before.image(2000, 2), before.as("olga"))
	_, token := before.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	uploads := "/v2/shop/web/blobs/uploads/"
	status, header, text := before.do(http.MethodPost, uploads, token, nil, nil)
	if status != http.StatusAccepted {
		t.Fatal(status, text)
	}
	begun := strings.TrimPrefix(header.Get("Location"), before.srv.URL)
	before.srv.Close()

	h := start(t, func(c *Config) { c.Dir, c.Reserve = before.dir, 1<<62 })
	_, token = h.token("olga", passwords()["olga"], "repository:shop/web:pull,push,delete")
	octets := map[string]string{"Content-Type": "application/octet-stream"}
	for _, c := range []struct {
		what, method, path, body string
		headers                  map[string]string
	}{
		{"an upload", http.MethodPost, uploads, "", nil},
		{"an upload in one request", http.MethodPost, uploads + "?digest=sha256:" + strings.Repeat("0", 64), "a layer", octets},
		{"a piece of an upload", http.MethodPatch, begun, "a layer", octets},
		{"a manifest", http.MethodPut, "/v2/shop/web/manifests/2", `{"schemaVersion":2}`, map[string]string{"Content-Type": ociManifest}},
	} {
		status, _, text := h.do(c.method, c.path, token, strings.NewReader(c.body), c.headers)
		if status != http.StatusInsufficientStorage || !strings.Contains(text, "the disk of the registry is full") || !strings.Contains(text, "atoll registry gc") {
			t.Errorf("%s: %d %s", c.what, status, text)
		}
	}
	if err := h.pull("shop/web:1", h.as("victor")); err != nil {
		t.Errorf("pulling: %v", err)
	}
	if status, _, text := h.do(http.MethodDelete, "/v2/shop/web/manifests/1", token, nil, nil); status != http.StatusAccepted {
		t.Errorf("deleting a tag: %d %s", status, text)
	}
	h.collect(false)
}
