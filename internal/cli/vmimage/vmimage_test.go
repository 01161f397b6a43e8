package vmimage

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	content "atoll.dev/atoll/api/content/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

func config() Config {
	return Config{App: command.App{ErrOut: io.Discard}}
}

func TestPlan(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "Debian 12.qcow2.xz")
	if err := os.WriteFile(file, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	for _, c := range []struct {
		o                         ImportOptions
		object, name, what, local string
		err                       string
	}{
		{o: ImportOptions{Source: file}, object: "debian-12", name: "Debian 12", what: "upload " + abc, local: file},
		{o: ImportOptions{Source: file, Checksum: "sha512:" + strings.Repeat("0", 128)}, object: "debian-12", name: "Debian 12", what: "upload " + strings.Repeat("0", 128), local: file},
		{o: ImportOptions{Source: "https://h/a/x.ova?y=1", Name: "App"}, object: "app", name: "App", what: "http https://h/a/x.ova?y=1"},
		{o: ImportOptions{Source: "oci://r.example.com/disks/debian:12"}, object: "debian-12", name: "debian-12", what: "oci r.example.com/disks/debian:12"},
		{o: ImportOptions{Source: "oci://r/d@sha256:00", Checksum: "sha256:" + abc}, err: "digest"},
		{o: ImportOptions{Source: "ftp://h/a"}, err: "use a file"},
		{o: ImportOptions{Source: filepath.Join(dir, "none")}, err: "no such file"},
		{o: ImportOptions{Source: dir}, err: "not a file"},
		{o: ImportOptions{Source: file, Checksum: "md5:00"}, err: "sha256:HEX"},
		{o: ImportOptions{Source: "https://h/"}, err: "--name"},
	} {
		item, local, err := config().plan(t.Context(), c.o)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%+v: %v", c.o, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%+v: %v", c.o, err)
			continue
		}
		what := ""
		switch s := item.Spec.Source; {
		case s.HTTP != nil:
			what = "http " + s.HTTP.URL
		case s.OCI != nil:
			what = "oci " + s.OCI.Reference
		case s.Upload != nil:
			what = "upload " + s.Upload.Checksum.Value
		}
		if item.Name != c.object || item.Spec.Name != c.name || what != c.what || local != c.local {
			t.Errorf("%+v: %s, %s, %s, %s", c.o, item.Name, item.Spec.Name, what, local)
		}
	}
}

// TestUpload: a file is sent in pieces, over a connection that fails, to a server that has some of it.
func TestUpload(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x")
	want := bytes.Repeat([]byte("0123456789"), 1000)
	if err := os.WriteFile(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	got := append([]byte{}, want[:1234]...)
	failures := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		state := content.Uploaded{Received: int64(len(got)), Total: int64(len(want))}
		if r.Method == http.MethodPut {
			b, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			if failures++; failures == 1 {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = io.WriteString(w, `{"message":"not now"}`)
				return
			}
			if r.Header.Get("Content-Range") != "bytes 1234-9999/10000" {
				t.Errorf("range %s", r.Header.Get("Content-Range"))
			}
			got = append(got, b...)
			state.Received = int64(len(got))
		}
		state.Complete = state.Received == state.Total
		_ = json.NewEncoder(w).Encode(state)
	}))
	t.Cleanup(s.Close)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	u := upload{client: s.Client(), url: s.URL, file: f, total: int64(len(want)), bar: config().bar("")}
	if err := u.run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) || failures != 2 {
		t.Errorf("%d bytes, %d requests", len(got), failures)
	}
}

// TestTag: items of the registry are deleted there.
func TestTag(t *testing.T) {
	var own, pushed, found, cluster Item
	pushed.Namespace, pushed.Spec.Push, pushed.Status.Digest = "shop", &api.PushTarget{Repository: "web", Tag: "1"}, "sha256:0"
	found.Namespace, found.Annotations = "shop", map[string]string{api.TagAnnotation: "a/web:2"}
	cluster.Annotations = found.Annotations
	for i, want := range map[*Item]string{&own: "", &pushed: "shop/web:1", &found: "shop/a/web:2", &cluster: "library/a/web:2"} {
		if got := i.tag(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	pushed.Status.Digest = "" // not there yet
	if got := pushed.tag(); got != "" {
		t.Error(got)
	}
}
