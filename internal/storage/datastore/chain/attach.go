package chain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qcow2"
)

// Attach records a holder and returns how to open the volume.
func (s *Store) Attach(ctx context.Context, id, holder string, mode datastore.Mode) (handover.Disk, error) {
	if err := checkID(id); err != nil {
		return handover.Disk{}, err
	}
	if holder == "" || len(holder) > 1024 || mode != datastore.ReadWrite && mode != datastore.ReadOnly && mode != datastore.ReadWriteMany {
		return handover.Disk{}, fmt.Errorf("%w: attaching %s to %.80q as %.80q", datastore.ErrInvalid, id, holder, mode)
	}
	var disk handover.Disk
	err := s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Volumes, id)); err != nil {
			return err
		}
		v, err := o.get(Volumes, id)
		if err == nil {
			disk, err = o.attach(v, holder, mode)
		}
		if err != nil {
			return fmt.Errorf("attaching volume %s: %w", id, err)
		}
		return nil
	})
	return disk, err
}

func (o *op) attach(v *record, holder string, mode datastore.Mode) (handover.Disk, error) {
	if v.State != datastore.StateReady {
		return handover.Disk{}, fmt.Errorf("%w: it is %s", datastore.ErrNotFound, v.State)
	}
	i := slices.IndexFunc(v.Attachments, func(a datastore.Attachment) bool { return a.Holder == holder })
	if i >= 0 && v.Attachments[i].Mode != mode {
		return handover.Disk{}, v.attached()
	}
	for _, a := range v.Attachments {
		if a.Holder != holder && (a.Mode != mode || mode == datastore.ReadWrite) {
			return handover.Disk{}, v.attached()
		}
	}
	if mode == datastore.ReadWriteMany && (len(v.Layers) != 1 || v.Layers[0].Format != handover.FormatRaw) {
		return handover.Disk{}, fmt.Errorf("%w: several writers need a volume of format raw without snapshots", datastore.ErrUnsupported)
	}
	if len(v.Attachments) == 0 && v.Pending != nil {
		if err := o.thaw(v, nil); err != nil {
			return handover.Disk{}, err
		}
	}
	layers, err := o.chain(v)
	if err != nil {
		return handover.Disk{}, err
	}
	if i < 0 {
		v.Attachments = append(v.Attachments, datastore.Attachment{Holder: holder, Mode: mode, Since: time.Now().UTC()})
		v.Dirty = v.Dirty || mode != datastore.ReadOnly
		if err := o.put(v); err != nil {
			return handover.Disk{}, err
		}
	}
	disk := handover.Disk{
		Volume: v.ID, Size: v.Size, ReadOnly: mode == datastore.ReadOnly, Shared: mode == datastore.ReadWriteMany,
		Keys: v.usedKeys("", layers),
	}
	for _, l := range layers {
		disk.Layers = append(disk.Layers, o.place.Images().Locate(l))
	}
	disk.Layers[len(layers)-1].ReadOnly = disk.ReadOnly
	return disk, nil
}

// Admit lets the process that opens the disk next do so, and keeps others from it.
func (s *Store) Admit(ctx context.Context, disk handover.Disk) (*handover.Ceph, error) {
	gate, ok := s.place.(Gate)
	if !ok || len(disk.Layers) == 0 {
		return nil, nil // a directory needs nothing
	}
	var ceph *handover.Ceph
	err := s.run(ctx, func(o *op) (err error) {
		o.tick()
		ceph, err = gate.Admit(disk.Layers[len(disk.Layers)-1], !disk.ReadOnly && !disk.Shared)
		if err != nil {
			return fmt.Errorf("opening volume %s: %w", disk.Volume, err)
		}
		return nil
	})
	return ceph, err
}

// chain returns the layers to open, after a look at each. A layer that is being added counts if it exists:
// QEMU may have begun to write to it.
func (o *op) chain(v *record) ([]Layer, error) {
	layers := slices.Clone(v.Layers)
	if v.Pending != nil {
		if err := o.look(v.Pending.Layer, layers); err == nil {
			layers = append(layers, v.Pending.Layer)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	for i, l := range v.Layers {
		if err := o.look(l, v.Layers[:i]); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%w: image %s is missing", datastore.ErrCorrupt, o.where(l))
			}
			return nil, err
		}
	}
	return layers, nil
}

// where is the name of an image for people.
func (o *op) where(l Layer) string {
	at := o.place.Images().Locate(l)
	if at.RBD != nil {
		return "rbd:" + at.RBD.Pool + "/" + at.RBD.Image
	}
	return at.File
}

// look compares an image with what its record says. An image that would make QEMU open something else is
// refused, and so is one that is not what it was: somebody has changed it. fs.ErrNotExist if it is not there.
func (o *op) look(l Layer, below []Layer) error {
	if err := o.step(); err != nil {
		return err
	}
	f, err := o.place.Images().Open(l, false)
	if err != nil {
		return err
	}
	defer f.Close()
	corrupt := func(format string, args ...any) error {
		return fmt.Errorf("%w: image %s %s", datastore.ErrCorrupt, o.where(l), fmt.Sprintf(format, args...))
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	if l.Format == handover.FormatRaw {
		if size < l.Size {
			return corrupt("has %d bytes of %d", size, l.Size)
		}
		return nil
	}
	h, err := qcow2.Read(f)
	switch {
	case errors.Is(err, qcow2.ErrFormat), errors.Is(err, qcow2.ErrFeature):
		return corrupt("has a bad header: %v", err)
	case err != nil:
		return Unavailable(err)
	case h.Corrupt:
		return corrupt("is marked as damaged by QEMU")
	case h.Size < l.Size: // it may be larger: a crash while growing
		return corrupt("has %d bytes of %d", h.Size, l.Size)
	case h.LUKS != (l.Key != ""):
		return corrupt("is encrypted: %t", h.LUKS)
	case h.Backing != "" && !slices.ContainsFunc(below, func(b Layer) bool { return ImageName(b) == h.Backing }):
		return fmt.Errorf("%w: %w: image %s refers to %.200q", datastore.ErrCorrupt, errForeign, o.where(l), h.Backing)
	}
	return nil
}

// errForeign marks a reference that no record knows.
var errForeign = errors.New("reference to a file that is not part of the volume")

// Detach forgets a holder.
func (s *Store) Detach(ctx context.Context, id, holder string) error {
	if err := checkID(id); err != nil {
		return err
	}
	return s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Volumes, id)); err != nil {
			return err
		}
		v, err := o.find(Volumes, id)
		if err != nil || v == nil {
			return err
		}
		n := len(v.Attachments)
		v.Attachments = slices.DeleteFunc(v.Attachments, func(a datastore.Attachment) bool { return a.Holder == holder })
		if len(v.Attachments) == n {
			return nil
		}
		if err := o.put(v); err != nil {
			return fmt.Errorf("detaching volume %s: %w", id, err)
		}
		return nil
	})
}
