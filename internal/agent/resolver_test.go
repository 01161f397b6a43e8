package agent

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestNameServers(t *testing.T) {
	text := "# comment\nsearch example.org\nnameserver 192.0.2.53\nnameserver 2001:db8::53 # trailing\nnameserver nonsense\nnameserver\n options ndots:2\n"
	want := []string{"192.0.2.53", "2001:db8::53"}
	if got := nameServers([]byte(text)); !slices.Equal(got, want) {
		t.Fatalf("got %v", got)
	}
}

func TestReadResolver(t *testing.T) {
	dir := t.TempDir()
	missing, err := readResolver(filepath.Join(dir, "none"), filepath.Join(dir, "state"))
	if err != nil || len(missing.upstreams) != 0 {
		t.Fatalf("%+v, %v", missing, err)
	}
	if info, err := os.Stat(missing.path); err != nil || info.Size() != 0 {
		t.Fatalf("%v, %v", info, err)
	}
	path := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := readResolver(path, dir)
	if err != nil || got.path != path || !slices.Equal(got.upstreams, []string{"192.0.2.53"}) {
		t.Fatalf("%+v, %v", got, err)
	}
}

func FuzzNameServers(f *testing.F) {
	f.Add([]byte("nameserver 127.0.0.53\n"))
	f.Fuzz(func(_ *testing.T, text []byte) { allLoopback(nameServers(text)) })
}
