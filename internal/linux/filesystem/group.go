package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// maxDepth bounds how deep directories are followed.
const maxDepth = 2000

// SetGroup gives a file system to a group, as Kubernetes does for fsGroup: everything belongs to the group,
// whose members may read and write it, and what is made in a directory does, too. When the root directory is
// the group's already, all else is taken to be so.
func SetGroup(ctx context.Context, dir string, group uint32) error {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("setting group of volume: %w", err)
	}
	f := os.NewFile(uintptr(root), dir)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return fmt.Errorf("setting group of volume: %w", err)
	}
	if want := st.Mode | dirBits; st.Gid == group && st.Mode == want {
		return nil
	}
	// The root last: it says that the rest is done.
	if err := setBelow(ctx, f, group, 0); err != nil {
		return fmt.Errorf("setting group of volume: %w", err)
	}
	if err := setOne(root, group, st.Mode); err != nil {
		return fmt.Errorf("setting group of volume: %w", err)
	}
	return nil
}

const (
	fileBits = 0o660
	dirBits  = 0o770 | unix.S_ISGID
)

// setBelow changes what is in a directory.
func setBelow(ctx context.Context, dir *os.File, group uint32, depth int) error {
	if depth > maxDepth {
		return errors.New("directories are too deep")
	}
	for {
		entries, err := dir.ReadDir(512)
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := setEntry(ctx, dir, e.Name(), group, depth); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		if len(entries) == 0 || err != nil {
			return nil //nolint:nilerr // the end of the directory
		}
	}
}

func setEntry(ctx context.Context, dir *os.File, name string, group uint32, depth int) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		sub, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		s := os.NewFile(uintptr(sub), name)
		defer s.Close()
		if err := setBelow(ctx, s, group, depth+1); err != nil {
			return err
		}
	}
	return setOne(fd, group, st.Mode)
}

// setOne changes one file, which fd may be open on by O_PATH.
func setOne(fd int, group, mode uint32) error {
	if err := unix.Fchownat(fd, "", -1, int(group), unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	add := uint32(fileBits)
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return nil
	case unix.S_IFDIR:
		add = dirBits
	}
	return unix.Fchmodat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), mode&0o7777|add, 0)
}
