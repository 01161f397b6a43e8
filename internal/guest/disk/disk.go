// Package disk finds block devices by the serial the host gave them and mounts what is on them:
// read-only images in virtio-blk slots, the writable scratch disk.
//
// The host swaps the file behind a slot while nothing in the guest has the device open; Unmount is
// the promise it waits for, so it checks with the kernel that the device is free. Guest init's
// service calls this package.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotFound is wrapped when no device has the serial, or no image the id.
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped when the id is mounted from another device.
	ErrExists = errors.New("already mounted")
)

// Disks knows the block devices and the mounted images.
type Disks struct {
	sys string // /sys/block
	dir string // images are mounted below

	mu     sync.Mutex
	device map[string]string // serial to device name
	images map[string]image
}

type image struct{ device, serial string }

// New returns the disks of a guest: sysBlock is /sys/block, images the directory to mount below.
func New(sysBlock, images string) *Disks {
	return &Disks{sys: sysBlock, dir: images, device: map[string]string{}, images: map[string]image{}}
}

// Scan learns the serials of all devices. Those in the template keep their names for ever.
func (d *Disks) Scan() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries, err := os.ReadDir(d.sys)
	if err != nil {
		return fmt.Errorf("listing block devices: %w", err)
	}
	settled := map[string]bool{} // those of the template, which need not be read again
	for _, name := range d.device {
		settled[name] = strings.HasPrefix(name, "vd")
	}
	for _, e := range entries {
		if settled[e.Name()] {
			continue
		}
		if serial := d.serial(e.Name()); serial != "" {
			d.device[serial] = e.Name()
		}
	}
	return nil
}

// serial reads the serial of a virtio-blk or SCSI disk, "" when it has none.
func (d *Disks) serial(name string) string {
	if s, err := os.ReadFile(filepath.Join(d.sys, name, "serial")); err == nil {
		return strings.TrimSpace(string(s))
	}
	// Vital product data page 0x80, unit serial number: 4 bytes of header, then the text.
	page, err := os.ReadFile(filepath.Join(d.sys, name, "device", "vpd_pg80"))
	if err != nil || len(page) < 4 {
		return ""
	}
	return strings.TrimSpace(string(page[4:min(len(page), 4+int(page[3]))]))
}

// appears bounds how long a disk that was just added takes to appear: a moment, or seconds on a host that has far
// too much to do.
const appears = time.Minute

// settles bounds, for the same reason, how long a disk that is not mounted any more may still be in use.
const settles = time.Minute

// Find returns the path of the device with that serial. It waits for one that was just added until ctx ends.
func (d *Disks) Find(ctx context.Context, serial string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, appears)
	defer cancel()
	wait := time.Millisecond
	for {
		if name := d.known(serial); name != "" {
			return "/dev/" + name, nil
		}
		if err := d.Scan(); err != nil {
			return "", err
		}
		if name := d.known(serial); name != "" {
			return "/dev/" + name, nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("disk with serial %q: %w", serial, ErrNotFound)
		case <-time.After(wait):
			wait = min(2*wait, 8*time.Millisecond)
		}
	}
}

// known looks in what Scan learned; a SCSI name may since have gone to another disk.
func (d *Disks) known(serial string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	name, ok := d.device[serial]
	if !ok {
		return ""
	}
	if strings.HasPrefix(name, "vd") {
		return name
	}
	if d.serial(name) != serial {
		delete(d.device, serial)
		return ""
	}
	if !opens("/dev/" + name) {
		return ""
	}
	return name
}

// opens tells whether a device can be opened. A disk that was just added has its name in sysfs a moment
// before there is a file in /dev (ENOENT) and before the disk takes requests (ENXIO).
func opens(device string) bool {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENXIO)
	}
	_ = unix.Close(fd)
	return true
}

// MountImage mounts the image in a slot under its id, read-only. Mounting the same again is fine.
func (d *Disks) MountImage(ctx context.Context, id, serial, fsType string) error {
	d.mu.Lock()
	old, ok := d.images[id]
	d.mu.Unlock()
	if ok {
		if old.serial == serial {
			return nil
		}
		return fmt.Errorf("image %s: %w from %s", id, ErrExists, old.serial)
	}
	if fsType == "" {
		fsType = "erofs"
	}
	device, err := d.Find(ctx, serial)
	if err != nil {
		return err
	}
	dir := d.path(id)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making image directory: %w", err)
	}
	if err := unix.Mount(device, dir, fsType, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOATIME, ""); err != nil {
		_ = os.Remove(dir)
		return fmt.Errorf("mounting image %s (%s on %s): %w", id, fsType, device, err)
	}
	d.mu.Lock()
	d.images[id] = image{device: device, serial: serial}
	d.mu.Unlock()
	return nil
}

// Image is the directory where an image is mounted.
func (d *Disks) Image(id string) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.images[id]; !ok {
		return "", fmt.Errorf("image %s: %w", id, ErrNotFound)
	}
	return d.path(id), nil
}

func (d *Disks) path(id string) string { return filepath.Join(d.dir, id) }

// UnmountImage unmounts an image and returns when the kernel has let go of the device. An image
// that is not mounted is fine.
func (d *Disks) UnmountImage(ctx context.Context, id string) error {
	d.mu.Lock()
	img, ok := d.images[id]
	d.mu.Unlock()
	if !ok {
		return nil
	}
	if err := unix.Unmount(d.path(id), unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmounting image %s: %w", id, err)
	}
	if err := waitFree(ctx, img.device); err != nil {
		return fmt.Errorf("image %s: %w", id, err)
	}
	d.mu.Lock()
	delete(d.images, id)
	d.mu.Unlock()
	if err := os.Remove(d.path(id)); err != nil {
		return fmt.Errorf("removing image directory: %w", err)
	}
	return nil
}

// waitFree waits until no file system holds the device: an overlay of a container that is just
// going away may do so for a moment after the unmount.
func waitFree(ctx context.Context, device string) error {
	ctx, cancel := context.WithTimeout(ctx, settles)
	defer cancel()
	wait := time.Millisecond
	for {
		fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("checking %s: %w", device, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still in use: %w", device, err)
		case <-time.After(wait):
			wait = min(2*wait, 50*time.Millisecond)
		}
	}
}

// MountScratch mounts the scratch disk, or a tmpfs when serial is "". Nothing on it outlives the
// virtual machine, so it is mounted without barriers.
func (d *Disks) MountScratch(ctx context.Context, serial, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making scratch directory: %w", err)
	}
	if serial == "" {
		if err := unix.Mount("scratch", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700"); err != nil {
			return fmt.Errorf("mounting tmpfs as scratch: %w", err)
		}
		return nil
	}
	device, err := d.Find(ctx, serial)
	if err != nil {
		return err
	}
	const flags = unix.MS_NODEV | unix.MS_NOATIME
	// The bitmaps of a new disk need no thread that reads them ahead.
	const common = "nobarrier,noauto_da_alloc,no_prefetch_block_bitmaps"
	for _, options := range []string{"prjquota," + common, common} {
		if err = unix.Mount(device, dir, "ext4", flags, options); err == nil {
			return nil
		}
	}
	return fmt.Errorf("mounting scratch disk %s: %w", device, err)
}
