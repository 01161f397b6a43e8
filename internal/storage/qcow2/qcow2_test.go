package qcow2

import (
	"bytes"
	"errors"
	"testing"
)

func FuzzRead(f *testing.F) {
	for _, i := range []Image{{Size: 1 << 20}, {Size: 1 << 30, Backing: "b", BackingFormat: "qcow2"}, {Size: 1 << 20, LUKS: make([]byte, 70000)}} {
		header, err := i.header(3, 1)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(header)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Read(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrFeature) {
				t.Fatal(err)
			}
			return
		}
		if h.Size < 0 || len(h.Backing) > 1023 || h.LUKS && (h.CryptOffset <= 0 || h.CryptSize <= 0) {
			t.Fatalf("%+v", h)
		}
	})
}
