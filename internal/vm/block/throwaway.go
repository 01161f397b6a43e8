package block

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Numbers of an empty qcow2 image of version 3, see docs/interop/qcow2.txt of QEMU.
const (
	clusterBits   = 16
	cluster       = 1 << clusterBits
	refcountTable = 1 // cluster numbers
	refcountBlock = 2
	firstL1       = 3
	headerLength  = 104
	l2Entries     = cluster / 8
)

// ThrowAway makes a layer for what is written to a volume that is not to change: an unnamed file in dir, which is gone
// when QEMU has ended.
func ThrowAway(dir string, v Volume) (Layer, error) {
	const doing = "making a file for the changes of a non-persistent disk"
	size, err := volumeSize(v)
	if err != nil {
		return Layer{}, fmt.Errorf("%s: %w", doing, err)
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return Layer{}, fmt.Errorf("%s in %s: %w", doing, dir, err)
	}
	f := os.NewFile(uintptr(fd), "changes")
	if err := writeQCOW2(f, size); err != nil {
		return Layer{}, errors.Join(fmt.Errorf("%s: %w", doing, err), f.Close())
	}
	return Layer{Format: QCOW2, File: f}, nil
}

// volumeSize reads the size of a volume out of its top layer.
func volumeSize(v Volume) (int64, error) {
	top := v.Layers[len(v.Layers)-1]
	switch {
	case top.RBD != nil:
		return 0, fmt.Errorf("%w: a disk whose top layer is in Ceph cannot be non-persistent", ErrImage)
	case top.Format == QCOW2:
		head := make([]byte, 32)
		if _, err := top.File.ReadAt(head, 0); err != nil {
			return 0, fmt.Errorf("reading the qcow2 header: %w", err)
		}
		return int64(binary.BigEndian.Uint64(head[24:])), nil
	case top.Key != nil:
		return 0, fmt.Errorf("%w: an encrypted raw disk cannot be non-persistent", ErrImage)
	}
	size, err := top.File.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, fmt.Errorf("reading the size of a disk: %w", err)
	}
	return size, nil
}

// writeQCOW2 writes an empty image.
func writeQCOW2(f *os.File, size int64) error {
	if size <= 0 || size > 1<<50 {
		return fmt.Errorf("%w: a disk of %d bytes", ErrImage, size)
	}
	l1 := (size + cluster*l2Entries - 1) / (cluster * l2Entries)
	clusters := firstL1 + (l1*8+cluster-1)/cluster
	if clusters > cluster/2 {
		return fmt.Errorf("%w: a disk of %d bytes is too large", ErrImage, size)
	}
	b := binary.BigEndian
	header := make([]byte, headerLength)
	copy(header, "QFI\xfb")
	b.PutUint32(header[4:], 3)
	b.PutUint32(header[20:], clusterBits)
	b.PutUint64(header[24:], uint64(size))
	b.PutUint32(header[36:], uint32(l1))
	b.PutUint64(header[40:], firstL1*cluster)
	b.PutUint64(header[48:], refcountTable*cluster)
	b.PutUint32(header[56:], 1)
	b.PutUint32(header[96:], 4) // 16 bit reference counts
	b.PutUint32(header[100:], headerLength)
	table := b.AppendUint64(nil, refcountBlock*cluster)
	counts := make([]byte, 0, 2*clusters)
	for range clusters {
		counts = b.AppendUint16(counts, 1)
	}
	for at, data := range map[int64][]byte{0: header, refcountTable * cluster: table, refcountBlock * cluster: counts} {
		if _, err := f.WriteAt(data, at); err != nil {
			return fmt.Errorf("writing: %w", err)
		}
	}
	return f.Truncate(clusters * cluster)
}
