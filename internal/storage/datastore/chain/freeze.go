package chain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Snapshot keeps what is in a volume now.
func (s *Store) Snapshot(ctx context.Context, id, volume string, live datastore.Live) (datastore.Snapshot, error) {
	if err := checkID(id, volume); err != nil {
		return datastore.Snapshot{}, err
	}
	var out datastore.Snapshot
	err := s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Snapshots, id), lockName(Volumes, volume)); err != nil {
			return err
		}
		r, err := o.snapshot(id, volume, live)
		if err != nil {
			return fmt.Errorf("making snapshot %s of %s: %w", id, volume, err)
		}
		out, err = o.describeSnapshot(r, nil)
		return err
	})
	return out, err
}

func (o *op) snapshot(id, volume string, live datastore.Live) (*record, error) {
	r, err := o.find(Snapshots, id)
	if err != nil {
		return nil, err
	}
	if r != nil && r.State == datastore.StateReady {
		if r.Volume != volume {
			return nil, fmt.Errorf("%w: it is one of %s", datastore.ErrExists, r.Volume)
		}
		return r, nil
	}
	if r != nil {
		if err := o.finishDelete(r); err != nil {
			return nil, err
		}
	}
	v, err := o.get(Volumes, volume)
	if err != nil {
		return nil, err
	}
	if v.State != datastore.StateReady {
		return nil, fmt.Errorf("%w: volume %s is %s", datastore.ErrNotFound, volume, v.State)
	}
	if _, err := o.freeze(v, id, live); err != nil {
		return nil, err
	}
	return o.get(Snapshots, id)
}

// freeze sees to it that what is in a volume now is in layers that will not change, returns these, and makes
// them snapshot id if that is not empty. An earlier freeze that was not finished is finished first.
//
// Steps: the record of the volume names the new layer as pending; the layer; QEMU, if it has the volume
// open; the record of the snapshot; the record of the volume, with the layer on top. After a crash any step
// can be done again. QEMU may have been ended in between: the layer on top then is right whether QEMU had
// begun to write to it or not, and the snapshot is one of some moment since the call.
func (o *op) freeze(v *record, id string, live datastore.Live) ([]Layer, error) {
	writer, open := v.writer()
	switch {
	case open && live == nil:
		return nil, v.attached()
	case open && writer.Mode == datastore.ReadWriteMany:
		return nil, fmt.Errorf("%w: freezing %s while several may write it", datastore.ErrUnsupported, v.ID)
	case !open:
		live = nil
	}
	if p := v.Pending; p != nil {
		if err := o.thaw(v, live); err != nil {
			return nil, err
		}
		if id != "" && p.Snapshot == id {
			return v.below(), nil
		}
	}
	if layers := v.frozen(); layers != nil {
		if id == "" {
			return layers, nil
		}
		return layers, o.keep(v, id, layers)
	}
	if len(v.Layers) >= maxLayers {
		return nil, tooDeep()
	}
	if err := o.room(0, 0, false); err != nil {
		return nil, err
	}
	v.Pending = &pending{Layer: Layer{ID: newName("l"), Format: handover.FormatQCOW2, Size: v.Size, Key: v.Key}, Snapshot: id, unwritten: !open}
	if err := o.put(v); err != nil {
		return nil, err
	}
	if err := o.thaw(v, live); err != nil {
		return nil, err
	}
	return v.below(), nil
}

// tooDeep is for what would have more layers than can be opened.
func tooDeep() error {
	return fmt.Errorf(
		"%w: it would have more than %d layers; delete snapshots of the volume, then detach it for a while so that layers are merged",
		datastore.ErrUnsupported, maxLayers,
	)
}

