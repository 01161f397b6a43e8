package layers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
)

// Config says where a Snapshotter keeps its files.
type Config struct {
	Root string // absolute path of a directory of its own; made if missing
}

// A Snapshotter implements snapshots.Snapshotter over EROFS images.
type Snapshotter struct {
	root     string
	meta     *storage.MetaStore
	building singleflight.Group // by snapshot id: images being merged

	emptyLock sync.Mutex // held while the empty image is written
}

var _ snapshots.Snapshotter = (*Snapshotter)(nil)

// New opens the snapshotter in c.Root.
func New(c Config) (*Snapshotter, error) {
	if !filepath.IsAbs(c.Root) {
		return nil, fmt.Errorf("snapshotter root %q is not absolute", c.Root)
	}
	if err := os.MkdirAll(filepath.Join(c.Root, "snapshots"), 0o700); err != nil {
		return nil, fmt.Errorf("making snapshotter root: %w", err)
	}
	meta, err := storage.NewMetaStore(filepath.Join(c.Root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	s := &Snapshotter{root: c.Root, meta: meta}
	if err := s.dropHalfUnpacked(); err != nil {
		meta.Close()
		return nil, fmt.Errorf("opening snapshotter: %w", err)
	}
	return s, nil
}

// dropHalfUnpacked frees the space of layers whose unpacking ended with the
// last process. Their snapshots stay until containerd collects them.
func (s *Snapshotter) dropHalfUnpacked() error {
	return s.meta.WithTransaction(context.Background(), false, func(ctx context.Context) error {
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindActive || !isUnpack(info.Name) {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			for _, name := range []string{layerFile, layerFile + newSuffix} {
				if err := os.Remove(s.path(id, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
			return nil
		})
		if errdefs.IsNotFound(err) { // an empty database
			return nil
		}
		return err
	})
}

// Close closes the database.
func (s *Snapshotter) Close() error { return s.meta.Close() }

func (s *Snapshotter) path(id string, elem ...string) string {
	return filepath.Join(append([]string{s.root, "snapshots", id}, elem...)...)
}

// Stat returns the record of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (out snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		out, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return out, err
}

// Walk calls fn for the snapshots that match the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

// Usage returns the disk space of a committed snapshot's images, or what the
// shim last reported for the writable layer of a container.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	var id string
	var info snapshots.Info
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	switch {
	case info.Kind == snapshots.KindCommitted:
		return diskUsage(s.path(id))
	case info.Kind == snapshots.KindActive && !isUnpack(key):
		return reportedUsage(handover.LayerUsage(s.path(id, metaDir)))
	}
	return snapshots.Usage{}, nil
}

// diskUsage sums up the files in the directory of a committed snapshot.
func diskUsage(dir string) (snapshots.Usage, error) {
	var u snapshots.Usage
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil
		}
		u.Inodes++
		u.Size += st.Blocks * 512
		return nil
	})
	return u, err
}

// reportedUsage reads a usage file. A container that has not started yet has
// none.
func reportedUsage(path string) (snapshots.Usage, error) {
	u, _, err := handover.ReadUsage(path)
	if errors.Is(err, fs.ErrNotExist) {
		return snapshots.Usage{}, nil
	}
	return snapshots.Usage{Size: u.Bytes, Inodes: u.Inodes}, err
}

// Prepare makes the snapshot of a container, or of a layer about to be
// unpacked if the key says so.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a read-only snapshot, which Mounts returns as a loop mount.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	unpack := kind == snapshots.KindActive && isUnpack(key)
	if parent != "" && !unpack {
		c, err := s.chain(ctx, parent)
		if err != nil {
			return nil, err
		}
		if err := s.ensureImage(ctx, c); err != nil {
			return nil, err
		}
	}
	var snap storage.Snapshot
	made := ""
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("creating snapshot: %w", err)
		}
		made = s.path(snap.ID)
		return s.makeDir(snap, unpack)
	})
	if err != nil {
		if made != "" {
			os.RemoveAll(made)
		}
		return nil, err
	}
	return s.mounts(key, snap)
}

