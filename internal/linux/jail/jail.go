// Package jail gives a thread a file tree of its own with little in it, for a program that is started from it.
//
// It makes no processes, users or limits: its callers, internal/storage/convert and internal/storage/csi/export, start
// what reads untrusted images from such a thread, and never use the thread again. The order is Begin, Bind as often as
// needed, Enter. What can go wrong: no privilege to mount (not root).
package jail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Begin ties the calling goroutine to its thread for good, gives that a mount namespace, and makes a file tree at the
// directory root: an empty one of up to that many bytes, with the programs and libraries of the host, read-only.
func Begin(root string, bytes int64) error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("separating mounts: %w", err)
	}
	if err := unix.Mount("root", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=0755,size=%d", bytes)); err != nil {
		return fmt.Errorf("mounting the root: %w", err)
	}
	binds := []string{"/usr"}
	for _, d := range []string{"/lib", "/lib64", "/bin"} {
		target, err := os.Readlink(d)
		if err != nil {
			binds = append(binds, d)
			continue
		}
		if err := os.Symlink(target, filepath.Join(root, d)); err != nil {
			return err
		}
	}
	for _, d := range binds {
		to := filepath.Join(root, d)
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
		if err := Bind(d, to, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV); err != nil {
			return err
		}
	}
	return nil
}

// Bind shows something at another place, which is there. With flags such as unix.MS_RDONLY it is less there.
func Bind(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s: %w", from, err)
	}
	if flags == 0 {
		return nil
	}
	if err := unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
		return fmt.Errorf("binding %s: %w", from, err)
	}
	return nil
}

// Enter makes the tree the root of the thread, and lets go of all other mounts, which the namespace would keep alive
// after they are gone from the host. What is started from now on gets no privileges by a program's file.
func Enter(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("entering the root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("entering the root: %w", err)
	}
	if err := errors.Join(unix.Unmount(".", unix.MNT_DETACH), unix.Chdir("/")); err != nil {
		return fmt.Errorf("entering the root: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("setting no_new_privs: %w", err)
	}
	return nil
}