// thaw finishes a freeze. The layer of one that was found in the record may have been written to already.
func (o *op) thaw(v *record, live datastore.Live) error {
	p := v.Pending
	if p.Rollback {
		return o.giveUp(v)
	}
	i := Image{Layer: p.Layer, Below: &v.Layers[len(v.Layers)-1], Provisioning: datastore.Thin}
	if v.Class != "" {
		if err := o.encryptWith(v, &i, p.Layer.Key); err != nil {
			return err
		}
	}
	if err := o.make(i); err != nil {
		return err
	}
	if live != nil {
		overlay := o.place.Images().Locate(p.Layer)
		overlay.ReadOnly = false
		var key *handover.WrappedKey
		if wrapped, ok := v.Keys[p.Layer.Key]; ok {
			key = &wrapped
		}
		o.away()
		err := live.Snapshot(o.ctx, overlay, key)
		o.tick()
		if errors.Is(err, datastore.ErrNotOpen) {
			err = nil // whoever opens it next finds the layer in the record
		}
		if err != nil {
			return fmt.Errorf("adding a layer to the open disk: %w", err)
		}
	}
	if p.Snapshot != "" {
		if err := o.keep(v, p.Snapshot, v.Layers); err != nil {
			return err
		}
	}
	v.Layers, v.Dirty, v.Pending = append(slices.Clone(v.Layers), p.Layer), !p.unwritten, nil
	return o.put(v)
}

// keep writes the record of a snapshot. One of another volume that has taken the name since stays.
func (o *op) keep(v *record, id string, layers []Layer) error {
	if old, err := o.find(Snapshots, id); err != nil || old != nil && old.Volume != v.ID {
		return err
	}
	r := &record{
		Format: recordFormat, Kind: Snapshots, ID: id, State: datastore.StateReady, Created: time.Now().UTC(), Size: v.Size,
		Volume: v.ID, Layers: slices.Clone(layers), Class: v.Class, Key: v.Key, Keys: v.usedKeys(v.Key, layers),
	}
	return o.put(r)
}

// forgetPending sees to it that a snapshot that was never finished is not finished later.
func (o *op) forgetPending(id string) error {
	records, _, err := o.readAll()
	if err != nil {
		return err
	}
	for _, r := range records {
		if r.Pending == nil || r.Pending.Snapshot != id {
			continue
		}
		o.locks.Release() // Snapshots are locked before Volumes only together
		if err := o.lock(lockName(Snapshots, id), lockName(Volumes, r.ID)); err != nil {
			return err
		}
		v, err := o.find(Volumes, r.ID)
		if err != nil {
			return err
		}
		if v == nil || v.Pending == nil || v.Pending.Snapshot != id {
			continue
		}
		v.Pending.Snapshot = ""
		if err := o.put(v); err != nil {
			return err
		}
	}
	return nil
}

// Expand makes a volume larger: first the file, then the record.
func (s *Store) Expand(ctx context.Context, id string, bytes int64, live datastore.Live) (datastore.Volume, error) {
	if err := checkID(id); err != nil {
		return datastore.Volume{}, err
	}
	size, err := roundSize(bytes)
	if err != nil {
		return datastore.Volume{}, fmt.Errorf("volume %s: %w", id, err)
	}
	var out datastore.Volume
	err = s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Volumes, id)); err != nil {
			return err
		}
		v, err := o.get(Volumes, id)
		if err == nil {
			err = o.expand(v, size, live)
		}
		if err != nil {
			return fmt.Errorf("growing volume %s: %w", id, err)
		}
		out, err = o.describe(v, nil)
		return err
	})
	return out, err
}

