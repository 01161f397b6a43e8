package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/linux/filesystem"
	"atoll.dev/atoll/internal/linux/loop"
	"atoll.dev/atoll/internal/linux/mkfs"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Exporter makes volumes visible on the host, see package export.
type Exporter interface {
	// Exported tells whether a volume is a file already.
	Exported(name string) bool
	// File is the path that Export returns.
	File(name string) string
	// Export makes a volume a file and returns its path; again for one that is exported already.
	Export(ctx context.Context, name string, o attach.Opened) (string, error)
	Snapshot(ctx context.Context, name string, overlay handover.Layer, key []byte) error
	Resize(ctx context.Context, name string, bytes int64) error
	Limit(ctx context.Context, name string, l attach.Limits) error
	// Remove closes a volume, which nobody uses any more.
	Remove(ctx context.Context, name string) error
	// Sweep removes all for which needed is false; mounted is false for one that nobody finds at its path.
	Sweep(ctx context.Context, needed func(name string, mounted bool) bool) error
}

const (
	// hostUse is what uses a volume on the host, in the engine: all pods of the host together.
	hostUse = "host"
	// unmountTimeout bounds how long a pod that has ended may keep a file system busy.
	unmountTimeout = 20 * time.Second
)

// exportName is the name of a volume's export.
func exportName(volume string) string { return digest(volume)[:24] }

// shared is where a volume's file system is mounted once; targets are binds of it.
func (s *Service) shared(volume string) string {
	return filepath.Join(s.cfg.Kubelet, "plugins", handover.Driver, "mounts", exportName(volume))
}

// publishHere makes a volume visible at the target on this host.
func (s *Service) publishHere(ctx context.Context, t target, disk handover.Disk) error {
	if s.cfg.Export == nil {
		return status.Error(codes.FailedPrecondition, "this host cannot give volumes to pods that do not run in a micro-VM")
	}
	store, v, err := s.cfg.Stores.Volume(ctx, t.Volume)
	if err != nil {
		return err
	}
	opened, err := s.opened(ctx, store, v, disk)
	if err != nil {
		return err
	}
	if !s.cfg.Export.Exported(exportName(t.Volume)) {
		if opened.Ceph, err = store.Admit(ctx, disk); err != nil {
			return err
		}
	}
	file, err := s.cfg.Export.Export(ctx, exportName(t.Volume), opened)
	if err != nil {
		return err
	}
	readOnly := t.Mode == datastore.ReadOnly
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(file, flags, 0)
	if err != nil {
		return fmt.Errorf("opening exported volume: %w", err)
	}
	defer f.Close()
	d, err := s.loopOver(&t, f, readOnly)
	if err != nil {
		return err
	}
	if t.Block {
		return bindDevice(d.Path, t.Path)
	}
	return s.mountHere(ctx, t, d.Path, disk.Size)
}

// mountHere mounts a volume once, and binds the mount to the target.
func (s *Service) mountHere(ctx context.Context, t target, device string, bytes int64) error {
	dir := s.shared(t.Volume)
	readOnly := t.Mode == datastore.ReadOnly
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("mounting volume: %w", err)
	}
	if mounted, err := mountedFrom(dir, device); err != nil {
		return err
	} else if !mounted {
		if err := s.formatHere(ctx, t, device, bytes, readOnly); err != nil {
			return err
		}
		o := filesystem.Options{FSType: t.FSType, Options: t.Options, ReadOnly: readOnly}
		if err := filesystem.Mount(device, dir, o); err != nil {
			return err
		}
	}
	if t.Group != nil && !readOnly {
		if err := filesystem.SetGroup(ctx, dir, *t.Group); err != nil {
			return err
		}
	}
	if err := makeDir(t.Path); err != nil {
		return err
	}
	if mounted, err := mountedFrom(t.Path, device); err != nil || mounted {
		return err
	}
	if err := unix.Mount(dir, t.Path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting volume at the target: %w", err)
	}
	return nil
}

// formatHere makes a file system on a blank volume.
func (s *Service) formatHere(ctx context.Context, t target, device string, bytes int64, readOnly bool) error {
	c, err := filesystem.Probe(device)
	if err != nil || !c.Blank {
		return err
	}
	if readOnly {
		return status.Error(codes.FailedPrecondition, "the volume is read-only and has no file system yet; let a pod write to it first")
	}
	img, err := mkfs.New(ctx, t.FSType, bytes, s.targets.dir)
	if err != nil {
		return err
	}
	defer img.Close()
	w, err := filesystem.StartFormat(device)
	if err != nil {
		return err
	}
	const chunk = 1 << 20
	if err := img.Each(chunk, func(at int64, data []byte) error { return w.Write(uint64(at), data) }); err != nil {
		return errors.Join(err, w.Close())
	}
	return w.Finish()
}

