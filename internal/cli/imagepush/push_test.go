package imagepush

import (
	"archive/tar"
	"bytes"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// ociArchive writes two images as an OCI layout in a tar file, named one and two.
func ociArchive(t *testing.T) (file string, one, two v1.Image) {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	images := make([]v1.Image, 2)
	for i, n := range []string{"one", "two"} {
		if images[i], err = random.Image(1000, 2); err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(images[i], layout.WithAnnotations(map[string]string{nameAnnotation: "docker.io/library/" + n + ":latest"})); err != nil {
			t.Fatal(err)
		}
	}
	file = filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return file, images[0], images[1]
}

func digest(t *testing.T, i v1.Image) string {
	t.Helper()
	h, err := i.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

// server is a registry behind TLS that wants dana's password.
func server(t *testing.T) Session {
	t.Helper()
	inner := registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)))
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "dana" || password != "open sesame" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if strings.HasPrefix(r.URL.Path, "/v2/other/") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	return Session{Portal: strings.TrimPrefix(s.URL, "https://"), CA: ca, User: "dana", Password: "open sesame"}
}

// TestPush sends to the address, since the test's certificate has no name of ours.
func TestPush(t *testing.T) {
	t.Parallel()
	s := server(t)
	file, one, two := ociArchive(t)
	for image, want := range map[string]v1.Image{"": one, "docker.io/library/two:latest": two} {
		got, err := Push(t.Context(), s, Options{Archive: file, Image: image, Target: s.Portal + "/shop/app:1"})
		if err != nil {
			t.Fatal(err)
		}
		if got != digest(t, want) {
			t.Errorf("image %q: pushed %s, want %s", image, got, digest(t, want))
		}
	}
	_, err := Push(t.Context(), s, Options{Archive: file, Target: s.Portal + "/other/app:1"})
	says(t, err, "role Edit")
	s.Password = "wrong"
	_, err = Push(t.Context(), s, Options{Archive: file, Target: s.Portal + "/shop/app:1"})
	says(t, err, "atoll login")
}

// TestPushByName: the registry's name is looked for at the portal, and only over TLS with a certificate for it.
func TestPushByName(t *testing.T) {
	t.Parallel()
	s := server(t)
	file, _, _ := ociArchive(t)
	_, err := Push(t.Context(), s, Options{Archive: file, Target: RegistryHost + "/shop/app:1"})
	says(t, err, RegistryHost+" is not asked without TLS")
	says(t, err, "certificate is valid for")
}

func TestDockerSave(t *testing.T) {
	t.Parallel()
	s := server(t)
	one, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "save.tar")
	tag, err := name.NewTag("app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(file, tag, one); err != nil {
		t.Fatal(err)
	}
	for _, image := range []string{"", "app:1"} {
		if _, err := Push(t.Context(), s, Options{Archive: file, Image: image, Target: s.Portal + "/shop/app:1"}); err != nil {
			t.Errorf("image %q: %v", image, err)
		}
	}
	_, err = Push(t.Context(), s, Options{Archive: file, Image: "no:1", Target: s.Portal + "/shop/app:1"})
	says(t, err, "no:1")
}

func TestWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, _, _ := ociArchive(t)
	b, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for file, c := range map[string]struct{ image, target, want string }{
		filepath.Join(dir, "none.tar"):                        {"", "h.example/p/a:1", "none.tar"},
		write("gz.tar", []byte{0x1f, 0x8b, 8, 0}):             {"", "h.example/p/a:1", "gunzip"},
		write("text.tar", bytes.Repeat([]byte("text"), 1000)): {"", "h.example/p/a:1", "reading the archive"},
		write("empty.tar", make([]byte, 1024)):                {"", "h.example/p/a:1", "index.json"},
		write("cut.tar", b[:len(b)/3]):                        {"", "h.example/p/a:1", "reading the archive"},
		write("between.tar", b[:512]):                         {"", "h.example/p/a:1", "cut off"}, // after a directory
		good:                                                  {"three", "h.example/p/a:1", "docker.io/library/two:latest"},
		write("a", nil):                                       {"", "shop/app:1", RegistryHost + "/PROJECT"},
		write("b", nil):                                       {"", "h.example/shop/app@sha256:" + strings.Repeat("0", 64), "digest"},
		write("c", nil):                                       {"", "h.example/UP:1", "no name of an image"},
	} {
		_, err := Push(t.Context(), Session{}, Options{Archive: file, Image: c.image, Target: c.target})
		says(t, err, c.want)
	}
}

func says(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%q is not in: %v", want, err)
	}
}
