package images

import (
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 999949: "999.9 kB", 999950: "1.0 MB",
		44334080: "44.3 MB", 5_400_000_000: "5.4 GB", 7_000_000_000_000_000: "7000.0 TB",
	} {
		if got := FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestNormalize(t *testing.T) {
	for in, want := range map[string]string{
		"busybox": "docker.io/library/busybox:latest", "team/app:1": "docker.io/team/app:1",
		"localhost:5000/x": "localhost:5000/x:latest", "Bad Name": "", "": "",
	} {
		got, err := Normalize(in)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("Normalize(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestTagNames(t *testing.T) {
	const full, ref = "io.containerd.image.name", ocispec.AnnotationRefName
	tests := []struct {
		name, full, ref, override string
		want                      string // "" for an error
	}{
		{"containerd's annotation", "example.com/a:1", "1", "", "example.com/a:1"},
		{"full reference name", "", "example.com/a:2", "", "example.com/a:2"},
		{"short reference name", "", "team/a", "", "docker.io/team/a:latest"},
		{"name and tag", "", "busybox:1", "", "docker.io/library/busybox:1"},
		{"tag alone", "", "latest", "", ""},
		{"tag alone and a given name", "", "latest", "mine:3", "docker.io/library/mine:3"},
		{"own name wins", "example.com/a:1", "", "mine:3", "example.com/a:1"},
		{"nothing", "", "", "", ""},
		{"bad name", "a b", "", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := ocispec.Descriptor{Digest: digest.FromString("x"), Annotations: map[string]string{full: tt.full, ref: tt.ref}}
			got, err := tagNames(m, tt.override)
			if (err != nil) != (tt.want == "") || err == nil && (len(got) != 1 || got[0] != tt.want) {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func TestWithDigests(t *testing.T) {
	d := digest.FromString("x")
	got := withDigests([]string{"example.com/a:1"}, ocispec.Descriptor{Digest: d})
	if len(got) != 2 || got[1] != "example.com/a@"+d.String() {
		t.Errorf("got %q", got)
	}
}
