package volume

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Fill copies the content of a directory (of a container's image) into an Image volume, once. The
// volume's root takes over the directory's owner and mode. A source that is not a directory leaves
// the volume empty.
func (s *Store) Fill(id, from string) error {
	v, err := s.Get(id)
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.Kind != Image || v.filled {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := copyTree(from, v.Root); err != nil {
			return fmt.Errorf("filling volume %s from the image: %w", id, err)
		}
	}
	v.filled = true
	return nil
}

// copyTree copies the content, owner and modes of a directory. The source is a read-only image and
// the destination is seen by nobody yet, so plain paths are safe here.
func copyTree(src, dst string) error {
	entries, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := copyEntry(filepath.Join(src, e.Name()), filepath.Join(dst, e.Name())); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	return copyAttributes(src, dst)
}

func copyEntry(src, dst string) error {
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := os.Mkdir(dst, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return copyTree(src, dst)
	case unix.S_IFLNK:
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		if err := os.Symlink(target, dst); err != nil {
			return err
		}
		return unix.Lchown(dst, int(st.Uid), int(st.Gid))
	case unix.S_IFREG:
		if err := copyFile(src, dst); err != nil {
			return err
		}
	default:
		if err := unix.Mknod(dst, st.Mode, int(st.Rdev)); err != nil {
			return err
		}
	}
	return copyAttributes(src, dst)
}

func copyFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// copyAttributes copies owner, mode, times and file capabilities.
func copyAttributes(src, dst string) error {
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return err
	}
	if err := unix.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(dst, st.Mode&0o7777); err != nil {
		return err
	}
	const capability = "security.capability"
	buf := make([]byte, 64)
	if n, err := unix.Lgetxattr(src, capability, buf); err == nil {
		if err := unix.Lsetxattr(dst, capability, buf[:n], 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dst, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}
