package registry

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// containerDisk is an image with a disk as `crane append` and `docker build` make them: a compressed layer.
func containerDisk(t *testing.T) v1.Image {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "disk/a.qcow2", Size: 1, Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// TestDisks: what is pushed as a disk is found in its project and no other, until its tag is deleted; each change is told.
func TestDisks(t *testing.T) {
	var mu sync.Mutex
	var told []string
	h := start(t, func(c *Config) {
		c.Changed = func(project string) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, project)
		}
	})
	names := func(project string) (out []string) {
		t.Helper()
		found, _, err := h.reg.Disks(t.Context(), project)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range found {
			out = append(out, d.Repository+":"+d.Tag)
		}
		return out
	}
	for tag, image := range map[string]v1.Image{"shop/a/web:1.0": containerDisk(t), "shop/app:1": h.image(100, 2)} {
		if err := remote.Write(h.ref(tag), image, h.as("olga")...); err != nil {
			t.Fatal(err)
		}
	}
	if got := names("shop"); !slices.Equal(got, []string{"a/web:1.0"}) {
		t.Errorf("%v", got)
	}
	if got := names("bank"); len(got) != 0 {
		t.Errorf("%v", got)
	}
	if _, _, err := h.reg.Disks(t.Context(), "nowhere"); !errors.Is(err, ErrNotKnown) {
		t.Error(err)
	}
	for tag, want := range map[string]bool{"1.0": true, "2.0": false} {
		if got, err := h.reg.Tagged("shop", "a/web", tag); err != nil || got != want {
			t.Errorf("%s: %t, %v", tag, got, err)
		}
	}
	if err := remote.Delete(h.ref("shop/a/web:1.0"), h.as("olga")...); err != nil {
		t.Fatal(err)
	}
	if got := names("shop"); len(got) != 0 {
		t.Errorf("%v", got)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(told, []string{"shop", "shop", "shop"}) {
		t.Errorf("told of %v", told)
	}
	h.change(func() { h.configuration.External = &atoll.ExternalRegistry{URL: "https://harbor.example.com"} })
	if _, _, err := h.reg.Disks(t.Context(), "shop"); !errors.Is(err, ErrExternal) {
		t.Error(err)
	}
}

// TestCancelUpload: who has lost an upload can end it, not knowing how much has come, and its bytes count no more.
func TestCancelUpload(t *testing.T) {
	h := start(t)
	_, token := h.token("olga", "olga-password", "repository:shop/web:pull,push")
	_, viewer := h.token("victor", "victor-password", "repository:shop/web:pull,push")
	status, header, _ := h.do(http.MethodPost, "/v2/shop/web/blobs/uploads/", token, nil, nil)
	if status != http.StatusAccepted {
		t.Fatal(status)
	}
	begun, err := url.Parse(header.Get("Location"))
	if err != nil {
		t.Fatal(err)
	}
	at := begun.RequestURI()
	if status, _, text := h.do(http.MethodPatch, at, token, strings.NewReader("0123456789"), nil); status != http.StatusAccepted {
		t.Fatal(status, text)
	}
	used := func() int64 {
		t.Helper()
		n, err := h.reg.Usage(t.Context(), "shop")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if used() != 10 {
		t.Fatalf("%d bytes", used())
	}
	if status, _, _ := h.do(http.MethodDelete, at, viewer, nil, nil); status/100 != 4 || used() != 10 {
		t.Errorf("who may only pull: %d, %d bytes", status, used())
	}
	for _, other := range []string{"..", "00000000-0000-0000-0000-000000000000"} {
		if status, _, _ := h.do(http.MethodDelete, "/v2/shop/web/blobs/uploads/"+other, token, nil, nil); status != http.StatusNotFound && status/100 != 3 {
			t.Errorf("%s: %d", other, status)
		}
	}
	for _, want := range []int{http.StatusNoContent, http.StatusNotFound} {
		if status, _, text := h.do(http.MethodDelete, at, token, nil, nil); status != want || used() != 0 {
			t.Errorf("%d %s, %d bytes", status, text, used())
		}
	}
}
