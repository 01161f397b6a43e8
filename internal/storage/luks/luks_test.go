package luks

import (
	"errors"
	"testing"
)

func TestSlots(t *testing.T) {
	header, err := New([]byte("0"))
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < slots; i++ {
		if header, err = Add(header, []byte("0"), []byte{byte('0' + i)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Add(header, []byte("0"), []byte("more")); !errors.Is(err, ErrSlots) {
		t.Errorf("a ninth slot: %v", err)
	}
	if again, err := Add(header, []byte("0"), []byte("5")); err != nil || string(again) != string(header) {
		t.Errorf("a passphrase it has: %v", err)
	}
	if _, err := Keep(header, []byte("wrong")); !errors.Is(err, ErrPassphrase) {
		t.Errorf("keeping a slot that is not there: %v", err)
	}
	if err := Check(header[:Size-1], []byte("0")); !errors.Is(err, ErrFormat) {
		t.Errorf("cut off: %v", err)
	}
}

func FuzzCheck(f *testing.F) {
	header, err := New([]byte("one"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(header[:592])
	f.Fuzz(func(t *testing.T, start []byte) {
		h, err := decode(append(start, header[min(len(start), Size):]...))
		if err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
		if err == nil && (h.Iterations > maxIterations || h.Slots[7].Offset > Size/sector) {
			t.Fatalf("%+v", h)
		}
	})
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		if _, err := New([]byte("one")); err != nil {
			b.Fatal(err)
		}
	}
}
