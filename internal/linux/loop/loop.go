// Package loop makes block devices of files.
//
// A device stays until Detach, whatever happens to the process that made it; who keeps its name should check
// with Backing before using it again, since the kernel hands out the numbers. The CSI node service calls it.
// What can go wrong: no loop driver, no free device, and a file whose file system ends (reads and writes then
// fail, for whoever uses the device).
package loop

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Device is a loop device.
type Device struct {
	Path         string
	Major, Minor uint32
}

// attempts to get a free device, which others may take first.
const attempts = 16

// Attach makes a device of an open file, which may be closed then.
func Attach(f *os.File, readOnly bool) (Device, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return Device{}, fmt.Errorf("making a loop device: %w", err)
	}
	defer control.Close()
	for range attempts {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return Device{}, fmt.Errorf("making a loop device: %w", err)
		}
		d, err := configure(n, f, readOnly)
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		if err != nil {
			return Device{}, fmt.Errorf("making a loop device: %w", err)
		}
		return d, nil
	}
	return Device{}, errors.New("making a loop device: others take all of them")
}

// loopMajor is the major number of all loop devices.
const loopMajor = 7

func configure(n int, f *os.File, readOnly bool) (Device, error) {
	d := Device{Path: "/dev/loop" + strconv.Itoa(n), Major: loopMajor, Minor: uint32(n)}
	// Where no daemon makes device files for the kernel's devices.
	err := unix.Mknod(d.Path, unix.S_IFBLK|0o600, int(unix.Mkdev(d.Major, d.Minor)))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return Device{}, err
	}
	dev, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		return Device{}, err
	}
	defer dev.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd())}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], f.Name())
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	return d, unix.IoctlLoopConfigure(int(dev.Fd()), &config)
}

// Backing tells which file a device is made of, by device number and inode; false if it is none.
func Backing(path string) (dev, inode uint64, ok bool) {
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return 0, 0, false
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return 0, 0, false
	}
	return info.Device, info.Inode, true
}

// Over lists the devices that were made of a file of this name, which may be gone by now. The kernel knows the name
// without symbolic links.
func Over(file string) ([]string, error) {
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, fmt.Errorf("looking for loop devices: %w", err)
	}
	var out []string
	for _, name := range all {
		device := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(name)))
		text, err := backingName(device)
		if err != nil {
			return nil, err
		}
		if text == file {
			out = append(out, device)
		}
	}
	return out, nil
}

// Orphan tells whether a device is made of a file that was a mount point and is not mounted any more, which has no
// name.
func Orphan(path string) bool {
	text, err := backingName(path)
	return err == nil && text == "/"
}

// backingName is the name of the file that a device is made of, "" if it is none.
func backingName(device string) (string, error) {
	data, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("looking at loop device: %w", err)
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), " (deleted)"), nil
}

// Resize makes the device as large as its file has become.
func Resize(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("resizing loop device: %w", err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("resizing loop device: %w", err)
	}
	return nil
}

// Detach gives a device back. One that is none is fine. While somebody uses it, it goes with the last use.
func Detach(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("removing loop device: %w", err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("removing loop device: %w", err)
	}
	return nil
}
