package chain

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/luks"
	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// A key's name is the id of the volume it was made for, a slash and a random number. It is the additional
// data of its wrapping, so that nobody can pass one volume's key off as another's.

// newKey makes a key for layers of a volume.
func (o *op) newKey(r *record) (name string, passphrase []byte, err error) {
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		return "", nil, fmt.Errorf("making a key: %w", err)
	}
	passphrase = []byte(base64.StdEncoding.EncodeToString(b))
	name = r.ID + "/" + newName("k")
	wrapped, err := o.wrap(name, r.Class, passphrase)
	if err != nil {
		return "", nil, err
	}
	if r.Keys == nil {
		r.Keys = map[string]handover.WrappedKey{}
	}
	r.Keys[name] = wrapped
	return name, passphrase, nil
}

// wrap encrypts a key, which may mean asking somebody.
func (o *op) wrap(name, class string, passphrase []byte) (handover.WrappedKey, error) {
	if o.keys == nil {
		return handover.WrappedKey{}, fmt.Errorf("%w: the datastore has no keys, class %s", datastore.ErrKey, class)
	}
	o.away()
	defer o.tick()
	wrapped, err := o.keys.Wrap(o.ctx, class, passphrase, []byte(name))
	if err != nil {
		return handover.WrappedKey{}, fmt.Errorf("wrapping key %s: %w", name, err)
	}
	return wrapped, nil
}

// unwrap decrypts a key.
func (o *op) unwrap(name string, wrapped handover.WrappedKey) ([]byte, error) {
	o.away()
	defer o.tick()
	return o.unlock(o.ctx, name, wrapped)
}

// unlock decrypts a key.
func (s *Store) unlock(ctx context.Context, name string, wrapped handover.WrappedKey) ([]byte, error) {
	if s.keys == nil {
		return nil, fmt.Errorf("%w: the datastore has no keys, class %s", datastore.ErrKey, wrapped.Class)
	}
	passphrase, err := s.keys.Unwrap(ctx, wrapped, []byte(name))
	if err != nil {
		return nil, fmt.Errorf("unwrapping key %s: %w", name, err)
	}
	return passphrase, nil
}

// encryptWith gives a layer a LUKS header for a key of the volume.
func (o *op) encryptWith(r *record, i *Image, name string) error {
	passphrase, err := o.unwrap(name, r.Keys[name])
	if err != nil {
		return err
	}
	i.Key, i.Passphrase = name, passphrase
	if i.LUKS, err = luks.New(passphrase); err != nil {
		return fmt.Errorf("encrypting a layer: %w", err)
	}
	return nil
}

// secrets returns what decrypts all keys of a record.
func (o *op) secrets(r *record) func() (qemuimg.Secrets, error) {
	return func() (qemuimg.Secrets, error) {
		out := qemuimg.Secrets{}
		for name, wrapped := range r.Keys {
			passphrase, err := o.unwrap(name, wrapped)
			if err != nil {
				return nil, err
			}
			out[name] = passphrase
		}
		return out, nil
	}
}

// Unlock returns the LUKS passphrases of a disk.
func (s *Store) Unlock(ctx context.Context, disk handover.Disk) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, l := range disk.Layers {
		if l.Key == "" || out[l.Key] != nil {
			continue
		}
		wrapped, ok := disk.Keys[l.Key]
		if !ok {
			return nil, fmt.Errorf("%w: volume %s has no key %s", datastore.ErrKey, disk.Volume, l.Key)
		}
		passphrase, err := s.unlock(ctx, l.Key, wrapped)
		if err != nil {
			return nil, err
		}
		out[l.Key] = passphrase
	}
	return out, nil
}

// rewrap encrypts all keys of a record with the current key-encryption key of a class.
func (o *op) rewrap(r *record, class string) error {
	keys := map[string]handover.WrappedKey{}
	for name, wrapped := range r.Keys {
		passphrase, err := o.unwrap(name, wrapped)
		if err != nil {
			return err
		}
		if keys[name], err = o.wrap(name, class, passphrase); err != nil {
			return err
		}
	}
	if len(keys) > 0 {
		r.Keys = keys
	}
	r.Class = class
	return nil
}

// Rewrap encrypts the keys of a volume or snapshot with the current key-encryption key of a class.
func (s *Store) Rewrap(ctx context.Context, of datastore.Source, class string) error {
	if (of.Snapshot == "") == (of.Volume == "") || class == "" {
		return fmt.Errorf("%w: changing the key-encryption key of a volume or snapshot to class %q", datastore.ErrInvalid, class)
	}
	if err := checkID(of.Snapshot + of.Volume); err != nil {
		return err
	}
	return s.run(ctx, func(o *op) error {
		if err := o.lock(sourceLock(of)); err != nil {
			return err
		}
		k := Volumes
		if of.Snapshot != "" {
			k = Snapshots
		}
		r, err := o.get(k, of.Snapshot+of.Volume)
		switch {
		case err != nil:
			return err
		case r.State != datastore.StateReady:
			return fmt.Errorf("%w: %s is %s", datastore.ErrNotFound, r.ID, r.State)
		case r.Class == "":
			return fmt.Errorf("%w: %s is not encrypted", datastore.ErrUnsupported, r.ID)
		}
		if err := o.rewrap(r, class); err != nil {
			return fmt.Errorf("changing the key-encryption key of %s: %w", r.ID, err)
		}
		return o.put(r)
	})
}

