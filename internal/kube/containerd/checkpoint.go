package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	bolt "go.etcd.io/bbolt"
)

// checkpointEvery is how old what a power failure brings back can be.
const checkpointEvery = 5 * time.Second

// A checkpoint makes up for containerd's metadata database being written
// without waiting for the disk: the life of a pod is some 25 commits of two
// waits each, and its start is 20 to 50 ms shorter without (measured with runc
// on a busy machine, median and lower quartile of 60).
//
// Unsynced writes are safe when a process dies, since the kernel has them, but
// not when the host does: the database may then be torn. So a synced copy is
// made every few seconds while there are changes and once more at the end, and
// a daemon that finds that the host has booted since the database was last
// open starts from the copy. After a boot no container runs any more, so what
// is lost is an image pulled in the last seconds; its blobs are collected as
// garbage.
type checkpoint struct {
	db    string // the database
	saved string // the copy
	owner string // holds the boot ID of the last daemon
	boot  string // file with the kernel's boot ID
	log   *slog.Logger
}

func newCheckpoint(root string, logger *slog.Logger) *checkpoint {
	dir := filepath.Join(root, plugins.MetadataPlugin.String()+".bolt")
	return &checkpoint{
		db: filepath.Join(dir, "meta.db"), saved: filepath.Join(dir, "meta.db.saved"), owner: filepath.Join(dir, "boot-id"),
		boot: "/proc/sys/kernel/random/boot_id", log: logger,
	}
}

// restore prepares the database before containerd opens it.
func (c *checkpoint) restore() error {
	if err := os.MkdirAll(filepath.Dir(c.db), 0o711); err != nil {
		return err
	}
	boot, err := os.ReadFile(c.boot)
	if err != nil {
		return fmt.Errorf("reading the boot ID: %w", err)
	}
	owner, err := os.ReadFile(c.owner)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case strings.TrimSpace(string(owner)) == strings.TrimSpace(string(boot)):
		return nil
	default:
		if err := c.copyBack(); err != nil {
			return fmt.Errorf("restoring containerd's metadata: %w", err)
		}
	}
	return writeSynced(c.owner, func(f *os.File) error { _, err := f.Write(boot); return err })
}

func (c *checkpoint) copyBack() error {
	saved, err := os.Open(c.saved)
	if errors.Is(err, fs.ErrNotExist) {
		// The host went down within seconds of the very first start.
		c.log.Warn("the host went down before containerd's metadata was saved; starting without")
		if err := os.Remove(c.db); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer saved.Close()
	return writeSynced(c.db, func(f *os.File) error { _, err := io.Copy(f, saved); return err })
}

// register has containerd hand its database to got while it starts.
func (c *checkpoint) register(got func(*metadata.DB)) {
	registry.Register(&plugin.Registration{
		Type:     plugins.InternalPlugin,
		ID:       "atoll-checkpoint",
		Requires: []plugin.Type{plugins.MetadataPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			md, err := ic.GetSingle(plugins.MetadataPlugin)
			if err != nil {
				return nil, err
			}
			got(md.(*metadata.DB))
			return c, nil
		},
	})
}

// A viewer opens a read transaction; metadata.DB is one.
type viewer interface {
	View(func(*bolt.Tx) error) error
}

// run saves the database now and then until ctx ends, and a last time then.
func (c *checkpoint) run(ctx context.Context, db viewer) {
	last := -1
	save := func() {
		if err := c.save(db, &last); err != nil {
			c.log.Error("could not save containerd's metadata; a power failure now would lose recent images", "error", err)
		}
	}
	defer save()
	tick := time.NewTicker(checkpointEvery)
	defer tick.Stop()
	for {
		save()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// save writes the copy unless the database is as it was at transaction last.
func (c *checkpoint) save(db viewer, last *int) error {
	return db.View(func(tx *bolt.Tx) error {
		if tx.ID() == *last {
			return nil
		}
		err := writeSynced(c.saved, func(f *os.File) error { _, err := tx.WriteTo(f); return err })
		if err == nil {
			*last = tx.ID()
		}
		return err
	})
}

// writeSynced replaces path by what write produces, on disk before it returns.
func writeSynced(path string, write func(*os.File) error) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
