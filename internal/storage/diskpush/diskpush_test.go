package diskpush

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ociregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"atoll.dev/atoll/internal/storage/library"
)

// world is a registry that refuses what the test says.
type world struct {
	*testing.T
	own    *library.OwnRegistry
	refuse func(r *http.Request) (status int, message string)
	sent   atomic.Int64 // uploads of blobs
	logins atomic.Int64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, refuse: func(*http.Request) (int, string) { return 0, "" }}
	inner := ociregistry.New(ociregistry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	s := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if status, message := w.refuse(r); status != 0 {
			rw.WriteHeader(status)
			_, _ = io.WriteString(rw, `{"errors":[{"code":"DENIED","message":"`+message+`"}]}`)
			return
		}
		if r.URL.Path == "/v2/" && r.Header.Get("Authorization") == "" {
			rw.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.Method == http.MethodPatch {
			w.sent.Add(1)
		}
		inner.ServeHTTP(rw, r)
	}))
	t.Cleanup(s.Close)
	w.own = &library.OwnRegistry{
		Address: s.Listener.Addr().String(), CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})),
		Login: func(context.Context) (string, string, error) {
			w.logins.Add(1)
			return "user", "password", nil
		},
	}
	return w
}

// disk is a file of some size.
func (w *world) disk(content []byte) Disk {
	w.Helper()
	path := filepath.Join(w.TempDir(), "original")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		w.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = f.Close() })
	return Disk{File: f, Name: "web.qcow2", Annotations: map[string]string{"atoll.dev/vm-firmware": "efi", "empty": ""}}
}

const target = "registry.atoll.local/shop/web:1.0"

func (w *world) push(d Disk) (string, error) {
	w.Helper()
	return Push(w.Context(), Target{Registry: w.own, Reference: target}, d, nil)
}

// image is what the registry has.
func (w *world) image() (v1.Image, error) {
	w.Helper()
	ref, err := name.ParseReference(target)
	if err != nil {
		w.Fatal(err)
	}
	rt, err := w.own.Transport()
	if err != nil {
		w.Fatal(err)
	}
	return remote.Image(ref, remote.WithTransport(rt), remote.WithAuth(login{w.own}))
}

// TestPush: a disk becomes a containerDisk, the same one each time, and is sent once.
func TestPush(t *testing.T) {
	w := newWorld(t)
	content := bytes.Repeat([]byte("0123456789"), 1000)
	d := w.disk(content)
	var done, total int64
	digest, err := Push(t.Context(), Target{Registry: w.own, Reference: target}, d, func(n, of int64) { done, total = n, of })
	if err != nil || w.logins.Load() == 0 || total != 13*1024-512+1536 && done != total || done == 0 {
		t.Fatalf("%s, %v, %d of %d", digest, err, done, total)
	}
	image, err := w.image()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := image.Digest(); err != nil || got.String() != digest {
		t.Errorf("%v, %v", got, err)
	}
	m, err := image.Manifest()
	if err != nil || len(m.Layers) != 1 || m.Layers[0].MediaType != types.OCIUncompressedLayer || m.MediaType != types.OCIManifestSchema1 || m.Config.MediaType != types.OCIConfigJSON ||
		len(m.Annotations) != 1 || m.Annotations["atoll.dev/vm-firmware"] != "efi" {
		t.Errorf("%+v, %v", m, err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewReader(plain)
	if h, err := archive.Next(); err != nil || h.Name != "disk/" || h.Typeflag != tar.TypeDir {
		t.Errorf("%+v, %v", h, err)
	}
	h, err := archive.Next()
	if err != nil || h.Name != "disk/web.qcow2" || h.Uid != 107 || h.Mode != 0o440 {
		t.Errorf("%+v, %v", h, err)
	}
	if got, err := io.ReadAll(archive); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if h, err := archive.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("%+v, %v", h, err)
	}
	before := w.sent.Load()
	if again, err := w.push(d); err != nil || again != digest || w.sent.Load() != before {
		t.Errorf("%s, %v, %d uploads", again, err, w.sent.Load()-before)
	}
	if _, err := w.push(w.disk([]byte("another"))); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "is there already") {
		t.Errorf("a tag was overwritten: %v", err)
	}
}

