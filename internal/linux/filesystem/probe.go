// Package filesystem looks after the file systems of persistent volumes, in guests and for pods of the host: it
// tells what is on a disk, writes a new file system that package mkfs has made, mounts, grows and unmounts it,
// and gives it to a group.
//
// A disk is formatted only when it is blank, which is when nothing but zeros is where any file system,
// partition table or volume manager has its mark, or when an earlier formatting was cut short, which leaves a
// mark of its own. Everything else is left as it is. Guest init's service and the CSI node service call the
// package; it knows devices and directories but no protocol and no container.
//
// What can go wrong: a disk holds something else than was asked for (ErrForeign), the disk fails, containers
// keep a file system busy. What is on a disk may be hostile: the kernel reads it; here only a few fixed
// bytes are looked at.
package filesystem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The file systems that volumes can have.
const (
	Ext4 = "ext4"
	XFS  = "xfs"
)

var (
	// ErrForeign is wrapped when a disk holds something else than the file system that was asked for.
	ErrForeign = errors.New("disk holds something else")
	// ErrInvalid is wrapped when a request makes no sense.
	ErrInvalid = errors.New("invalid")
)

// edge is how much of both ends of a disk is looked at: all usual marks are in there.
const edge = 1 << 20

// unfinished is at the start of a disk while a file system is written on it.
const unfinished = "atoll: this disk is being formatted\n"

// Content is what is on a disk.
type Content struct {
	Blank  bool
	Begun  bool   // formatting was cut short; Blank as well
	FSType string // "" for what is not known
	Bytes  int64  // of the disk
}

// Probe looks at a disk.
func Probe(device string) (Content, error) {
	f, err := os.Open(device)
	if err != nil {
		return Content{}, fmt.Errorf("looking at disk: %w", err)
	}
	defer f.Close()
	var c Content
	if c.Bytes, err = size(f); err != nil {
		return c, fmt.Errorf("looking at disk: %w", err)
	}
	// What a file system of ours begins with, and in most cases all there is to read.
	head := make([]byte, min(headBytes, c.Bytes))
	if _, err := f.ReadAt(head, 0); err != nil {
		return c, fmt.Errorf("looking at disk: %w", err)
	}
	switch {
	case bytes.HasPrefix(head, []byte(unfinished)):
		c.Blank, c.Begun = true, true
		return c, nil
	case !zero(head):
		c.FSType = known(head)
		return c, nil
	}
	end := make([]byte, min(edge, c.Bytes))
	for _, at := range []int64{0, c.Bytes - int64(len(end))} {
		if _, err := f.ReadAt(end, at); err != nil {
			return c, fmt.Errorf("looking at disk: %w", err)
		}
		if !zero(end) {
			return c, nil
		}
	}
	c.Blank = true
	return c, nil
}

// known tells the file systems that volumes have by their magic numbers.
func known(head []byte) string {
	const superblock, magic = 1024, 56 // of ext4
	switch {
	case len(head) >= superblock+magic+2 && binary.LittleEndian.Uint16(head[superblock+magic:]) == 0xef53:
		return Ext4
	case bytes.HasPrefix(head, []byte("XFSB")):
		return XFS
	}
	return ""
}

func zero(b []byte) bool {
	const chunk = 4096
	var zeros [chunk]byte
	for len(b) > chunk {
		if !bytes.Equal(b[:chunk], zeros[:]) {
			return false
		}
		b = b[chunk:]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

// size is that of a block device.
func size(f *os.File) (int64, error) {
	var n uint64
	if err := ioctl(f, unix.BLKGETSIZE64, unsafe.Pointer(&n)); err != nil {
		return 0, fmt.Errorf("reading the size of %s: %w", f.Name(), err)
	}
	return int64(n), nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
