package chain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Create makes a volume.
//
// Steps: the record says creating and names the new layer and all layers of the source, which are safe from
// then on; the layer; the record says ready. What a crash leaves is made again from the start.
func (s *Store) Create(ctx context.Context, spec datastore.Spec) (datastore.Volume, error) {
	if err := check(&spec); err != nil {
		return datastore.Volume{}, err
	}
	var out datastore.Volume
	err := s.run(ctx, func(o *op) error {
		names := []string{lockName(Volumes, spec.ID)}
		if spec.Source != nil {
			names = append(names, sourceLock(*spec.Source))
		}
		if err := o.lock(names...); err != nil {
			return err
		}
		r, err := o.existing(spec)
		if err == nil && r == nil {
			r, err = o.create(spec)
		}
		if err != nil {
			return fmt.Errorf("creating volume %s: %w", spec.ID, err)
		}
		out, err = o.describe(r, nil)
		return err
	})
	return out, err
}

// sourceLock is the lock of a source.
func sourceLock(s datastore.Source) string {
	if s.Snapshot != "" {
		return lockName(Snapshots, s.Snapshot)
	}
	return lockName(Volumes, s.Volume)
}

// check refuses what makes no sense and fills in defaults.
func check(spec *datastore.Spec) error {
	if err := checkID(spec.ID); err != nil {
		return err
	}
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("%w: volume %s: %s", datastore.ErrInvalid, spec.ID, fmt.Sprintf(format, args...))
	}
	if s := spec.Source; s != nil {
		if spec.Fill != nil {
			return invalid("a copy that is filled")
		}
		if (s.Snapshot == "") == (s.Volume == "") {
			return invalid("a source is a snapshot or a volume")
		}
		if err := checkID(s.Snapshot + s.Volume); err != nil {
			return err
		}
		if s.Volume == spec.ID {
			return invalid("a copy of itself")
		}
		if spec.Format == handover.FormatRaw {
			return fmt.Errorf("%w: a copy in format raw", datastore.ErrUnsupported)
		}
	}
	if spec.Provisioning == "" {
		spec.Provisioning = datastore.Thin
	}
	switch {
	case spec.Provisioning != datastore.Thin && spec.Provisioning != datastore.Thick && spec.Provisioning != datastore.EagerZeroed:
		return invalid("provisioning %.80q", spec.Provisioning)
	case spec.Format == "" && (spec.Provisioning == datastore.Thin || spec.Encryption != ""):
		spec.Format = handover.FormatQCOW2
	case spec.Format == "":
		spec.Format = handover.FormatRaw
	case spec.Format != handover.FormatQCOW2 && spec.Format != handover.FormatRaw:
		return invalid("format %.80q", spec.Format)
	case spec.Format == handover.FormatRaw && spec.Encryption != "":
		return fmt.Errorf("%w: encryption in format raw", datastore.ErrUnsupported)
	}
	if spec.Source != nil {
		spec.Format = handover.FormatQCOW2
	}
	if spec.Size == 0 && spec.Source != nil {
		return nil
	}
	var err error
	if spec.Size, err = roundSize(spec.Size); err != nil {
		return fmt.Errorf("volume %s: %w", spec.ID, err)
	}
	if spec.Limit > 0 && spec.Size > spec.Limit {
		return invalid("no size up to %d is a multiple of %d", spec.Limit, datastore.SizeUnit)
	}
	return nil
}

// roundSize rounds a size up, and refuses those that cannot be.
func roundSize(bytes int64) (int64, error) {
	if bytes <= 0 || bytes > datastore.MaxSize {
		return 0, fmt.Errorf("%w: size %d is not between 1 and %d", datastore.ErrInvalid, bytes, int64(datastore.MaxSize))
	}
	return (bytes + datastore.SizeUnit - 1) / datastore.SizeUnit * datastore.SizeUnit, nil
}

// existing returns the volume if it is there as it should be. What an interrupted call left is removed.
func (o *op) existing(spec datastore.Spec) (*record, error) {
	r, err := o.find(Volumes, spec.ID)
	if err != nil || r == nil {
		return nil, err
	}
	if r.State == datastore.StateReady {
		if what := differs(spec, r); what != "" {
			return nil, fmt.Errorf("%w: volume %s: %s", datastore.ErrExists, spec.ID, what)
		}
		return r, nil
	}
	return nil, o.finishDelete(r)
}

