package convert

import (
	"context"
	"errors"
	"fmt"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Store is what Snapshot needs of a datastore.
type Store interface {
	Create(ctx context.Context, spec datastore.Spec) (datastore.Volume, error)
	Attach(ctx context.Context, id, holder string, mode datastore.Mode) (handover.Disk, error)
	Detach(ctx context.Context, id, holder string) error
	Delete(ctx context.Context, id string) error
	SnapshotByID(ctx context.Context, id string) (datastore.Snapshot, error)
	Unlock(ctx context.Context, disk handover.Disk) (map[string][]byte, error)
}

// exportHolder holds volumes that are read from.
const exportHolder = "image-export"

// cleanWithin is how long it may take to remove what was made for reading a snapshot.
const cleanWithin = time.Minute

// Snapshot writes what a snapshot holds into a new qcow2 file, compressed. It reads a copy of the snapshot that it
// makes and removes; name is unique for the call, and the same when it is made again.
func Snapshot(ctx context.Context, s Store, snapshot, name, path string, progress func(done, total int64)) (err error) {
	from, err := s.SnapshotByID(ctx, snapshot)
	if err != nil {
		return err
	}
	id := "export-" + name
	remove := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanWithin)
		defer cancel()
		return errors.Join(s.Detach(ctx, id, exportHolder), s.Delete(ctx, id))
	}
	if err := remove(); err != nil { // what a crash has left
		return err
	}
	if _, err := s.Create(ctx, datastore.Spec{ID: id, Encryption: from.Encryption, Source: &datastore.Source{Snapshot: snapshot}}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	return Volume(ctx, s, id, qemuimg.Target{File: path, Format: "qcow2", Options: "compression_type=zstd", Compress: true}, progress)
}

// Volume writes what a volume holds, which nobody has open for writing, into a new file.
func Volume(ctx context.Context, s Store, id string, to qemuimg.Target, progress func(done, total int64)) (err error) {
	disk, err := s.Attach(ctx, id, exportHolder, datastore.ReadOnly)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanWithin)
		defer cancel()
		err = errors.Join(err, s.Detach(ctx, id, exportHolder))
	}()
	if to.Secrets, err = s.Unlock(ctx, disk); err != nil {
		return err
	}
	tool := &qemuimg.Tool{}
	if err := tool.Convert(ctx, qemuimg.Node(disk.Layers), to, progress); err != nil {
		return fmt.Errorf("exporting volume %s: %w", id, err)
	}
	return nil
}
