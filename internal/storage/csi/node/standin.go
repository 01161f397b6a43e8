package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/linux/loop"
)

// standIn is the empty file whose loop device stands for a block volume of a micro-VM pod. Nobody writes to
// it: the kubelet makes sure that there is a device, containerd reads its number, and the shim knows the
// volume by that.
func (s *Service) standIn(t target) string {
	return filepath.Join(s.cfg.Kubelet, "plugins", handover.Driver, "devices", digest(t.Path))
}

func (s *Service) publishStandIn(t target, bytes int64) error {
	file := s.standIn(t)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("making a device: %w", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("making a device: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(bytes); err != nil {
		return fmt.Errorf("making a device: %w", err)
	}
	d, err := s.loopOver(&t, f, false) // the kubelet puts another loop device over it, and tries to open it for writing
	if err != nil {
		return err
	}
	if err := s.handOver(t, &handover.Device{Major: int64(d.Major), Minor: int64(d.Minor)}); err != nil {
		return err
	}
	return bindDevice(d.Path, t.Path)
}

func (s *Service) removeStandIn(t target) error {
	file := s.standIn(t)
	if err := unmount(t.Path); err != nil {
		return err
	}
	if err := s.dropLoop(t); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing a device: %w", err)
	}
	return nil
}

// loopOver makes a loop device of a file, or finds the one that was made before, and notes it. The file is noted
// first, so that a device that was made by a process that died before it could note it is found again.
func (s *Service) loopOver(t *target, f *os.File, readOnly bool) (loop.Device, error) {
	if name := resolved(f.Name()); t.Backing != name {
		t.Backing = name
		if err := s.targets.put(*t); err != nil {
			return loop.Device{}, err
		}
	}
	made, err := devicesOf(*t)
	if err != nil {
		return loop.Device{}, err
	}
	found := ""
	for _, device := range made {
		if isOver(device, f.Name()) {
			found = device
			continue
		}
		// Another file was there, for example that of a storage daemon that has died.
		if err := loop.Detach(device); err != nil {
			return loop.Device{}, err
		}
	}
	var st unix.Stat_t
	if found != "" && unix.Stat(found, &st) == nil {
		t.Loop = found
		return loop.Device{Path: found, Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)}, s.targets.put(*t)
	}
	d, err := loop.Attach(f, readOnly)
	if err != nil {
		return loop.Device{}, err
	}
	t.Loop = d.Path
	if err := s.targets.put(*t); err != nil {
		return loop.Device{}, errors.Join(err, loop.Detach(d.Path))
	}
	return d, nil
}

// isOver tells whether a loop device is made of that very file: its number may have gone to another by now, and
// another file may be in its place.
func isOver(device, file string) bool {
	dev, inode, ok := loop.Backing(device)
	var st unix.Stat_t
	return ok && unix.Stat(file, &st) == nil && st.Ino == inode && st.Dev == dev
}

// resolved is the name of a file as the kernel knows it, which a loop device is found by: without symbolic links in
// the path of its directory. The file itself may be gone, or its daemon dead.
func resolved(file string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(file))
	if err != nil {
		return file
	}
	return filepath.Join(dir, filepath.Base(file))
}

// devicesOf are the loop devices that were made for a target.
func devicesOf(t target) ([]string, error) {
	devices, err := loop.Over(resolved(t.Backing))
	if err != nil || t.Loop == "" || slices.Contains(devices, t.Loop) {
		return devices, err
	}
	// Of an orphan, the file was of a storage daemon that has died.
	if loop.Orphan(t.Loop) || isOver(t.Loop, t.Backing) {
		devices = append(devices, t.Loop)
	}
	return devices, nil
}

// dropLoop gives the loop devices of a target's file back. It goes by the name of the file, since what was there
// may be gone.
func (s *Service) dropLoop(t target) error {
	if t.Backing == "" {
		return nil
	}
	devices, err := devicesOf(t)
	if err != nil {
		return err
	}
	for _, d := range devices {
		if err := loop.Detach(d); err != nil {
			return err
		}
	}
	return nil
}

// bindDevice makes a device visible at a path, which is on a file system that may not allow devices.
func bindDevice(device, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return fmt.Errorf("publishing device: %w", err)
	}
	var at, of unix.Stat_t
	if unix.Stat(path, &at) == nil && unix.Stat(device, &of) == nil && at.Rdev == of.Rdev && at.Mode&unix.S_IFMT == unix.S_IFBLK {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("publishing device: %w", err)
	}
	_ = f.Close()
	if err := unix.Mount(device, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("publishing device: %w", err)
	}
	return nil
}

// unmount takes all mounts off a path.
func unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
			continue
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // nothing is mounted there
		}
		return fmt.Errorf("unmounting %s: %w", path, err)
	}
}