// differs names a setting in which a volume is not what is asked for.
func differs(spec datastore.Spec, r *record) string {
	var source datastore.Source
	if spec.Source != nil {
		source = *spec.Source
	}
	switch {
	case spec.Size != 0 && r.Size < spec.Size || spec.Limit > 0 && r.Size > spec.Limit || spec.Size > 0 && r.Size > spec.Size && spec.Limit == 0:
		return fmt.Sprintf("it has %d bytes", r.Size)
	case r.Provisioning != spec.Provisioning:
		return fmt.Sprintf("it is %s", r.Provisioning)
	case r.Class != spec.Encryption:
		return fmt.Sprintf("its encryption is %q", r.Class)
	case r.FromSnapshot != source.Snapshot || r.FromVolume != source.Volume:
		return fmt.Sprintf("its source is %q", r.FromSnapshot+r.FromVolume)
	case spec.Source == nil && r.Layers[0].Format != spec.Format && r.FromSnapshot+r.FromVolume == "":
		return fmt.Sprintf("its format is %s", r.Layers[0].Format)
	}
	return ""
}

// create makes a volume that does not exist.
func (o *op) create(spec datastore.Spec) (*record, error) {
	r := &record{
		Format: recordFormat, Kind: Volumes, ID: spec.ID, State: datastore.StateCreating, Created: time.Now().UTC(),
		Size: spec.Size, Provisioning: spec.Provisioning, Labels: maps.Clone(spec.Labels), Class: spec.Encryption,
	}
	var from *record
	if spec.Source != nil {
		var err error
		if from, err = o.source(r, *spec.Source, spec.Limit); err != nil {
			return nil, err
		}
	}
	thick := spec.Provisioning != datastore.Thin
	i := Image{Layer: Layer{ID: newName("l"), Format: spec.Format, Size: r.Size, Thick: thick}, Provisioning: spec.Provisioning, Progress: spec.Progress}
	if from != nil {
		if err := o.inherit(r, from); err != nil {
			return nil, err
		}
		i.Below = &r.Layers[len(r.Layers)-1]
	}
	if err := o.encrypt(r, &i); err != nil {
		return nil, err
	}
	r.Layers = append(slices.Clone(r.Layers), i.Layer)
	if len(r.Layers) > maxLayers {
		return nil, tooDeep()
	}
	err := o.locked(func() error {
		if err := o.room(r.Size, r.Size, thick); err != nil {
			return err
		}
		return o.put(r)
	})
	if err != nil {
		return nil, err
	}
	err = o.make(i)
	if err == nil && spec.Fill != nil {
		err = o.fill(r, spec.Fill)
	}
	if err != nil {
		return nil, errors.Join(err, o.abandon(r))
	}
	r.State = datastore.StateReady
	return r, o.put(r)
}

// fill has the first layer of a new volume written, which may take long, and makes what was written durable.
func (o *op) fill(r *record, write func(context.Context, datastore.Target) error) error {
	secrets, err := o.secrets(r)()
	if err != nil {
		return err
	}
	o.away()
	err = write(o.ctx, datastore.Target{Layer: o.place.Images().Locate(r.top()), Secrets: secrets})
	o.tick()
	if err != nil {
		return FromTool(err)
	}
	f, err := o.place.Images().Open(r.top(), true)
	if err != nil {
		return err
	}
	return NoSpace(errors.Join(f.Sync(), f.Close()))
}

// make makes an image, which may take long.
func (o *op) make(i Image) error {
	if err := o.step(); err != nil {
		return err
	}
	if i.Provisioning == datastore.EagerZeroed {
		o.away()
		defer o.tick()
	}
	return o.place.Images().Make(o.ctx, i)
}

// abandon removes what is there of a volume that could not be made, even if its caller has given up.
func (o *op) abandon(r *record) error {
	ctx := o.ctx
	defer func() { o.ctx = ctx }()
	o.ctx = context.WithoutCancel(ctx)
	return o.finishDelete(r)
}

// source returns the record whose layers a copy starts from, and sets size and origin of the copy. A volume
// that may have been written to is frozen for it.
func (o *op) source(r *record, source datastore.Source, limit int64) (*record, error) {
	k, id := Volumes, source.Volume
	if source.Snapshot != "" {
		k, id = Snapshots, source.Snapshot
	}
	from, err := o.get(k, id)
	if err != nil {
		return nil, err
	}
	if from.State != datastore.StateReady {
		return nil, fmt.Errorf("%w: %s is %s", datastore.ErrNotFound, id, from.State)
	}
	if r.Size == 0 {
		r.Size = from.Size
	}
	switch {
	case r.Size < from.Size:
		return nil, fmt.Errorf("%w: %d bytes are less than the %d of %s", datastore.ErrShrink, r.Size, from.Size, id)
	case limit > 0 && r.Size > limit:
		return nil, fmt.Errorf("%w: %s has %d bytes, the limit is %d", datastore.ErrInvalid, id, r.Size, limit)
	case from.Class != "" && r.Class == "":
		return nil, fmt.Errorf("%w: %s is encrypted, so a copy of it has to be: name an EncryptionClass by the annotation %q of the claim, "+
			"or use a StorageClass with the parameter encryption", datastore.ErrUnsupported, id, "csi.vsphere.encryption-class")
	}
	r.FromSnapshot, r.FromVolume = source.Snapshot, source.Volume
	if k == Volumes {
		if from.Layers, err = o.freeze(from, "", source.Live); err != nil {
			return nil, err
		}
	}
	return from, nil
}

