package chain

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// example is a record with everything in it.
func example() *record {
	return &record{
		Format: recordFormat, Kind: Volumes, ID: "v.1-a", State: datastore.StateReady, Created: time.Unix(1, 0).UTC(), Size: 2 << 20,
		Provisioning: datastore.Thick, Labels: map[string]string{"a": "b"}, FromSnapshot: "s",
		Layers: []Layer{
			{ID: "l0000000000000001", Format: handover.FormatRaw, Size: 1 << 20},
			{ID: "l0000000000000002", Format: handover.FormatQCOW2, Size: 2 << 20, Key: "v/k"},
		},
		Dirty:   true,
		Pending: &pending{Layer: Layer{ID: "l0000000000000003", Format: handover.FormatQCOW2, Size: 2 << 20, Key: "v/k"}, Snapshot: "t"},
		Doomed:  []Layer{{ID: "l0000000000000004", Format: handover.FormatQCOW2, Size: 1 << 20, Key: "gone"}},
		Class:   "gold", Key: "v/k", Keys: map[string]handover.WrappedKey{"v/k": {Class: "gold", KEK: "x", Data: []byte("y")}},
		Attachments: []datastore.Attachment{{Holder: "h", Mode: datastore.ReadWrite}},
	}
}

func TestRecord(t *testing.T) {
	b, err := example().encode()
	if err != nil {
		t.Fatal(err)
	}
	if r, err := decode(Volumes, "v.1-a", b); err != nil {
		t.Fatal(err)
	} else if again, err := r.encode(); err != nil || string(again) != string(b) {
		t.Fatalf("%s\n%s, %v", b, again, err)
	}
	if _, err := decode(Snapshots, "v.1-a", b); !errors.Is(err, datastore.ErrCorrupt) {
		t.Errorf("as a snapshot: %v", err)
	}
	if _, err := decode(Volumes, "other", b); !errors.Is(err, datastore.ErrCorrupt) {
		t.Errorf("under another name: %v", err)
	}
	for name, damage := range map[string]func(r *record){
		"format":        func(r *record) { r.Format++ },
		"id":            func(r *record) { r.ID = "../v" },
		"state":         func(r *record) { r.State = "odd" },
		"size":          func(r *record) { r.Size = -1 },
		"no layers":     func(r *record) { r.Layers = nil },
		"path as layer": func(r *record) { r.Layers[0].ID = "../../etc/shadow" },
		"layer twice":   func(r *record) { r.Layers[1].ID = r.Layers[0].ID },
		"layer format":  func(r *record) { r.Layers[1].Format = "vmdk" },
		"raw on top":    func(r *record) { r.Layers[1].Format, r.Layers[1].Key = handover.FormatRaw, "" },
		"layer size":    func(r *record) { r.Layers[1].Size = 4 << 20 },
		"no key":        func(r *record) { r.Keys = nil },
		"no class":      func(r *record) { r.Class = "" },
		"too many":      func(r *record) { r.Layers = make([]Layer, 1000) },
		"doomed path":   func(r *record) { r.Doomed[0].ID = "/" },
		"doomed in use": func(r *record) { r.Doomed[0] = r.Layers[0] },
		"no holder":     func(r *record) { r.Attachments[0].Holder = "" },
		"mode":          func(r *record) { r.Attachments[0].Mode = "all" },
		"pending name":  func(r *record) { r.Pending.Snapshot = "../s" },
		"snapshot":      func(r *record) { r.Kind = Snapshots },
	} {
		r := example()
		damage(r)
		if _, err := r.encode(); !errors.Is(err, datastore.ErrCorrupt) {
			t.Errorf("%s: written: %v", name, err)
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decode(r.Kind, r.ID, b); !errors.Is(err, datastore.ErrCorrupt) {
			t.Errorf("%s: read: %v", name, err)
		}
	}
}

func TestIDs(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "pvc-0b9f": true, "a.b": true, strings.Repeat("a", 63): true,
		"": false, ".": false, "..": false, "a/b": false, "A": false, "-a": false, "a-": false, ".json": false, strings.Repeat("a", 64): false, "a\n": false,
	} {
		if ValidID(id) != want {
			t.Errorf("%q: %t", id, !want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, err := example().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":1,"kind":"volumes","id":"v.1-a","state":"deleting","size":1048576}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decode(Volumes, "v.1-a", b)
		if err != nil {
			if !errors.Is(err, datastore.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for _, l := range r.images() {
			if name := ImageName(l); len(name) != 21 || strings.ContainsAny(name, "/\x00") {
				t.Fatalf("image %q", name)
			}
		}
		if again, err := r.encode(); err != nil {
			t.Fatal(err)
		} else if _, err := decode(Volumes, r.ID, again); err != nil {
			t.Fatal(err)
		}
		r.frozen()
		references([]*record{r})
		findPair([]*record{r}, map[string]bool{})
	})
}
