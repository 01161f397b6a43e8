package chain

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// recordFormat is the version of what is in a record. A record of another version is not touched.
const recordFormat = 1

// maxLayers bounds a chain: QEMU opens every layer, and a read may have to ask all of them.
const maxLayers = handover.MaxLayers

// Kind is what a record describes.
type Kind string

// All kinds.
const (
	Volumes   Kind = "volumes"
	Snapshots Kind = "snapshots"
)

// Kinds are all of them.
func Kinds() []Kind { return []Kind{Volumes, Snapshots} }

// record is one volume or snapshot on disk. Everything that follows from other records (who shares a layer)
// is not in it.
type record struct {
	Format int    `json:"format"`
	Kind   Kind   `json:"kind"`
	ID     string `json:"id"`
	// State is creating until all layers exist, and deleting from the moment that the thing is gone for
	// its users until its layers are.
	State   datastore.State `json:"state"`
	Created time.Time       `json:"created"`
	Size    int64           `json:"size"`

	Provisioning datastore.Provisioning `json:"provisioning,omitempty"`
	Labels       map[string]string      `json:"labels,omitempty"`
	// Volume is what a snapshot was taken of.
	Volume       string `json:"volume,omitempty"`
	FromSnapshot string `json:"fromSnapshot,omitempty"`
	FromVolume   string `json:"fromVolume,omitempty"`

	// Layers from bottom to top.
	Layers []Layer `json:"layers"`
	// Dirty: somebody may have written to the top layer.
	Dirty bool `json:"dirty,omitempty"`
	// Pending is a top layer that is being added.
	Pending *pending `json:"pending,omitempty"`
	// Doomed are layers that belong to nobody else and are to be removed.
	Doomed []Layer `json:"doomed,omitempty"`

	// Class is that of the key-encryption key, "" for what is not encrypted; Key is the key of layers to
	// come, Keys are those of all layers, Rekey is the key that layers are being changed to.
	Class string                         `json:"class,omitempty"`
	Key   string                         `json:"key,omitempty"`
	Rekey string                         `json:"rekey,omitempty"`
	Keys  map[string]handover.WrappedKey `json:"keys,omitempty"`

	Attachments []datastore.Attachment `json:"attachments,omitempty"`
}

// Layer is one image, as it is in records.
type Layer struct {
	ID     string `json:"id"`
	Format string `json:"format"`
	Size   int64  `json:"size"`
	Key    string `json:"key,omitempty"`
	// Thick: it had room for all of it when it was made.
	Thick bool `json:"thick,omitempty"`
}

// pending is a freeze under way: layer becomes the top one, and what was below becomes snapshot, if that is
// not empty. It may be finished at any time, whatever happened since, unless QEMU has the volume open.
type pending struct {
	Layer    Layer  `json:"layer"`
	Snapshot string `json:"snapshot,omitempty"`
	// Rollback: the layer is to be over the chain of another record instead, and has nothing to do with this
	// one's. It is not finished, but given up.
	Rollback bool `json:"rollback,omitempty"`
	// unwritten: this operation has begun the freeze, and nobody can have the volume open for writing.
	unwritten bool
}

// Valid names. A layer's id is part of file and QEMU node names.
var (
	validID    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	validLayer = regexp.MustCompile(`^l[0-9a-f]{16}$`)
)

// newName returns a name that nobody has.
func newName(prefix string) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return prefix + hex.EncodeToString(b[:])
}

// encode returns the record as it is on disk.
func (r *record) encode() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encoding the record of %s: %w", r.ID, err)
	}
	return append(b, '\n'), nil
}

// decode reads a record. What comes back can be used without further checks.
func decode(k Kind, id string, b []byte) (*record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%w: record of %s: %w", datastore.ErrCorrupt, id, err)
	}
	if r.Kind != k || r.ID != id {
		return nil, fmt.Errorf("%w: record of %s %s is one of %.80q %.80q", datastore.ErrCorrupt, k, id, r.Kind, r.ID)
	}
	if err := r.validate(); err != nil {
		return nil, err
	}
	return &r, nil
}

