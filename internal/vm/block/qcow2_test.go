package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// header is that of an image with incompatible features.
func header(version uint32, features uint64) []byte {
	h := make([]byte, 104)
	copy(h, "QFI\xfb")
	binary.BigEndian.PutUint32(h[4:], version)
	binary.BigEndian.PutUint64(h[72:], features)
	return h
}

func TestCheckQCOW2(t *testing.T) {
	for name, test := range map[string]struct {
		data []byte
		ok   bool
	}{
		"plain":     {header(3, 0), true},
		"dirty":     {header(3, qcow2Dirty|qcow2Compression|qcow2ExtendedL2), true},
		"version 2": {header(2, qcow2DataFile), true}, // the field does not exist there
		"data file": {header(3, qcow2DataFile), false},
		"corrupt":   {header(3, qcow2Corrupt), false},
		"unknown":   {header(3, 1<<40), false},
		"version 9": {header(9, 0), false},
		"raw":       {make([]byte, 512), false},
	} {
		if err := checkQCOW2(bytes.NewReader(test.data)); (err == nil) != test.ok || err != nil && !errors.Is(err, ErrImage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkQCOW2(bytes.NewReader(header(3, 0)[:20])); err == nil {
		t.Error("a short file was taken")
	}
}

func FuzzCheckQCOW2(f *testing.F) {
	f.Add(header(3, 0))
	f.Add(header(2, 4))
	f.Fuzz(func(t *testing.T, data []byte) {
		if checkQCOW2(bytes.NewReader(data)) == nil && len(data) >= 80 && data[7] == 3 && data[79]&qcow2DataFile != 0 {
			t.Error("an image with a data file was taken")
		}
	})
}