func (o *op) expand(v *record, size int64, live datastore.Live) error {
	switch {
	case v.State != datastore.StateReady:
		return fmt.Errorf("%w: it is %s", datastore.ErrNotFound, v.State)
	case size < v.Size:
		return fmt.Errorf("%w: from %d to %d bytes", datastore.ErrShrink, v.Size, size)
	case size == v.Size:
		return nil
	case len(v.Attachments) > 0:
		if _, open := v.writer(); !open || live == nil || len(v.Attachments) > 1 {
			return v.attached()
		}
	default:
		live = nil
	}
	if v.Pending != nil {
		if err := o.thaw(v, live); err != nil {
			return err
		}
	}
	// What a snapshot put on top of a thick volume is thin, and stays so.
	top := v.top()
	thick := v.Provisioning != datastore.Thin && (top.Thick || len(v.Layers) == 1)
	need, err := o.growth(top, size, thick)
	if err != nil {
		return err
	}
	if err := o.locked(func() error { return o.room(size-v.Size, need, thick) }); err != nil {
		return err
	}
	if live == nil || top.Format == handover.FormatRaw {
		if err := o.step(); err != nil {
			return err
		}
		if err := o.place.Images().Grow(o.ctx, top, size, thick, o.secrets(v)); err != nil {
			return err
		}
	} else if thick {
		if err := o.place.Images().Reserve(top, size); err != nil {
			return err
		}
	}
	if live != nil {
		o.away()
		err := live.Resize(o.ctx, size)
		o.tick()
		if errors.Is(err, datastore.ErrNotOpen) && top.Format == handover.FormatRaw {
			err = nil // see above
		} else if errors.Is(err, datastore.ErrNotOpen) {
			err = o.place.Images().Grow(o.ctx, top, size, thick, o.secrets(v))
		}
		if err != nil {
			return fmt.Errorf("growing the open disk: %w", err)
		}
	}
	v.Size = size
	v.Layers[len(v.Layers)-1].Size = size
	return o.put(v)
}

// growth is how much room is taken when a layer grows: if it is thick, all that it has not got yet.
func (o *op) growth(l Layer, size int64, thick bool) (int64, error) {
	if !thick {
		return 0, nil
	}
	used, err := o.place.Images().Used(l)
	if err != nil {
		return 0, fmt.Errorf("looking at image %s: %w", l.ID, err)
	}
	return max(size-used, 0), nil
}

// describeSnapshot is what the caller learns about a snapshot.
func (o *op) describeSnapshot(r *record, refs map[string]int) (datastore.Snapshot, error) {
	used, err := o.unshared(r, refs)
	return datastore.Snapshot{
		ID: r.ID, Volume: r.Volume, Size: r.Size, Created: r.Created, Encryption: r.Class, KEKs: r.keks(), Used: used,
	}, err
}

// List returns everything that is there.
func (s *Store) List(ctx context.Context) (datastore.Contents, error) {
	var out datastore.Contents
	err := s.run(ctx, func(o *op) error {
		records, damaged, err := o.readAll()
		if err != nil {
			return err
		}
		refs := references(records)
		for _, r := range records {
			if r.Kind == Volumes {
				v, err := o.describe(r, refs)
				if err != nil {
					return err
				}
				out.Volumes = append(out.Volumes, v)
			} else if r.State == datastore.StateReady {
				v, err := o.describeSnapshot(r, refs)
				if err != nil {
					return err
				}
				out.Snapshots = append(out.Snapshots, v)
			}
		}
		for _, err := range damaged { // the rest is still worth having
			return err
		}
		return nil
	})
	if err != nil && !errors.Is(err, datastore.ErrCorrupt) {
		return datastore.Contents{}, err
	}
	return out, err
}

// Volume returns one volume.
func (s *Store) Volume(ctx context.Context, id string) (datastore.Volume, error) {
	if err := checkID(id); err != nil {
		return datastore.Volume{}, err
	}
	var out datastore.Volume
	err := s.run(ctx, func(o *op) error {
		r, err := o.get(Volumes, id)
		if err != nil {
			return err
		}
		records, _, err := o.readAll()
		if err != nil {
			return err
		}
		out, err = o.describe(r, references(records))
		return err
	})
	return out, err
}

// SnapshotByID returns one snapshot.
func (s *Store) SnapshotByID(ctx context.Context, id string) (datastore.Snapshot, error) {
	if err := checkID(id); err != nil {
		return datastore.Snapshot{}, err
	}
	var out datastore.Snapshot
	err := s.run(ctx, func(o *op) error {
		r, err := o.get(Snapshots, id)
		if err != nil {
			return err
		}
		if r.State != datastore.StateReady {
			return fmt.Errorf("%w: snapshot %s is %s", datastore.ErrNotFound, id, r.State)
		}
		records, _, err := o.readAll()
		if err != nil {
			return err
		}
		out, err = o.describeSnapshot(r, references(records))
		return err
	})
	return out, err
}