// validate checks everything that code relies on.
func (r *record) validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: record of %s: %s", datastore.ErrCorrupt, r.ID, fmt.Sprintf(format, args...))
	}
	switch {
	case r.Format != recordFormat:
		return bad("format %d", r.Format)
	case !validID.MatchString(r.ID):
		return bad("id")
	case r.State != datastore.StateCreating && r.State != datastore.StateReady && r.State != datastore.StateDeleting:
		return bad("state %.80q", r.State)
	case r.Size < datastore.MinSize || r.Size > datastore.MaxSize:
		return bad("size %d", r.Size)
	case len(r.Layers) > maxLayers+1 || len(r.Doomed) > maxLayers+1:
		return bad("%d layers", len(r.Layers))
	case len(r.Layers) == 0 && r.State != datastore.StateDeleting:
		return bad("no layers")
	case r.Kind == Snapshots && (len(r.Attachments) > 0 || r.Pending != nil):
		return bad("a snapshot that is in use")
	case (r.Class == "") != (r.Key == "") && r.State != datastore.StateDeleting:
		return bad("class %.80q without a key", r.Class)
	case r.Pending != nil && r.Pending.Snapshot != "" && !validID.MatchString(r.Pending.Snapshot):
		return bad("pending snapshot")
	}
	seen := map[string]bool{}
	for i, l := range r.images() {
		switch _, known := r.Keys[l.Key]; {
		case !validLayer.MatchString(l.ID) || seen[l.ID]:
			return bad("layer %.80q", l.ID)
		case l.Format != handover.FormatRaw && l.Format != handover.FormatQCOW2:
			return bad("layer format %.80q", l.Format)
		case l.Format == handover.FormatRaw && (l.Key != "" || i > 0 && i < len(r.Layers)):
			return bad("a raw layer that is encrypted or not at the bottom")
		case l.Size < datastore.MinSize || l.Size > datastore.MaxSize || i < len(r.Layers) && l.Size > r.Size:
			return bad("layer of %d bytes", l.Size)
		case l.Key != "" && !known && !slices.ContainsFunc(r.Doomed, func(d Layer) bool { return d.ID == l.ID }):
			return bad("no key %.80q", l.Key)
		}
		seen[l.ID] = true
	}
	for _, a := range r.Attachments {
		if a.Holder == "" || a.Mode != datastore.ReadWrite && a.Mode != datastore.ReadOnly && a.Mode != datastore.ReadWriteMany {
			return bad("attachment %.80q %.80q", a.Holder, a.Mode)
		}
	}
	return nil
}

// images are all layers that the record names, for whatever reason.
func (r *record) images() []Layer {
	all := slices.Clone(r.Layers)
	if r.Pending != nil {
		all = append(all, r.Pending.Layer)
	}
	return append(all, r.Doomed...)
}

// top is the layer that is written.
func (r *record) top() Layer { return r.Layers[len(r.Layers)-1] }

// writer returns who has the volume open for writing.
func (r *record) writer() (datastore.Attachment, bool) {
	i := slices.IndexFunc(r.Attachments, func(a datastore.Attachment) bool { return a.Mode != datastore.ReadOnly })
	if i < 0 {
		return datastore.Attachment{}, false
	}
	return r.Attachments[i], true
}

// attached returns ErrAttached with the first holder's name.
func (r *record) attached() error {
	if len(r.Attachments) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s %s by %s since %s", datastore.ErrAttached, r.ID, r.Attachments[0].Mode, r.Attachments[0].Holder,
		r.Attachments[0].Since.Format(time.RFC3339))
}

// frozen returns the layers that hold what is in a volume now, and will not change: all but the top one if
// nobody can have written to that. It returns nil if there are none such.
func (r *record) frozen() []Layer {
	if r.Dirty || len(r.Layers) < 2 || r.Pending != nil {
		return nil
	}
	return r.below()
}

// below returns all layers but the top one.
func (r *record) below() []Layer { return slices.Clone(r.Layers[:len(r.Layers)-1]) }

// usedKeys are the keys of some layers and the one called current, by name.
func (r *record) usedKeys(current string, layers []Layer) map[string]handover.WrappedKey {
	out := map[string]handover.WrappedKey{}
	maps.Copy(out, r.Keys)
	maps.DeleteFunc(out, func(name string, _ handover.WrappedKey) bool {
		return name != current && !slices.ContainsFunc(layers, func(l Layer) bool { return l.Key == name })
	})
	if len(out) == 0 {
		return nil
	}
	return out
}

// keks are the key-encryption keys that wrap the keys of a record.
func (r *record) keks() []datastore.KEK {
	var out []datastore.KEK
	for _, name := range slices.Sorted(maps.Keys(r.Keys)) {
		if k := by(r.Keys[name]); !slices.ContainsFunc(out, k.Same) {
			out = append(out, k)
		}
	}
	return out
}

// by names the key-encryption key of a wrapped key.
func by(w handover.WrappedKey) datastore.KEK {
	return datastore.KEK{Provider: cmp.Or(w.Provider, w.Class), ID: w.KeyID, Fingerprint: w.KEK}
}

// references counts how many of the records need each layer. Doomed layers are needed by nobody.
func references(records []*record) map[string]int {
	refs := map[string]int{}
	for _, r := range records {
		for _, l := range r.Layers {
			refs[l.ID]++
		}
		if r.Pending != nil {
			refs[r.Pending.Layer.ID]++
		}
	}
	return refs
}

// unneeded returns those of the layers that no other record needs.
func (r *record) unneeded(records []*record, layers []Layer) []Layer {
	refs := references(slices.DeleteFunc(slices.Clone(records), func(other *record) bool {
		return other.Kind == r.Kind && other.ID == r.ID
	}))
	return slices.DeleteFunc(slices.Clone(layers), func(l Layer) bool { return refs[l.ID] > 0 })
}

// ValidID tells whether an id is good as the name of a record.
func ValidID(id string) bool { return validID.MatchString(id) }
