// Package images brings images of virtual machines from the library into datastores, where they are volumes that
// other volumes are copies of.
//
// An image is imported into a datastore when the first volume wants to be a copy of it there: a volume is made and
// filled by conversion, and is there for nobody before it is complete (datastore.Spec.Fill). From then on copies take
// the time of any copy, whatever the size. The volume is a cache of the library's content: it may be deleted, which
// leaves the layers that copies need, and is made again when it is wanted.
//
// Callers are the CSI driver and the agent. What can go wrong: the library does not have the image
// (library.ErrNotFound), the image is not sound (diskimage's errors), the datastore is full (datastore.ErrFull).
package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/library"
	"atoll.dev/atoll/internal/storage/qemuimg"
	"atoll.dev/atoll/internal/storage/stores"
)

// Labels of the volume of an image.
const (
	LabelItem = "image/item"
	LabelDisk = "image/disk"
	LabelName = "image/name"
)

// Disk is one disk of a library item.
type Disk struct {
	// Item is the uid of the library item, Disk the number of the disk in it, Name what people call the image.
	Item string
	Disk int
	Name string
}

// VolumeID is the id of the volume of a disk in every datastore.
func (d Disk) VolumeID() string { return fmt.Sprintf("%s%s-%d", volumePrefix, d.Item, d.Disk) }

// volumePrefix begins the ids of volumes of images. Volumes of claims begin otherwise.
const volumePrefix = "image-"

// Source has the content of images. The library has.
type Source interface {
	Open(id string, disk int) (convert.Image, library.Disk, error)
}

// Importer imports images into datastores.
type Importer struct {
	source Source
	tool   *qemuimg.Tool
	log    *slog.Logger

	mu      sync.Mutex // guards the field below
	running map[string]*job
}

// job is an import under way.
type job struct {
	done    chan struct{}
	err     error
	percent int64
}

// New makes an importer.
func New(source Source, log *slog.Logger) *Importer {
	return &Importer{source: source, tool: &qemuimg.Tool{}, log: log, running: map[string]*job{}}
}

// roomEvery is how often the datastore is asked whether it is full.
const roomEvery = 250 * time.Millisecond

// Ensure sees to it that a disk is in a datastore, and returns its volume there. Several callers wait for one import,
// which ends when the context of the first one does; another one begins it again then.
func (i *Importer) Ensure(ctx context.Context, s stores.Store, d Disk) (datastore.Volume, error) {
	key := stores.Handle(s.Name, d.VolumeID())
	for {
		v, err := s.Volume(ctx, d.VolumeID())
		if err == nil && v.State == datastore.StateReady {
			return v, nil
		}
		if err != nil && !errors.Is(err, datastore.ErrNotFound) {
			return datastore.Volume{}, err
		}
		j, mine := i.join(key)
		if mine {
			err := i.run(ctx, s, d, j)
			i.leave(key, j, err)
			if err != nil {
				return datastore.Volume{}, fmt.Errorf("importing image %s: %w", d.Name, err)
			}
			continue
		}
		select {
		case <-j.done:
			if j.err != nil && !errors.Is(j.err, context.Canceled) && !errors.Is(j.err, context.DeadlineExceeded) {
				return datastore.Volume{}, fmt.Errorf("importing image %s: %w", d.Name, j.err)
			}
		case <-ctx.Done():
			return datastore.Volume{}, fmt.Errorf("importing image %s: %w", d.Name, ctx.Err())
		}
	}
}

// join returns the import of a volume, and whether the caller is to do it.
func (i *Importer) join(key string) (*job, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if j, ok := i.running[key]; ok {
		return j, false
	}
	j := &job{done: make(chan struct{})}
	i.running[key] = j
	return j, true
}

func (i *Importer) leave(key string, j *job, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	j.err = err
	delete(i.running, key)
	close(j.done)
}

// Progress tells in percent how far the import of a disk is in whatever datastore, and whether there is one.
func (i *Importer) Progress(d Disk) (store string, percent int64, running bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for key, j := range i.running {
		if name, id, err := stores.Split(key); err == nil && id == d.VolumeID() {
			return name, j.percent, true
		}
	}
	return "", 0, false
}

// stall is how long a conversion may go without having done another hundredth.
const stall = 30 * time.Minute

// run does an import.
func (i *Importer) run(ctx context.Context, s stores.Store, d Disk, j *job) error {
	image, disk, err := i.source.Open(d.Item, d.Disk)
	if err != nil {
		return err
	}
	defer image.File.Close()
	begin := time.Now()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	spec := datastore.Spec{
		ID: d.VolumeID(), Size: disk.Size,
		Labels: map[string]string{LabelItem: d.Item, LabelDisk: fmt.Sprint(d.Disk), LabelName: d.Name},
		Fill: func(ctx context.Context, to datastore.Target) error {
			var room sync.WaitGroup
			defer room.Wait()
			filling, end := context.WithCancel(ctx)
			defer end()
			room.Go(func() { watchRoom(filling, s, stop) })
			watchdog := time.AfterFunc(stall, func() { stop(fmt.Errorf("%w: nothing has come of it for %v", diskimage.ErrDamaged, stall)) })
			defer watchdog.Stop()
			return convert.Into(filling, i.tool, image, qemuimg.Target{Layer: to.Layer, Secrets: to.Secrets}, func(done, total int64) {
				watchdog.Reset(stall)
				i.mu.Lock()
				defer i.mu.Unlock()
				j.percent = done * 100 / max(total, 1)
			})
		},
	}
	_, err = s.Create(ctx, spec)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if err != nil {
		return err
	}
	i.log.Info("image imported", "image", d.Name, "datastore", s.Name, "bytes", disk.Size, "took", time.Since(begin).Round(time.Millisecond))
	return nil
}

// watchRoom ends an import when the datastore becomes full: what an image takes is not known before.
func watchRoom(ctx context.Context, s stores.Store, stop context.CancelCauseFunc) {
	tick := time.NewTicker(roomEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if st := s.Status(ctx); st.Err == nil && st.Full {
				stop(fmt.Errorf("%w: datastore %s has %d of %d bytes free; make room, or use a StorageClass of another one", datastore.ErrFull, s.Name, st.Free, st.Capacity))
				return
			}
		}
	}
}

// IsCopy tells whether a volume is a copy of an image.
func IsCopy(v datastore.Volume) bool { return strings.HasPrefix(v.FromVolume, volumePrefix) }

// Imported are the volumes of images in a datastore, with the uids of their items.
func Imported(ctx context.Context, s stores.Store) (map[string]string, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("datastore %s: %w", s.Name, err)
	}
	out := map[string]string{}
	for _, v := range all.Volumes {
		if item := v.Labels[LabelItem]; item != "" {
			out[v.ID] = item
		}
	}
	return out, nil
}

// Forget deletes the volumes of items for which gone says so.
func Forget(ctx context.Context, s stores.Store, gone func(item string) bool) error {
	volumes, err := Imported(ctx, s)
	if err != nil {
		return err
	}
	var failed []error
	for id, item := range volumes {
		if gone(item) {
			if err := s.Delete(ctx, id); err != nil {
				failed = append(failed, fmt.Errorf("datastore %s: %w", s.Name, err))
			}
		}
	}
	return errors.Join(failed...)
}
