package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
)

// driver is distribution's driver of a file system, with counting, locking and syncing.
type driver struct {
	storagedriver.StorageDriver
	store *Store
}

// path is where something is on disk.
func (d *driver) path(path string) string { return filepath.Join(d.store.cfg.Dir, path) }

// touch makes something young that is about to be used, so that the collection leaves it. The caller holds its lock.
func (d *driver) touch(path string) {
	info, err := os.Stat(path)
	if err != nil || time.Since(info.ModTime()) < d.store.cfg.Grace/8 {
		return
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // at worst it is uploaded again
}

// GetContent implements storagedriver.StorageDriver.
func (d *driver) GetContent(ctx context.Context, path string) ([]byte, error) {
	if at := parse(path); at.kind == layer || at.kind == revision {
		defer d.store.lock(at.digest)()
		d.touch(d.path(path))
	}
	return d.StorageDriver.GetContent(ctx, path)
}

// Stat implements storagedriver.StorageDriver.
func (d *driver) Stat(ctx context.Context, path string) (storagedriver.FileInfo, error) {
	if at := parse(path); at.kind == blobData {
		defer d.store.lock(at.digest)()
		d.touch(d.path(path))
	}
	return d.StorageDriver.Stat(ctx, path)
}

// PutContent implements storagedriver.StorageDriver.
func (d *driver) PutContent(ctx context.Context, path string, content []byte) error {
	r := requestOf(ctx)
	if err := d.store.room(int64(len(content))); err != nil {
		return r.refused(err)
	}
	put := func() error { return r.refused(d.put(ctx, path, content)) }
	switch at := parse(path); at.kind {
	case layer, revision:
		defer d.store.lock(at.digest)()
		return d.putLink(ctx, at, path, put)
	case blobData:
		defer d.store.lock(at.digest)()
		return put()
	case tag:
		defer d.store.lock(at.repo + ":" + at.tag)()
		return put()
	case upload:
		if d.store.cancelled(at.project, at.upload) {
			return storagedriver.PathNotFoundError{Path: path, DriverName: d.Name()} // who writes it notes how far it is
		}
		return put()
	default:
		return put()
	}
}

// put writes a file; distribution syncs it and its directory, and directories that are new are synced here.
func (d *driver) put(ctx context.Context, path string, content []byte) error {
	if err := d.makeParent(path); err != nil {
		return err
	}
	return d.StorageDriver.PutContent(ctx, path, content)
}

// putLink links a blob to a repository, which counts for its project.
func (d *driver) putLink(ctx context.Context, at place, path string, put func() error) error {
	r := requestOf(ctx)
	if _, err := os.Stat(d.path(path)); err == nil {
		return put()
	}
	if _, counted := keyOf(at.digest); !counted {
		return put() // another name of a blob that has a link of its own
	}
	blob := d.store.blobPath(at.digest)
	info, err := os.Stat(blob)
	if err != nil {
		return storagedriver.PathNotFoundError{Path: path, DriverName: d.Name()}
	}
	d.touch(blob)
	undo, err := d.store.link(at.project, at.digest, info.Size(), r.uploading())
	if err != nil {
		return r.refused(err)
	}
	if err := put(); err != nil {
		undo()
		return err
	}
	return nil
}

// Move implements storagedriver.StorageDriver. It is used for uploads that become blobs.
func (d *driver) Move(ctx context.Context, from, to string) error {
	if at := parse(to); at.kind == blobData {
		defer d.store.lock(at.digest)()
	}
	if err := d.makeParent(to); err != nil {
		return requestOf(ctx).refused(err)
	}
	if err := d.StorageDriver.Move(ctx, from, to); err != nil {
		return requestOf(ctx).refused(err)
	}
	now := time.Now()
	if err := os.Chtimes(d.path(to), now, now); err != nil {
		return err
	}
	return syncDir(filepath.Dir(d.path(to)))
}

// makeParent makes the directory of a file, and sees to it that it stays.
func (d *driver) makeParent(path string) error {
	dir := filepath.Dir(d.path(path))
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	var missing []string
	for at := dir; at != d.store.cfg.Dir && at != "/"; at = filepath.Dir(at) {
		if _, err := os.Stat(at); err == nil {
			break
		}
		missing = append(missing, filepath.Dir(at))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, parent := range missing {
		if err := syncDir(parent); err != nil {
			return err
		}
	}
	return nil
}

// Delete implements storagedriver.StorageDriver.
func (d *driver) Delete(ctx context.Context, path string) error {
	switch at := parse(path); {
	case at.kind == layer || at.kind == revision:
		defer d.store.lock(at.digest)()
		err := d.StorageDriver.Delete(ctx, path)
		if err == nil {
			d.store.unlink(at.project, at.digest)
		}
		return err
	case at.kind == tag:
		defer d.store.lock(at.repo + ":" + at.tag)()
		return d.StorageDriver.Delete(ctx, path)
	case at.kind == upload && at.whole:
		return d.store.end(at.project, at.upload, func() error { return d.StorageDriver.Delete(ctx, path) })
	default:
		return d.StorageDriver.Delete(ctx, path)
	}
}

// Writer implements storagedriver.StorageDriver. It is used for the bytes of uploads.
func (d *driver) Writer(ctx context.Context, path string, add bool) (storagedriver.FileWriter, error) {
	r := requestOf(ctx)
	if err := d.store.room(0); err != nil {
		return nil, r.refused(err)
	}
	at := parse(path)
	if at.kind != upload || !at.data {
		return d.open(ctx, path, add)
	}
	reads := r.readOnly()
	if !reads {
		if err := d.store.begin(at.project, at.upload); err != nil {
			return nil, err
		}
	}
	end := sync.OnceFunc(func() {
		if !reads {
			d.store.finish(at.project, at.upload)
		}
	})
	if _, err := os.Stat(d.path(path)); err != nil && add {
		end()
		return nil, storagedriver.PathNotFoundError{Path: path, DriverName: d.Name()} // it was cancelled
	}
	f, err := d.open(ctx, path, add)
	if err != nil {
		end()
		return nil, err
	}
	w := &writer{FileWriter: f, store: d.store, at: at, request: r, end: end}
	r.open(w)
	if !reads {
		r.setUpload(at.upload)
	}
	return w, nil
}

// open opens a file to write.
func (d *driver) open(ctx context.Context, path string, add bool) (storagedriver.FileWriter, error) {
	r := requestOf(ctx)
	if err := d.makeParent(path); err != nil {
		return nil, r.refused(err)
	}
	w, err := d.StorageDriver.Writer(ctx, path, add)
	if err != nil {
		return nil, r.refused(err)
	}
	return w, nil
}

// writer counts the bytes of an upload.
type writer struct {
	storagedriver.FileWriter
	store   *Store
	at      place
	request *Request
	end     func()
	checked int64 // bytes since the disk was last looked at
}

// lookEvery is after how many bytes the disk is looked at.
const lookEvery = 8 << 20

// Write implements io.Writer.
func (w *writer) Write(b []byte) (int, error) {
	if w.checked += int64(len(b)); w.checked >= lookEvery {
		w.checked = 0
		if err := w.store.room(0); err != nil {
			return 0, w.request.refused(err)
		}
	}
	if err := w.store.grow(w.at.project, w.at.upload, int64(len(b))); err != nil {
		return 0, w.request.refused(err)
	}
	n, err := w.FileWriter.Write(b)
	if err != nil {
		return n, w.request.refused(fmt.Errorf("writing an upload: %w", err))
	}
	return n, nil
}

// Commit implements storagedriver.FileWriter.
func (w *writer) Commit(ctx context.Context) error {
	w.store.seal(w.at.project, w.at.upload)
	return w.request.refused(w.FileWriter.Commit(ctx))
}

// Cancel implements storagedriver.FileWriter. Distribution cancels what it has closed, too, and then removes the upload
// only if that is no error.
func (w *writer) Cancel(ctx context.Context) error {
	_ = w.FileWriter.Cancel(ctx) // the file is removed with its directory
	return nil
}

// Close implements io.Closer.
func (w *writer) Close() error {
	defer w.end()
	return w.request.refused(w.FileWriter.Close())
}
