package block

import (
	"os"
	"path/filepath"
	"testing"
)

func TestThrowAway(t *testing.T) {
	name := filepath.Join(t.TempDir(), "base")
	if err := os.WriteFile(name, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	base, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	l, err := ThrowAway(t.TempDir(), Volume{Layers: []Layer{{Format: Raw, File: base}}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.File.Close()
	if err := checkLayer(l, true); err != nil {
		t.Error(err)
	}
	size, err := volumeSize(Volume{Layers: []Layer{l}})
	if err != nil || size != 3<<20 {
		t.Errorf("%d, %v", size, err)
	}
	for _, l := range []Layer{{RBD: &RBD{}}, {Format: Raw, Key: []byte("k")}} {
		if _, err := ThrowAway(t.TempDir(), Volume{Layers: []Layer{l}}); err == nil {
			t.Errorf("%+v was taken", l)
		}
	}
}
