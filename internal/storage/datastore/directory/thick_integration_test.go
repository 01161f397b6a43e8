//go:build integration

package directory

import (
	"bytes"
	"testing"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/keys"
)

// TestThickGrowsThick: also while it is open, and encrypted.
func TestThickGrowsThick(t *testing.T) {
	const size, grown = 16 << 20, 64 << 20
	for _, spec := range []datastore.Spec{
		{ID: "qcow2", Format: handover.FormatQCOW2}, {ID: "luks", Encryption: "gold"},
	} {
		s := store(t, Config{Keys: keys.Wrapper{Source: keys.Static{"gold": {bytes.Repeat([]byte("g"), keys.Size)}}}})
		spec.Size, spec.Provisioning = size, datastore.Thick
		if _, err := s.Create(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		disk, err := s.Attach(t.Context(), spec.ID, "h", datastore.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Expand(t.Context(), spec.ID, grown, growing{disk.Layers[0].File}); err != nil {
			t.Fatal(err)
		}
		v, err := s.Volume(t.Context(), spec.ID)
		if err != nil || v.Used < grown {
			t.Errorf("%s: %d of %d bytes are reserved, %v", spec.ID, v.Used, grown, err)
		}
	}
}

// TestThinOverThick: what a snapshot puts on top of a thick volume is thin when it grows, what a thick copy has of its
// own is not.
func TestThinOverThick(t *testing.T) {
	const size, grown = 16 << 20, 256 << 20
	s := store(t, Config{})
	if _, err := s.Create(t.Context(), datastore.Spec{ID: "v", Size: size, Provisioning: datastore.Thick, Format: handover.FormatRaw}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(t.Context(), "s", "v", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), datastore.Spec{ID: "w", Provisioning: datastore.Thick, Source: &datastore.Source{Snapshot: "s"}}); err != nil {
		t.Fatal(err)
	}
	disk, err := s.Attach(t.Context(), "v", "h", datastore.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Expand(t.Context(), "v", grown, growing{disk.Layers[1].File}); err != nil {
		t.Fatal(err)
	}
	if err := s.Detach(t.Context(), "v", "h"); err != nil {
		t.Fatal(err)
	}
	for id, bytes := range map[string]int64{"v": 2 * grown, "w": grown} {
		if _, err := s.Expand(t.Context(), id, bytes, nil); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := s.Volume(t.Context(), "v"); err != nil || v.Used > 2*size {
		t.Errorf("over a snapshot %d bytes are reserved, %v", v.Used, err)
	}
	if w, err := s.Volume(t.Context(), "w"); err != nil || w.Used < grown {
		t.Errorf("%d of %d bytes of a copy are reserved, %v", w.Used, grown, err)
	}
}