// TestWithin: who may push everywhere pushes to one repository.
func TestWithin(t *testing.T) {
	tag, err := name.NewTag(target)
	if err != nil {
		t.Fatal(err)
	}
	passed := ""
	to := library.Only{Push: true, Refused: errElsewhere, Next: roundTrip(func(r *http.Request) (*http.Response, error) {
		passed = r.URL.String()
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
	}), Repository: tag.Repository}
	const host = "https://registry.atoll.local"
	for url, ok := range map[string]bool{
		host + "/v2/": true, host + "/v2/shop/web/blobs/uploads/": true, host + "/registry/token?scope=repository%3Ashop%2Fweb%3Apush%2Cpull": true,
		host + "/v2/bank/web/manifests/1": false, host + "/v2/shop/web/../../bank/x": false, host + "/registry/token?scope=repository%3Abank%2Fweb%3Apush": false,
		"http://registry.atoll.local/v2/": false, "https://example.com/v2/": false,
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := to.RoundTrip(r)
		if err == nil {
			_ = resp.Body.Close()
		}
		if (err == nil) != ok || (passed == url) != ok {
			t.Errorf("%s: %v", url, err)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestLeftUpload: what a push that was killed has sent is ended by the next one, once.
func TestLeftUpload(t *testing.T) {
	w := newWorld(t)
	d := w.disk([]byte("a disk"))
	var ended []string
	kill := true
	w.refuse = func(r *http.Request) (int, string) {
		switch {
		case r.Method == http.MethodPatch && kill:
			return http.StatusNotImplemented, "killed"
		case r.Method == http.MethodDelete:
			ended = append(ended, r.URL.Path)
			return http.StatusNoContent, ""
		}
		return 0, ""
	}
	if _, err := w.push(d); err == nil {
		t.Fatal("it was pushed")
	}
	kill = false
	for range 2 {
		if _, err := w.push(d); err != nil || len(ended) == 0 || !strings.HasPrefix(ended[0], "/v2/shop/web/blobs/uploads/") {
			t.Fatalf("%v, ended %v", err, ended)
		}
	}
	if _, err := os.Stat(d.File.Name() + ".uploads"); !errors.Is(err, os.ErrNotExist) || len(ended) > 2 {
		t.Errorf("%v, ended %v", err, ended)
	}
}

// TestInterrupted: without the manifest there is no tag, and another push sends only what is missing.
func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	d := w.disk([]byte("a disk"))
	w.refuse = func(r *http.Request) (int, string) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			return http.StatusNotImplemented, "killed"
		}
		return 0, ""
	}
	if _, err := w.push(d); err == nil || errors.Is(err, ErrRefused) {
		t.Fatalf("%v", err)
	}
	sent := w.sent.Load()
	w.refuse = func(*http.Request) (int, string) { return 0, "" }
	if _, err := w.image(); err == nil {
		t.Error("there is a tag")
	}
	if _, err := w.push(d); err != nil || w.sent.Load() != sent {
		t.Errorf("%v, %d uploads", err, w.sent.Load()-sent)
	}
	if _, err := w.image(); err != nil {
		t.Error(err)
	}
}

// TestRefused: what stays refused is told from what may go away.
func TestRefused(t *testing.T) {
	for message, final := range map[string]bool{"project shop: quota 1 GiB, used 1 GiB": true, "tag x is immutable": true, "system:x may not push": false} {
		w := newWorld(t)
		w.refuse = func(r *http.Request) (int, string) {
			if r.Method == http.MethodPost || r.Method == http.MethodPut {
				return http.StatusForbidden, message
			}
			return 0, ""
		}
		if _, err := w.push(w.disk([]byte("a disk"))); err == nil || errors.Is(err, ErrRefused) != final || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: %v", message, err)
		}
	}
	w := newWorld(t)
	for _, reference := range []string{"registry.atoll.local/shop/No Name:1", "registry.atoll.local/shop/../bank/web:1", "registry.atoll.local/shop/web"} {
		if _, err := Push(t.Context(), Target{Registry: w.own, Reference: reference}, w.disk([]byte("x")), nil); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", reference, err)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Push(gone, Target{Registry: w.own, Reference: target}, w.disk([]byte("x")), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	w.own.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other(t)}))
	if _, err := w.push(w.disk([]byte("x"))); err == nil || w.sent.Load() != 0 {
		t.Errorf("another registry is trusted: %v", err)
	}
}

// other is a certificate of another server.
func other(t *testing.T) []byte {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	what := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(nil, what, what, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