// mountedFrom tells whether the device is mounted at a directory. A mount of something else is taken away: it
// is what a storage daemon that has died left behind.
func mountedFrom(dir, device string) (bool, error) {
	var at, above, dev unix.Stat_t
	err := errors.Join(unix.Stat(filepath.Dir(dir), &above), unix.Stat(device, &dev))
	if err != nil {
		return false, fmt.Errorf("looking for mounts: %w", err)
	}
	if err := unix.Stat(dir, &at); err == nil && at.Dev == above.Dev {
		return false, nil
	} else if err == nil && at.Dev == dev.Rdev {
		return true, nil
	}
	return false, detach(dir)
}

// detach takes mounts off a path even where somebody uses them.
func detach(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	return nil
}

// here is all targets of a volume on this host.
func (s *Service) here(volume string) ([]target, error) {
	all, err := s.targets.of(volume)
	var out []target
	for _, t := range all {
		if !t.MicroVM {
			out = append(out, t)
		}
	}
	return out, err
}

// unpublishHere takes a volume from the target, and with the last target from the host. It reports whether it
// was the last.
func (s *Service) unpublishHere(ctx context.Context, t target) (last bool, err error) {
	if err := unmount(t.Path); err != nil {
		return false, err
	}
	all, err := s.here(t.Volume)
	if err != nil {
		return false, err
	}
	if len(all) > 1 {
		return false, nil
	}
	if s.cfg.Export == nil {
		return true, nil
	}
	// The target may be one that was not noted in full, while another had it mounted.
	t.Backing = s.cfg.Export.File(exportName(t.Volume))
	if err := s.closeHere(ctx, t); err != nil {
		return false, err
	}
	return true, s.cfg.Export.Remove(ctx, exportName(t.Volume))
}

// closeHere writes everything out and gives the loop device back.
func (s *Service) closeHere(ctx context.Context, t target) error {
	dir := s.shared(t.Volume)
	ctx, cancel := context.WithTimeout(ctx, unmountTimeout)
	defer cancel()
	devices, err := devicesOf(t)
	if err != nil {
		return err
	}
	if maybeMounted(dir) {
		if err := filesystem.Detach(dir); err != nil {
			// The storage daemon is gone; there is nothing that could be written any more.
			s.cfg.Logger.Warn("unmounting a volume", "volume", t.Volume, "error", err)
			if err := detach(dir); err != nil {
				return err
			}
		}
	}
	// Also if it was unmounted before: somebody may have kept it busy then.
	for _, d := range devices {
		err := filesystem.WaitFree(ctx, d)
		if ctx.Err() != nil && (s.cfg.Export.Exported(exportName(t.Volume)) || loop.Orphan(d)) {
			return status.Errorf(codes.FailedPrecondition, "somebody uses the volume still: %v", err)
		}
		if err != nil {
			s.cfg.Logger.Warn("closing a volume", "volume", t.Volume, "error", err) // see above
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing mount point: %w", err)
	}
	return s.dropLoop(t)
}

// maybeMounted tells whether something is mounted at a directory, or may be: what has died cannot be looked at.
func maybeMounted(dir string) bool {
	var at, above unix.Stat_t
	if unix.Stat(filepath.Dir(dir), &above) != nil {
		return false
	}
	err := unix.Stat(dir, &at)
	return err == nil && at.Dev != above.Dev || err != nil && !errors.Is(err, unix.ENOENT)
}

// CleanUp takes everything off this host that pods of the host, and devices that stand for volumes, have on
// it, and reports how much there was. Pods that use volumes must have ended, and no Service may run. What is
// published stays on record: it is put back when the kubelet asks for it again.
func CleanUp(kubelet string, exports Exporter) (int, error) {
	s := &Service{cfg: Config{Kubelet: kubelet, Export: exports}, targets: newTargets(kubelet)}
	all, err := s.targets.of("")
	errs, n := []error{err}, 0
	for _, t := range all {
		if t.MicroVM && !t.Block {
			continue
		}
		n++
		errs = append(errs, detach(t.Path))
	}
	for _, t := range all {
		if !t.MicroVM && t.Loop != "" {
			_ = filesystem.Sync(s.shared(t.Volume)) // fails where it is not mounted, or its daemon is gone
			errs = append(errs, detach(s.shared(t.Volume)))
		}
		errs = append(errs, s.dropLoop(t))
	}
	none := func(string, bool) bool { return false }
	return n, errors.Join(append(errs, exports.Sweep(context.Background(), none))...)
}

// sweep ends exports that nobody needs, of an agent that died in the middle of something.
func (s *Service) sweep(ctx context.Context) error {
	if s.cfg.Export == nil {
		return nil
	}
	// An export has a target on record before it is there, so this is asked each time.
	return s.cfg.Export.Sweep(ctx, func(name string, mounted bool) bool {
		all, err := s.targets.of("")
		return err != nil || slices.ContainsFunc(all, func(t target) bool {
			return !t.MicroVM && exportName(t.Volume) == name && (mounted || t.Loop != "" && loop.Orphan(t.Loop))
		})
	})
}
