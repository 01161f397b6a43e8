package chain

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Rollback makes a volume go on from one of its snapshots.
//
// Steps: the record of the volume names the new layer; the layer; the record of the volume, whose chain is that of
// the snapshot with the layer on top, and in which the layers that nobody else has are doomed; the files. What a
// crash leaves before the third is given up by whoever opens the volume next, or Tidy.
func (s *Store) Rollback(ctx context.Context, id, snapshot string) (datastore.Volume, error) {
	if err := checkID(id, snapshot); err != nil {
		return datastore.Volume{}, err
	}
	var out datastore.Volume
	err := s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Snapshots, snapshot), lockName(Volumes, id)); err != nil {
			return err
		}
		v, err := o.get(Volumes, id)
		if err == nil {
			err = o.rollback(v, snapshot)
		}
		if err != nil {
			return fmt.Errorf("rolling volume %s back to snapshot %s: %w", id, snapshot, err)
		}
		out, err = o.describe(v, nil)
		return err
	})
	return out, err
}

func (o *op) rollback(v *record, snapshot string) error {
	from, err := o.get(Snapshots, snapshot)
	switch {
	case err != nil:
		return err
	case v.State != datastore.StateReady:
		return fmt.Errorf("%w: the volume is %s", datastore.ErrNotFound, v.State)
	case from.State != datastore.StateReady:
		return fmt.Errorf("%w: the snapshot is %s", datastore.ErrNotFound, from.State)
	case from.Volume != v.ID:
		return fmt.Errorf("%w: it is a snapshot of %s", datastore.ErrInvalid, from.Volume)
	case (from.Class == "") != (v.Class == ""):
		return fmt.Errorf("%w: only one of the two is encrypted", datastore.ErrUnsupported)
	case len(from.Layers) >= maxLayers:
		return tooDeep()
	}
	if err := v.attached(); err != nil {
		return err
	}
	if v.Pending != nil {
		if err := o.thaw(v, nil); err != nil {
			return err
		}
	}
	if v.Rekey != "" {
		if _, err := o.rekey(v); err != nil {
			return err
		}
	}
	if slices.EqualFunc(v.frozen(), from.Layers, func(a, b Layer) bool { return a.ID == b.ID }) {
		return nil
	}
	if err := o.room(0, 0, false); err != nil {
		return err
	}
	keys := from.usedKeys("", from.Layers)
	if v.Class != "" {
		if keys == nil {
			keys = map[string]handover.WrappedKey{}
		}
		keys[v.Key] = v.Keys[v.Key]
		next := &record{ID: v.ID, Keys: keys}
		if err := o.rewrap(next, v.Class); err != nil {
			return err
		}
		keys = next.Keys
	}
	layer := Layer{ID: newName("l"), Format: handover.FormatQCOW2, Size: v.Size, Key: v.Key}
	i := Image{Layer: layer, Below: &from.Layers[len(from.Layers)-1], Provisioning: datastore.Thin}
	if v.Class != "" {
		if err := o.encryptWith(v, &i, v.Key); err != nil {
			return err
		}
	}
	v.Pending = &pending{Layer: layer, Rollback: true}
	if err := o.put(v); err != nil {
		return err
	}
	if err := o.make(i); err != nil {
		return err
	}
	if err := o.replace(v, append(slices.Clone(from.Layers), layer), keys); err != nil {
		return err
	}
	return o.clean(v)
}

// replace gives a volume other layers, and dooms those it had and nobody else needs.
func (o *op) replace(v *record, layers []Layer, keys map[string]handover.WrappedKey) error {
	return o.locked(func() error {
		records, err := o.all()
		if err != nil {
			return err
		}
		old := v.Layers
		v.Layers, v.Pending, v.Dirty, v.Keys = layers, nil, false, maps.Clone(keys)
		gone := slices.DeleteFunc(v.unneeded(records, old), func(l Layer) bool {
			return slices.ContainsFunc(layers, func(kept Layer) bool { return kept.ID == l.ID })
		})
		v.Doomed = append(slices.Clone(v.Doomed), gone...)
		return o.put(v)
	})
}

// giveUp removes the layer of a rollback that was interrupted.
func (o *op) giveUp(v *record) error {
	v.Doomed = append(slices.Clone(v.Doomed), v.Pending.Layer)
	v.Pending = nil
	if err := o.put(v); err != nil {
		return err
	}
	return o.clean(v)
}
