package enginetest

import (
	"context"
	"errors"
	"fmt"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// rollback: a volume goes back to its snapshots, in any order, and everything else stays.
func rollback(b *bench) {
	for _, class := range []string{"", "gold"} {
		must(b.s.Create(b.Context(), datastore.Spec{ID: "v", Size: gib, Encryption: class, Labels: map[string]string{"a": "b"}}))(b)
		b.create("u", gib)
		b.snapshot("other", "u")
		b.io("v", "write -P 1 0 1M")
		b.snapshot("s1", "v")
		b.io("v", "write -P 2 0 1M", "write -P 2 512M 1M")
		b.snapshot("s2", "v")
		b.io("v", "write -P 3 0 1M")
		must(b.s.Expand(b.Context(), "v", 2*gib, nil))(b)
		back := func(snapshot string) {
			b.Helper()
			for range 2 { // the second time there is nothing to do
				v := must(b.s.Rollback(b.Context(), "v", snapshot))(b)
				if v.Size != 2*gib || v.Labels["a"] != "b" || v.Encryption != class || v.State != datastore.StateReady {
					b.Errorf("%+v", v)
				}
			}
		}
		back("s1")
		b.io("v", "read -P 1 0 1M", "read -P 0 512M 1M", "read -P 0 1G 1G", "write -P 4 1M 1M")
		b.snapshot("s3", "v") // a branch of the tree
		back("s2")
		b.io("v", "read -P 2 0 1M", "read -P 0 1M 1M", "read -P 2 512M 1M", "write -P 5 1G 1M")
		b.sound()
		back("s3")
		b.io("v", "read -P 1 0 1M", "read -P 4 1M 1M", "read -P 0 512M 1M")
		b.ok(b.s.DeleteSnapshot(b.Context(), "s1"))
		b.ok(b.s.Tidy(b.Context()))
		back("s2")
		b.io("v", "read -P 2 0 1M", "read -P 2 512M 1M")

		_, err := b.s.Rollback(b.Context(), "v", "none")
		b.fails(err, datastore.ErrNotFound)
		_, err = b.s.Rollback(b.Context(), "none", "s2")
		b.fails(err, datastore.ErrNotFound)
		_, err = b.s.Rollback(b.Context(), "v", "other")
		b.fails(err, datastore.ErrInvalid)
		must(b.s.Attach(b.Context(), "v", "h", datastore.ReadWrite))(b)
		_, err = b.s.Rollback(b.Context(), "v", "s3")
		b.fails(err, datastore.ErrAttached)
		b.ok(b.s.Detach(b.Context(), "v", "h"))
		b.io("v", "read -P 2 0 1M")
		b.empty()
	}
}

// fill: a volume that is made with content is there when it has it, and not before.
func fill(b *bench) {
	failed := errors.New("no more")
	for _, class := range []string{"", "gold"} {
		spec := datastore.Spec{ID: "v", Size: gib, Encryption: class}
		spec.Fill = func(context.Context, datastore.Target) error { return failed }
		_, err := b.s.Create(b.Context(), spec)
		b.fails(err, failed)
		b.fails(volumeError(b, "v"), datastore.ErrNotFound)
		calls := 0
		spec.Fill = func(ctx context.Context, to datastore.Target) error {
			calls++
			if v, err := b.s.Volume(ctx, "v"); err != nil || v.State != datastore.StateCreating {
				return fmt.Errorf("while it is filled: %+v, %w", v, err)
			}
			if _, err := b.s.Rollback(ctx, "none", "none"); !errors.Is(err, datastore.ErrNotFound) {
				return fmt.Errorf("another operation meanwhile: %w", err)
			}
			keys := map[string]handover.WrappedKey{}
			return b.write(handover.Disk{Volume: "v", Size: to.Layer.Size, Layers: []handover.Layer{to.Layer}, Keys: keys}, to.Secrets, "write -P 7 512M 1M")
		}
		for range 2 {
			must(b.s.Create(b.Context(), spec))(b)
		}
		if calls != 1 {
			b.Errorf("filled %d times", calls)
		}
		must(b.s.Create(b.Context(), datastore.Spec{ID: "w", Encryption: class, Source: &datastore.Source{Volume: "v"}}))(b)
		b.io("v", "read -P 7 512M 1M", "read -P 0 0 1M")
		b.io("w", "read -P 7 512M 1M", "read -P 0 0 1M")
		b.ok(b.s.Delete(b.Context(), "v")) // what the copy needs of it stays
		b.io("w", "read -P 7 512M 1M")
		b.empty()
	}
	_, err := b.s.Create(b.Context(), datastore.Spec{ID: "x", Source: &datastore.Source{Volume: "y"}, Fill: func(context.Context, datastore.Target) error { return nil }})
	b.fails(err, datastore.ErrInvalid)
}
