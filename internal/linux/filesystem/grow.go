package filesystem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of ioctl(2), see linux/fs/ext4/ext4.h and xfs_fs.h.
const (
	ext4Resize   = 0x40086610
	xfsGeometry  = 0x8100587e
	xfsGrowData  = 0x4010586e
	xfsGeomBytes = 256
)

// Grow makes a mounted file system as large as its disk and returns the size of the disk.
func Grow(device, dir, fsType string) (int64, error) {
	d, err := os.Open(device)
	if err != nil {
		return 0, fmt.Errorf("growing: %w", err)
	}
	defer d.Close()
	bytes, err := size(d)
	if err != nil {
		return 0, fmt.Errorf("growing: %w", err)
	}
	root, err := os.Open(dir)
	if err != nil {
		return 0, fmt.Errorf("growing: %w", err)
	}
	defer root.Close()
	grow := growExt4
	if fsType == XFS {
		grow = growXFS
	}
	if err := grow(d, root, bytes); err != nil {
		return 0, fmt.Errorf("growing %s to %d bytes: %w", fsType, bytes, err)
	}
	return bytes, nil
}

func growExt4(disk, root *os.File, bytes int64) error {
	const (
		superblock = 1024
		low, high  = 4, 0x150 // halves of the number of blocks
		logSize    = 24       // of a block, over 1 KiB
	)
	sb := make([]byte, 1024)
	if _, err := disk.ReadAt(sb, superblock); err != nil {
		return err
	}
	field := func(offset int) uint32 { return binary.LittleEndian.Uint32(sb[offset:]) }
	shift := 10 + field(logSize)
	if shift > 16 {
		return ErrInvalid
	}
	blocks := uint64(bytes) >> shift
	if blocks <= uint64(field(high))<<32|uint64(field(low)) {
		return nil
	}
	err := ioctl(root, ext4Resize, unsafe.Pointer(&blocks))
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (it takes CAP_SYS_RESOURCE)", err)
	}
	return err
}

func growXFS(_, root *os.File, bytes int64) error {
	var geometry [xfsGeomBytes]byte
	if err := ioctl(root, xfsGeometry, unsafe.Pointer(&geometry)); err != nil {
		return err
	}
	field := func(offset int) uint32 { return binary.NativeEndian.Uint32(geometry[offset:]) }
	blockSize, maxPercent := field(0), field(28)
	if blockSize == 0 {
		return ErrInvalid
	}
	request := struct {
		blocks     uint64
		maxPercent uint32
		_          uint32
	}{uint64(bytes) / uint64(blockSize), maxPercent, 0}
	if have := binary.NativeEndian.Uint64(geometry[40:]); request.blocks <= have {
		return nil
	}
	return ioctl(root, xfsGrowData, unsafe.Pointer(&request))
}

// WaitSize makes the kernel look at the size of a disk again, and waits until it is at least bytes.
func WaitSize(ctx context.Context, device string, bytes int64) error {
	rescan := filepath.Join("/sys/block", filepath.Base(device), "device", "rescan")
	for {
		if err := os.WriteFile(rescan, []byte("1"), 0); err != nil {
			return fmt.Errorf("looking at the size of %s: %w", device, err)
		}
		f, err := os.Open(device)
		if err != nil {
			return fmt.Errorf("looking at the size of %s: %w", device, err)
		}
		n, err := size(f)
		_ = f.Close()
		if err != nil || n >= bytes {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s has %d bytes instead of %d: %w", device, n, bytes, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
