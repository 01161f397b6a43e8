package filesystem

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options say how a file system is mounted.
type Options struct {
	FSType   string
	Options  []string // as for mount(8)
	ReadOnly bool
}

// Bounds of mount options.
const maxOptions = 4000 // bytes, since the kernel takes one page

// Mount mounts a disk, whose journal is replayed, and makes its file system as large as the disk.
func Mount(device, dir string, o Options) error {
	if o.FSType != Ext4 && o.FSType != XFS {
		return fmt.Errorf("mounting: file system type %q: %w", o.FSType, ErrInvalid)
	}
	c, err := Probe(device)
	if err != nil {
		return err
	}
	if c.FSType != o.FSType {
		what := c.FSType
		if what == "" {
			what = "no file system that is known"
		}
		return fmt.Errorf("mounting as %s: %w: %s", o.FSType, ErrForeign, what)
	}
	flags, data, err := parse(o.Options)
	if err != nil {
		return err
	}
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if o.FSType == XFS {
		data = append(data, "nouuid") // a copy has the UUID of what it is a copy of
	}
	err = unix.Mount(device, dir, o.FSType, flags, strings.Join(data, ","))
	if err != nil && flags&unix.MS_RDONLY != 0 && (errors.Is(err, unix.EROFS) || errors.Is(err, unix.EINVAL)) {
		// The copy of a file system that was in use has a journal, which cannot be replayed on a disk that
		// cannot be written to. What was synchronized some time before is there.
		without := map[string]string{Ext4: "noload", XFS: "norecovery"}[o.FSType]
		if unix.Mount(device, dir, o.FSType, flags, strings.Join(append(data, without), ",")) == nil {
			slog.Warn("mounted a read-only disk without the last entries of its journal", "device", device)
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("mounting %s with options %q: %w", o.FSType, o.Options, err)
	}
	if flags&unix.MS_RDONLY != 0 {
		return nil
	}
	if _, err := Grow(device, dir, o.FSType); err != nil {
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	return nil
}

// parse splits options into flags and what the file system understands.
func parse(options []string) (flags uintptr, data []string, err error) {
	length := 0
	for _, list := range options {
		for o := range strings.SplitSeq(list, ",") {
			length += len(o) + 1
			if length > maxOptions || strings.ContainsRune(o, 0) {
				return 0, nil, fmt.Errorf("mount options: %w", ErrInvalid)
			}
			set, unset, ok := flag(o)
			flags = flags&^unset | set
			if !ok && o != "" {
				data = append(data, o)
			}
		}
	}
	return flags, data, nil
}

// flag knows the options that are flags of mount(2).
func flag(option string) (set, unset uintptr, ok bool) {
	switch option {
	case "defaults", "async", "_netdev", "nofail", "auto", "noauto":
		return 0, 0, true
	case "ro":
		return unix.MS_RDONLY, 0, true
	case "rw":
		return 0, unix.MS_RDONLY, true
	case "nosuid":
		return unix.MS_NOSUID, 0, true
	case "nodev":
		return unix.MS_NODEV, 0, true
	case "noexec":
		return unix.MS_NOEXEC, 0, true
	case "suid", "dev", "exec":
		m := map[string]uintptr{"suid": unix.MS_NOSUID, "dev": unix.MS_NODEV, "exec": unix.MS_NOEXEC}
		return 0, m[option], true
	case "sync":
		return unix.MS_SYNCHRONOUS, 0, true
	case "dirsync":
		return unix.MS_DIRSYNC, 0, true
	case "noatime":
		return unix.MS_NOATIME, 0, true
	case "nodiratime":
		return unix.MS_NODIRATIME, 0, true
	case "relatime":
		return unix.MS_RELATIME, 0, true
	case "strictatime":
		return unix.MS_STRICTATIME, 0, true
	case "lazytime":
		return unix.MS_LAZYTIME, 0, true
	}
	return 0, 0, false
}

// Unmount writes everything that is not on the disk yet, and unmounts. It returns when the kernel has let go
// of the disk, which containers may delay that are just going away.
func Unmount(ctx context.Context, device, dir string) error {
	if err := Detach(dir); err != nil {
		return err
	}
	return WaitFree(ctx, device)
}

// Detach is Unmount that does not wait.
func Detach(dir string) error {
	if err := Sync(dir); err != nil && !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("unmounting: %w", err)
	}
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); errors.Is(err, unix.EBUSY) {
		// Something of init itself looks at it, for a moment.
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if err != nil {
			return fmt.Errorf("unmounting: %w", err)
		}
	} else if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmounting: %w", err)
	}
	return nil
}

// Sync writes out the file system that a directory is in.
func Sync(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("writing out: %w", err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("writing out %s: %w", dir, err)
	}
	return nil
}

// WaitFree waits until no file system is mounted from the device, then empties its cache.
func WaitFree(ctx context.Context, device string) error {
	wait := time.Millisecond
	for {
		f, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			return errors.Join(f.Sync(), f.Close())
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("checking %s: %w", device, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still in use: %w", device, ctx.Err())
		case <-time.After(wait):
			wait = min(2*wait, 50*time.Millisecond)
		}
	}
}

// Flush writes what is not on a disk yet that has no file system of ours.
func Flush(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return fmt.Errorf("flushing: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("flushing: %w", err)
	}
	return nil
}
