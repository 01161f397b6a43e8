package rotation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// backend has these contents, and notes what is wrapped anew.
type backend struct {
	stores.Backend
	contents datastore.Contents
	err      error
	wrapped  []string
}

func (b *backend) List(context.Context) (datastore.Contents, error) { return b.contents, b.err }

func (b *backend) Rewrap(_ context.Context, of datastore.Source, _ string) error {
	b.wrapped = append(b.wrapped, of.Volume)
	return nil
}

// current is Keys whose key in use is this one.
type current struct{ kek datastore.KEK }

func (c current) Current(context.Context, string) (datastore.KEK, error) { return c.kek, nil }

func (current) Wrap(context.Context, string, []byte, []byte) (handover.WrappedKey, error) {
	return handover.WrappedKey{}, errors.ErrUnsupported
}

func (current) Unwrap(context.Context, handover.WrappedKey, []byte) ([]byte, error) {
	return nil, errors.ErrUnsupported
}

// TestUnseen: what cannot be read is said, what is beside it is found, and a volume that is being made counts.
func TestUnseen(t *testing.T) {
	old, now := datastore.KEK{Provider: "corp", Fingerprint: "a"}, datastore.KEK{Provider: "corp", Fingerprint: "b"}
	volume := func(id string, state datastore.State, by datastore.KEK) datastore.Volume {
		return datastore.Volume{ID: id, Encryption: "gold", State: state, KEKs: []datastore.KEK{by}}
	}
	damaged := &backend{
		contents: datastore.Contents{Volumes: []datastore.Volume{
			volume("one", datastore.StateReady, old), volume("new", datastore.StateCreating, old), volume("gone", datastore.StateDeleting, old),
		}},
		err: fmt.Errorf("%w: record of two", datastore.ErrCorrupt),
	}
	items, err := Items(t.Context(), []stores.Store{
		{Name: "far", Backend: &backend{err: datastore.ErrUnavailable}}, {Name: "near", Backend: damaged},
	})
	if !errors.Is(err, datastore.ErrUnavailable) || !errors.Is(err, datastore.ErrCorrupt) ||
		!strings.Contains(err.Error(), "datastore far") || !strings.Contains(err.Error(), "record of two") {
		t.Errorf("what cannot be read: %v", err)
	}
	r := Rewrap(t.Context(), current{now}, items, "gold", nil)
	if r.Total != 2 || r.Current != 1 || r.Err != nil || fmt.Sprint(damaged.wrapped) != "[one]" {
		t.Errorf("%+v, wrapped %v", r, damaged.wrapped)
	}
}
