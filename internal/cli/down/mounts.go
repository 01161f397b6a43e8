package down

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// unmountBelow unmounts everything below the directories, the newest mount
// first, and returns how many there were. A busy mount is detached: it is gone
// from the tree, and for good when its last user ends.
func unmountBelow(dirs ...string) (int, error) {
	total := 0
	for {
		points, err := mountPoints()
		if err != nil {
			return total, err
		}
		points = slices.DeleteFunc(points, func(p string) bool {
			return !slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(p, dir+"/") })
		})
		if len(points) == 0 {
			return total, nil
		}
		var errs []error
		for _, p := range slices.Backward(points) {
			err := unix.Unmount(p, unix.UMOUNT_NOFOLLOW)
			if errors.Is(err, unix.EBUSY) {
				err = unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
			// What went away with another mount is not there to unmount.
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("unmounting %s: %w", p, err))
				continue
			}
			total++
		}
		if err := errors.Join(errs...); err != nil {
			return total, err
		}
		if total > 100000 {
			return total, errors.New("mounts keep appearing")
		}
	}
}

func isMountPoint(path string) (bool, error) {
	points, err := mountPoints()
	return slices.Contains(points, path), err
}

// mountPoints returns the mount points of this namespace, oldest first.
func mountPoints() ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("reading the mount table: %w", err)
	}
	return parseMountPoints(string(b)), nil
}

// parseMountPoints reads the fifth field of each line, in which space, tab,
// newline and backslash are written as three octal digits.
func parseMountPoints(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 4 {
			out = append(out, unescape(f[4]))
		}
	}
	return out
}

func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// removeTree removes a directory, and refuses while something is mounted in it:
// what is mounted may not be ours to delete.
func removeTree(dir string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, p := range points {
		if p == dir || strings.HasPrefix(p, dir+"/") {
			return fmt.Errorf("%s is still mounted", p)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	return nil
}