// makeDir makes the directory of a new snapshot. One that is there already is
// left from a transaction that did not commit.
func (s *Snapshotter) makeDir(snap storage.Snapshot, unpack bool) error {
	dir := s.path(snap.ID)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if err = os.RemoveAll(dir); err == nil {
			err = os.Mkdir(dir, 0o700)
		}
	}
	if err != nil || unpack || snap.Kind != snapshots.KindActive {
		return err
	}
	etc := filepath.Join(dir, metaDir, etcDir)
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	if len(snap.ParentIDs) == 0 {
		return nil
	}
	for _, name := range userFiles {
		err := os.Link(s.path(snap.ParentIDs[0], etcDir, name), filepath.Join(etc, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("linking /etc/%s of the image: %w", name, err)
		}
	}
	return nil
}

// chain returns a committed snapshot and all below it.
func (s *Snapshotter) chain(ctx context.Context, name string) (chain, error) {
	c := chain{name: name}
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name != "" {
			id, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			if info.Kind != snapshots.KindCommitted {
				return fmt.Errorf("parent %q is not committed: %w", name, errdefs.ErrInvalidArgument)
			}
			c.ids = append(c.ids, id)
			name = info.Parent
		}
		return nil
	})
	return c, err
}

// Mounts returns the mounts of an active or view snapshot.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var snap storage.Snapshot
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		snap, err = storage.GetSnapshot(ctx, key)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("getting mounts: %w", err)
	}
	return s.mounts(key, snap)
}

func (s *Snapshotter) mounts(key string, snap storage.Snapshot) ([]mount.Mount, error) {
	if snap.Kind == snapshots.KindActive && isUnpack(key) {
		return layerMounts(s.path(snap.ID)), nil
	}
	var image string
	if len(snap.ParentIDs) > 0 {
		image = s.imagePath(snap.ParentIDs[0])
	} else {
		var err error
		if image, err = s.emptyImage(); err != nil {
			return nil, fmt.Errorf("making the empty image: %w", err)
		}
	}
	if snap.Kind == snapshots.KindView || wantsLoop(key) {
		return []mount.Mount{{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}}, nil
	}
	return []mount.Mount{{
		Type: "bind", Source: s.path(snap.ID, metaDir),
		Options: []string{"rbind", "ro", handover.ImageOption + image},
	}}, nil
}

// Commit makes an unpacked layer permanent. A container cannot be committed:
// its writable layer is not on the host.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		id, _, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if !exists(s.path(id, layerFile)) {
			return fmt.Errorf("snapshot %q holds no unpacked layer: %w", key, errdefs.ErrFailedPrecondition)
		}
		usage, err := diskUsage(s.path(id))
		if err != nil {
			return err
		}
		if _, err := storage.CommitActive(ctx, key, name, usage, opts...); err != nil {
			return fmt.Errorf("committing snapshot %q: %w", key, err)
		}
		return nil
	})
}

// Remove deletes a snapshot that no other stands on.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("removing snapshot %q: %w", key, err)
	}
	if err := os.RemoveAll(s.path(id)); err != nil {
		// Cleanup tries again.
		log.G(ctx).WithError(err).WithField("snapshot", id).Warn("failed to remove snapshot directory")
	}
	return nil
}

// Cleanup removes directories that no snapshot owns, left by a crash.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	var orphans []string
	// A write transaction, so that no snapshot is being made meanwhile.
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		entries, err := os.ReadDir(filepath.Join(s.root, "snapshots"))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, ok := ids[e.Name()]; !ok {
				orphans = append(orphans, s.path(e.Name()))
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, dir := range orphans {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing an orphaned snapshot: %w", err)
		}
	}
	return nil
}