// Rekey gives the layers that only this volume uses a new passphrase.
//
// Steps: the record names the new key; every layer opens with both keys; the record has the new key for
// them; they open with the new one only. A layer that has two keys after a crash is finished by the next
// call, or Tidy.
func (s *Store) Rekey(ctx context.Context, id string) (int, error) {
	if err := checkID(id); err != nil {
		return 0, err
	}
	kept := 0
	err := s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Volumes, id)); err != nil {
			return err
		}
		v, err := o.get(Volumes, id)
		if err != nil {
			return err
		}
		switch {
		case v.State != datastore.StateReady:
			return fmt.Errorf("%w: %s is %s", datastore.ErrNotFound, id, v.State)
		case v.Class == "":
			return fmt.Errorf("%w: %s is not encrypted", datastore.ErrUnsupported, id)
		case len(v.Attachments) > 0:
			return fmt.Errorf("changing the key: %w", v.attached())
		}
		if v.Rekey == "" {
			name, _, err := o.newKey(v)
			if err != nil {
				return err
			}
			v.Rekey = name
			if err := o.put(v); err != nil {
				return err
			}
		}
		if kept, err = o.rekey(v); err != nil {
			return fmt.Errorf("changing the key of %s: %w", id, err)
		}
		return nil
	})
	return kept, err
}

// rekey finishes the change to the key v.Rekey. It returns how many layers keep theirs.
func (o *op) rekey(v *record) (int, error) {
	if v.Pending != nil {
		if err := o.thaw(v, nil); err != nil {
			return 0, err
		}
	}
	var refs map[string]int
	err := o.locked(func() error { // nobody can take a reference from here on: the volume is locked
		records, err := o.all()
		refs = references(records)
		return err
	})
	if err != nil {
		return 0, err
	}
	next, err := o.unwrap(v.Rekey, v.Keys[v.Rekey])
	if err != nil {
		return 0, err
	}
	kept := 0
	var own []Layer
	for n, l := range v.Layers {
		switch {
		case l.Key == "":
		case refs[l.ID] > 1:
			kept++
		default:
			old, err := o.unwrap(l.Key, v.Keys[l.Key])
			if err != nil {
				return 0, err
			}
			if err := o.changeSlots(l, func(header []byte) ([]byte, error) { return luks.Add(header, old, next) }); err != nil {
				return 0, err
			}
			own = append(own, l)
			v.Layers[n].Key = v.Rekey
		}
	}
	v.Key = v.Rekey
	if err := o.put(v); err != nil {
		return 0, err
	}
	for _, l := range own {
		if err := o.changeSlots(l, func(header []byte) ([]byte, error) { return luks.Keep(header, next) }); err != nil {
			return 0, err
		}
	}
	v.Rekey, v.Keys = "", v.usedKeys(v.Key, v.Layers)
	return kept, o.put(v)
}

// changeSlots changes the LUKS header of an image.
func (o *op) changeSlots(l Layer, change func([]byte) ([]byte, error)) error {
	if err := o.step(); err != nil {
		return err
	}
	f, err := o.place.Images().Open(l, true)
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := qcow2.Read(f)
	if err != nil || !h.LUKS || h.CryptSize != luks.Size {
		return fmt.Errorf("%w: image %s has no LUKS header: %w", datastore.ErrCorrupt, o.where(l), err)
	}
	header := make([]byte, h.CryptSize)
	if _, err := f.ReadAt(header, h.CryptOffset); err != nil {
		return Unavailable(err)
	}
	header, err = change(header)
	switch {
	case errors.Is(err, luks.ErrPassphrase):
		return fmt.Errorf("%w: image %s: %w", datastore.ErrKey, o.where(l), err)
	case err != nil:
		return fmt.Errorf("%w: image %s: %w", datastore.ErrCorrupt, o.where(l), err)
	}
	start, material := luks.Parts(header)
	if _, err := f.WriteAt(material, h.CryptOffset+int64(len(start))); err != nil {
		return NoSpace(err)
	}
	if err := f.Sync(); err != nil {
		return NoSpace(err)
	}
	if _, err := f.WriteAt(start, h.CryptOffset); err != nil {
		return NoSpace(err)
	}
	return NoSpace(f.Sync())
}