// inherit gives a new volume the layers and keys of its source, wrapped anew: one that cannot be unwrapped
// would make a volume that nobody can read.
func (o *op) inherit(r, from *record) error {
	r.Layers = slices.Clone(from.Layers)
	r.Keys = from.usedKeys("", from.Layers)
	return o.rewrap(r, r.Class)
}

// encrypt gives a layer of an encrypted volume its LUKS header. The volume gets its key with its first one.
func (o *op) encrypt(r *record, i *Image) error {
	if r.Class == "" {
		return nil
	}
	if r.Key == "" {
		name, passphrase, err := o.newKey(r)
		if err != nil {
			return err
		}
		r.Key, i.Passphrase = name, passphrase
	}
	return o.encryptWith(r, i, r.Key)
}

// Delete removes a volume.
//
// Steps: the record says deleting; the layers that nobody else has become doomed and the others are let go;
// the files; the record.
func (s *Store) Delete(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	return s.run(ctx, func(o *op) error { return o.remove(Volumes, id) })
}

// DeleteSnapshot removes a snapshot.
func (s *Store) DeleteSnapshot(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	return s.run(ctx, func(o *op) error {
		if err := o.forgetPending(id); err != nil {
			return err
		}
		return o.remove(Snapshots, id)
	})
}

// remove removes a volume or snapshot that exists.
func (o *op) remove(k Kind, id string) error {
	if err := o.lock(lockName(k, id)); err != nil {
		return err
	}
	r, err := o.find(k, id)
	if err != nil || r == nil {
		return err
	}
	if err := r.attached(); err != nil {
		return fmt.Errorf("deleting: %w", err)
	}
	if err := o.finishDelete(r); err != nil {
		return fmt.Errorf("deleting %s: %w", id, err)
	}
	return nil
}

// finishDelete removes the layers that only r names, and r. Its lock is held.
//
// Letting go of shared layers and dooming the others is one write, so that of two records that are removed
// one after the other the last one finds the layer it shares to be its own.
func (o *op) finishDelete(r *record) error {
	if r.State == datastore.StateCreating && len(r.Layers) > 0 {
		// Its own layer is nobody else's, and may be what has filled the datastore, so that no record can be written.
		if err := o.step(); err != nil {
			return err
		}
		if err := o.place.Images().Remove([]Layer{r.top()}); err != nil {
			return err
		}
	}
	err := o.locked(func() error {
		records, err := o.all()
		if err != nil {
			return err
		}
		doomed := r.unneeded(records, r.images())
		r.State, r.Doomed = datastore.StateDeleting, doomed
		r.Layers, r.Pending, r.Keys, r.Key, r.Class, r.Rekey = nil, nil, nil, "", "", ""
		return o.put(r)
	})
	if err != nil {
		return err
	}
	if err := o.step(); err != nil {
		return err
	}
	if err := o.place.Images().Remove(r.Doomed); err != nil {
		return err
	}
	return o.drop(r)
}

// clean removes the doomed layers of a record that stays. One that others still need is only let go.
func (o *op) clean(r *record) error {
	if len(r.Doomed) == 0 {
		return nil
	}
	err := o.locked(func() error {
		records, err := o.all()
		if err != nil {
			return err
		}
		return o.place.Images().Remove(r.unneeded(records, r.Doomed))
	})
	if err != nil {
		return err
	}
	r.Doomed = nil
	return o.put(r)
}

// describe is what the caller learns about a volume.
func (o *op) describe(r *record, refs map[string]int) (datastore.Volume, error) {
	used, err := o.unshared(r, refs)
	return datastore.Volume{
		ID: r.ID, Size: r.Size, Provisioning: r.Provisioning, Encryption: r.Class, KEKs: r.keks(), Labels: maps.Clone(r.Labels),
		Created: r.Created, FromSnapshot: r.FromSnapshot, FromVolume: r.FromVolume,
		Attachments: slices.Clone(r.Attachments), Used: used, Layers: len(r.Layers), State: r.State,
	}, err
}

// unshared is what the layers take that only r names. Without references it is 0.
func (o *op) unshared(r *record, refs map[string]int) (int64, error) {
	var sum int64
	if refs == nil {
		return 0, nil
	}
	for _, l := range r.images() {
		if refs[l.ID] > 1 {
			continue
		}
		if err := o.step(); err != nil {
			return 0, err
		}
		used, err := o.place.Images().Used(l)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}
