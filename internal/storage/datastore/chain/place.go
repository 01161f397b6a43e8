package chain

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Place is where records and images are. All methods may hang; the store never waits for one for good. Ids
// and layers are valid when they come here. A thing that is not there is fs.ErrNotExist.
type Place interface {
	// Init makes the place a datastore, unless it is one, and returns its id.
	Init() (string, error)
	// Ready tells whether the place is there and is the right one.
	Ready() error
	// Locker returns a set of locks, none of which is taken yet.
	Locker() Locker
	// List returns the ids of all records of a kind, and the names of what is among them and is none.
	List(k Kind) (ids, strays []string, err error)
	// Read reads a record.
	Read(k Kind, id string) ([]byte, error)
	// Write replaces a record; it is durable when it returns.
	Write(k Kind, id string, data []byte) error
	// Remove removes a record, for good when it returns.
	Remove(k Kind, id string) error
	// Space returns the capacity and what is free of it, in bytes.
	Space() (capacity, free int64, err error)
	// Sweep removes what interrupted writes have left, but for images. The lock of the store is held.
	Sweep() error
	// Images is where the images are.
	Images() Images
}

// Bulk is a place that reads all records of a kind faster than one by one.
type Bulk interface {
	// ReadAll returns records by id, and the names of what is among them and is none.
	ReadAll(k Kind) (records map[string][]byte, strays []string, err error)
}

// Gate is a place whose images take more to be opened than their names.
type Gate interface {
	// Admit returns what it takes. Nobody but the caller's process may open the image for writing from then on,
	// if exclusive is set: whoever has it open is cut off.
	Admit(top handover.Layer, exclusive bool) (*handover.Ceph, error)
}

// Images is where a place keeps images.
type Images interface {
	// Make makes an image unless it is there. It is complete and durable when it is there.
	Make(ctx context.Context, i Image) error
	// Remove removes images and what an interrupted Make of them left; those that are not there are fine.
	Remove(layers []Layer) error
	// Open opens an image for looking at its header and changing that.
	Open(l Layer, write bool) (File, error)
	// Grow makes an image larger that nobody has open, unless it is as large; a raw one may be open. Thick
	// ones get their room at once.
	Grow(ctx context.Context, l Layer, bytes int64, thick bool, unlock func() (qemuimg.Secrets, error)) error
	// Reserve takes the room that an image of that size needs when it is full, where that can be done. It may
	// be open.
	Reserve(l Layer, bytes int64) error
	// Used is what an image takes, in bytes.
	Used(l Layer) (int64, error)
	// Locate says how to open an image, read-only.
	Locate(l Layer) handover.Layer
	// Strays returns the names and sizes of what is no image of these.
	Strays(known map[string]Layer) (map[string]int64, error)
}

// Image is an image to be made.
type Image struct {
	Layer
	// Below is the layer below, if there is one.
	Below        *Layer
	Provisioning datastore.Provisioning
	// LUKS is the LUKS header of an encrypted image, Passphrase what opens it.
	LUKS, Passphrase []byte
	// Progress may be nil.
	Progress func(done, total int64)
}

// File is an open image.
type File interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Sync() error
	Close() error
	// Size is the length of the file.
	Size() (int64, error)
}

// Locker holds locks. Others that want one wait: goroutines, processes and, in a shared place, hosts.
type Locker interface {
	// Lock takes locks, waiting until the context ends.
	Lock(ctx context.Context, names ...string) error
	// Unlock gives one lock back.
	Unlock(name string)
	// Release gives all locks back.
	Release()
}

// StoreLock is the name of the lock that guards what follows from several records: who shares a layer, how
// much room is promised. It is held for short moments, and taken after locks of volumes and snapshots.
const StoreLock = "store"

// ImageName is the name of an image, and what stands in the header of the image above it. All names have
// the same length.
func ImageName(l Layer) string { return l.ID + ".img" }

// Unavailable makes an error of a place one of the datastore.
func Unavailable(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", datastore.ErrUnavailable, err)
}

// NoSpace is Unavailable, but knows a full place.
func NoSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", datastore.ErrFull, err)
	}
	return Unavailable(err)
}

// FromTool makes an error of qemu-img one of the datastore.
func FromTool(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qemuimg.ErrSpace):
		return fmt.Errorf("%w: %w", datastore.ErrFull, err)
	case errors.Is(err, qemuimg.ErrLocked):
		return fmt.Errorf("%w: %w", datastore.ErrAttached, err)
	case errors.Is(err, qemuimg.ErrSecret):
		return fmt.Errorf("%w: %w", datastore.ErrKey, err)
	}
	return err
}
