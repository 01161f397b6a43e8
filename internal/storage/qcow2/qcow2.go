// Package qcow2 writes empty qcow2 images and reads the headers of others.
//
// An empty image or overlay is a header and a few tables; writing them here takes 1 ms and no process, and
// one with LUKS needs no timing of a password hash, which costs qemu-img two seconds each. Headers are read
// to refuse an image that QEMU would follow somewhere: what Header holds is what the file says, to be
// compared with what a record says. Everything else (data, repair, merging) is left to QEMU.
//
// The format is QEMU's docs/interop/qcow2.txt, version 3, without a data file, internal snapshots or
// extended L2 entries. Callers are the storage engines. What can go wrong: the file is not qcow2
// (ErrFormat), it wants something this package does not know (ErrFeature), or it cannot be read or written.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Errors of Read.
var (
	// ErrFormat: not a qcow2 image of version 3, or a damaged header.
	ErrFormat = errors.New("not a sound qcow2 image")
	// ErrFeature: the image has a feature that is never used here: a data file, internal snapshots, a
	// cipher other than LUKS.
	ErrFeature = errors.New("qcow2 image with an unexpected feature")
)

// What the header is made of.
const (
	magic       = 0x514649fb
	headerSize  = 112
	clusterBits = 16
	// ClusterSize is the allocation unit of images that Write makes.
	ClusterSize = 1 << clusterBits

	cryptLUKS = 2

	incompatDirty   = 1 << 0
	incompatCorrupt = 1 << 1

	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extCrypto        = 0x0537be77
	extDataFile      = 0x44415441

	// l1Coverage is what one L1 entry stands for, l1Entries the number of entries in a cluster.
	l1Coverage = ClusterSize / 8 * ClusterSize
	l1Entries  = ClusterSize / 8
	// maxL1 is the largest L1 table QEMU opens, in entries.
	maxL1 = 32 << 20 / 8
)

// Header is what a qcow2 header says.
type Header struct {
	// Size is the virtual size in bytes.
	Size int64
	// Backing and BackingFormat are what the image names as the layer below, or "".
	Backing, BackingFormat string
	// LUKS: the image is encrypted; its LUKS header is at this place of the file.
	LUKS                   bool
	CryptOffset, CryptSize int64
	// Corrupt: QEMU has marked the image as damaged.
	Corrupt bool

	l1 int64 // entries
}

// raw is the fixed part of the header.
type raw struct {
	Magic, Version           uint32
	BackingOffset            uint64
	BackingSize, ClusterBits uint32
	Size                     uint64
	Crypt, L1Size            uint32
	L1Offset, RefTableOffset uint64
	RefTableClusters         uint32
	Snapshots                uint32
	SnapshotsOffset          uint64
	Incompatible             uint64
	Compatible, Autoclear    uint64
	RefcountOrder            uint32
	HeaderLength             uint32
	Compression              uint8
	_                        [7]uint8
}

// Read reads the header of an image. It never reads beyond the first cluster.
func Read(r io.ReaderAt) (Header, error) {
	buf := make([]byte, ClusterSize)
	n, err := r.ReadAt(buf, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Header{}, fmt.Errorf("reading a qcow2 header: %w", err)
	}
	return parse(buf[:n])
}

// parse reads a header from the first cluster of an image.
func parse(b []byte) (Header, error) {
	if len(b) < headerSize {
		return Header{}, fmt.Errorf("%w: %d bytes", ErrFormat, len(b))
	}
	var h raw
	if _, err := binary.Decode(b, binary.BigEndian, &h); err != nil {
		return Header{}, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	switch {
	case h.Magic != magic:
		return Header{}, fmt.Errorf("%w: magic %#x", ErrFormat, h.Magic)
	case h.Version != 3:
		return Header{}, fmt.Errorf("%w: version %d", ErrFormat, h.Version)
	case h.ClusterBits != clusterBits:
		return Header{}, fmt.Errorf("%w: clusters of 2^%d bytes", ErrFeature, h.ClusterBits)
	case h.Incompatible&^(incompatDirty|incompatCorrupt) != 0:
		return Header{}, fmt.Errorf("%w: features %#x", ErrFeature, h.Incompatible)
	case h.Snapshots != 0:
		return Header{}, fmt.Errorf("%w: %d internal snapshots", ErrFeature, h.Snapshots)
	case h.Crypt != 0 && h.Crypt != cryptLUKS:
		return Header{}, fmt.Errorf("%w: cipher %d", ErrFeature, h.Crypt)
	case h.Size > maxL1*l1Coverage || h.Size%512 != 0:
		return Header{}, fmt.Errorf("%w: size %d", ErrFormat, h.Size)
	case h.HeaderLength < 104 || h.HeaderLength > 4096 || h.HeaderLength%8 != 0:
		return Header{}, fmt.Errorf("%w: header of %d bytes", ErrFormat, h.HeaderLength)
	case h.L1Size > maxL1 || int64(h.L1Size)*l1Coverage < int64(h.Size):
		return Header{}, fmt.Errorf("%w: L1 table of %d entries for %d bytes", ErrFormat, h.L1Size, h.Size)
	}
	out := Header{
		Size: int64(h.Size), LUKS: h.Crypt == cryptLUKS, l1: int64(h.L1Size),
		Corrupt: h.Incompatible&incompatCorrupt != 0,
	}
	if err := out.extensions(b[min(int(h.HeaderLength), len(b)):]); err != nil {
		return Header{}, err
	}
	if h.BackingOffset != 0 {
		if h.BackingSize == 0 || h.BackingSize > 1023 || h.BackingOffset > uint64(len(b))-uint64(h.BackingSize) || h.BackingOffset > uint64(len(b)) {
			return Header{}, fmt.Errorf("%w: backing file name at %d", ErrFormat, h.BackingOffset)
		}
		out.Backing = string(b[h.BackingOffset : h.BackingOffset+uint64(h.BackingSize)])
	}
	if out.LUKS != (out.CryptOffset != 0) {
		return Header{}, fmt.Errorf("%w: encryption without a place for it", ErrFormat)
	}
	return out, nil
}

// extensions reads the list of header extensions.
func (h *Header) extensions(b []byte) error {
	for len(b) >= 8 {
		kind, size := binary.BigEndian.Uint32(b), int64(binary.BigEndian.Uint32(b[4:]))
		if kind == extEnd {
			return nil
		}
		b = b[8:]
		if size > int64(len(b)) {
			return fmt.Errorf("%w: extension %#x of %d bytes", ErrFormat, kind, size)
		}
		data := b[:size]
		switch kind {
		case extBackingFormat:
			h.BackingFormat = string(data)
		case extCrypto:
			if size != 16 {
				return fmt.Errorf("%w: encryption extension of %d bytes", ErrFormat, size)
			}
			offset, length := binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[8:])
			if offset == 0 || offset%ClusterSize != 0 || offset > 1<<40 || length == 0 || length > 64<<20 {
				return fmt.Errorf("%w: LUKS header at %d, %d bytes", ErrFormat, offset, length)
			}
			h.CryptOffset, h.CryptSize = int64(offset), int64(length)
		case extDataFile:
			return fmt.Errorf("%w: data file %.100q", ErrFeature, data)
		case extFeatureNames, extBitmaps:
		default:
			return fmt.Errorf("%w: extension %#x", ErrFeature, kind)
		}
		b = b[min(int64(len(b)), (size+7)&^7):]
	}
	return nil
}
