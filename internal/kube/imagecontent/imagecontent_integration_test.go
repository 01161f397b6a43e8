//go:build integration

package imagecontent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	dynamicfake "k8s.io/client-go/dynamic/fake"

	content "atoll.dev/atoll/api/content/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/storage/library"
)

func item(namespace, name, uid string, source map[string]any, ready bool) *unstructured.Unstructured {
	kind := "ContentLibraryItem"
	if namespace == "" {
		kind = "ClusterContentLibraryItem"
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": api.GroupVersion().String(), "kind": kind,
		"metadata": map[string]any{"namespace": namespace, "name": name, "uid": uid},
		"spec":     map[string]any{"source": source},
		"status":   map[string]any{"ready": ready, "name": name, "host": "n1"},
	}}
}

// TestUploadAndExport: an image arrives in pieces through HTTP, and comes out in another format.
func TestUploadAndExport(t *testing.T) {
	l, err := library.New(library.Config{Dir: filepath.Join(t.TempDir(), "content")})
	if err != nil {
		t.Fatal(err)
	}
	upload := map[string]any{"upload": map[string]any{"fileName": "x.qcow2"}}
	objects := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		api.Items(): "ContentLibraryItemList", api.ClusterItems(): "ClusterContentLibraryItemList",
	}, item("", "new", "u1", upload, false), item("", "done", "u1", upload, true), item("team", "web", "u2", map[string]any{"http": map[string]any{"url": "https://x/y"}}, false))
	factory := apirequest.RequestInfoFactory{APIPrefixes: sets.NewString("apis"), GrouplessAPIPrefixes: sets.NewString("api")}
	h := newHandler(objects, l, slog.New(slog.DiscardHandler))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, err := factory.NewRequestInfo(r)
		if err != nil {
			t.Error(err)
		}
		h.ServeHTTP(w, r.WithContext(apirequest.WithRequestInfo(r.Context(), info)))
	}))
	t.Cleanup(s.Close)

	path := filepath.Join(t.TempDir(), "x.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 10M 1M", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	call := func(method, path string, first, end int) (int, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, bytes.NewReader(b[first:end]))
		if err != nil {
			t.Fatal(err)
		}
		if method == http.MethodPut {
			req.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, end-1, len(b)))
		}
		answer, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, body
	}
	to := content.Path("", "new", content.Upload)
	state := func(body []byte) (u content.Uploaded) {
		if err := json.Unmarshal(body, &u); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		return u
	}
	if code, body := call(http.MethodGet, to, 0, 0); code != 200 || state(body) != (content.Uploaded{}) {
		t.Errorf("%d %s", code, body)
	}
	if code, body := call(http.MethodPut, to, 0, 1000); code != 200 || state(body).Received != 1000 {
		t.Errorf("%d %s", code, body)
	}
	if code, body := call(http.MethodPut, to, 5000, 6000); code != http.StatusConflict || state(body).Received != 1000 {
		t.Errorf("%d %s", code, body)
	}
	if code, body := call(http.MethodPut, to, 1000, len(b)); code != 200 || !state(body).Complete {
		t.Errorf("%d %s", code, body)
	}
	if _, err := l.Fetch(t.Context(), "u1", library.Source{Upload: &library.Upload{}}, nil); err != nil {
		t.Fatal(err)
	}
	code, raw := call(http.MethodGet, content.Path("", "done", content.Content)+"?format=raw", 0, 0)
	if code != 200 || len(raw) != 64<<20 || raw[10<<20] != 7 || raw[11<<20] != 0 {
		t.Errorf("%d, %d bytes", code, len(raw))
	}
	if code, same := call(http.MethodGet, content.Path("", "done", content.Content), 0, 0); code != 200 || !bytes.Equal(same, b) {
		t.Errorf("%d, %d bytes", code, len(same))
	}
	for _, c := range []struct {
		method, path, text string
		code               int
	}{
		{http.MethodGet, content.Path("", "none", content.Content), "not found", 404},
		{http.MethodGet, content.Path("", "new", content.Content), "not ready", 409},
		{http.MethodGet, content.Path("", "done", content.Content) + "?format=vdi", "use qcow2", 400},
		{http.MethodGet, content.Path("", "done", content.Content) + "?disk=7&format=raw", "no disk 7", 400},
		{http.MethodGet, content.Path("", "done", content.Content) + "?disk=x", "must be the number", 400},
		{http.MethodPut, content.Path("team", "web", content.Upload), "not one to be uploaded", 400},
		{http.MethodDelete, content.Path("team", "web", content.Upload), "not supported", 405},
		{http.MethodGet, content.Path("team", "web", "other"), "not supported", 405},
		{http.MethodGet, content.Path("team", "web", content.Upload) + "/more", "", 404},
	} {
		if code, body := call(c.method, c.path, 0, 1); code != c.code || !strings.Contains(string(body), c.text) {
			t.Errorf("%s %s: %d %s", c.method, c.path, code, body)
		}
	}
	if left, err := filepath.Glob(filepath.Join(t.TempDir(), "..", "*", "content", ".export-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
