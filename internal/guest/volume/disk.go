package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/filesystem"
)

// Disk is where a volume of kind OnDisk or Block is.
type Disk struct {
	Device string // path
	FSType string // "" for Block
}

// CreateDisk makes a volume that mount mounts on its directory, or with nil one that is only a device. It takes
// the place of one of CreateDisk with the same id: the host has given up on that one before it came to be, and
// may have taken its disk away.
func (s *Store) CreateDisk(id string, d Disk, mount func(dir string) error) error {
	s.mu.Lock()
	old, taken := s.volumes[id]
	free := !taken || old != nil && (old.Kind == OnDisk || old.Kind == Block)
	if free {
		s.volumes[id] = nil // mounting takes time
	}
	s.mu.Unlock()
	if !free {
		return fmt.Errorf("volume %s: %w", id, ErrExists)
	}
	v := &Volume{ID: id, Kind: Block, Disk: d}
	var err error
	if old != nil && old.Kind == OnDisk {
		_ = unix.Unmount(old.Root, unix.MNT_DETACH)
		_ = os.Remove(old.Root)
	}
	if mount != nil {
		v.Kind, v.Root = OnDisk, filepath.Join(s.cfg.Dir, id)
		err = mountAt(v.Root, mount)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.volumes, id)
		return fmt.Errorf("volume %s: %w", id, err)
	}
	s.volumes[id] = v
	return nil
}

func mountAt(dir string, mount func(dir string) error) error {
	if err := unix.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("making directory: %w", err)
	}
	if err := mount(dir); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	return nil
}

// ReleaseDisk unmounts a volume of CreateDisk and forgets it once everything is on its disk. One that is not
// there is fine.
func (s *Store) ReleaseDisk(ctx context.Context, id string) error {
	v, err := s.Get(id)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	switch v.Kind {
	case OnDisk:
		if err := filesystem.Unmount(ctx, v.Disk.Device, v.Root); err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
		_ = os.Remove(v.Root)
	case Block:
		if err := filesystem.Flush(v.Disk.Device); err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
	default:
		return fmt.Errorf("volume %s is not on a disk: %w", id, ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.volumes, id)
	return nil
}
