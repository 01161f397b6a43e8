package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// Image is an empty image to write.
type Image struct {
	// Size is the virtual size in bytes, a multiple of 512.
	Size int64
	// Backing and BackingFormat are noted in the header for people who have nothing but the file.
	Backing, BackingFormat string
	// LUKS is the LUKS header of an encrypted image.
	LUKS []byte
}

// sizeOffset is where the header holds the virtual size.
const sizeOffset = 24

// Write makes f, an empty file, this image. It does not sync.
//
// The file is, in clusters: header, refcount table, refcount block, LUKS header, L1 table. The L1 table is
// a whole number of clusters, so that most images can grow by one write (Grow).
func (i Image) Write(f *os.File) error {
	l1Clusters := max(1, (i.Size+l1Coverage*l1Entries-1)/(l1Coverage*l1Entries))
	if i.Size <= 0 || i.Size%512 != 0 || l1Clusters*l1Entries > maxL1 {
		return fmt.Errorf("%w: size %d", ErrFormat, i.Size)
	}
	luksClusters := (int64(len(i.LUKS)) + ClusterSize - 1) / ClusterSize
	l1At := 3 + luksClusters
	used := l1At + l1Clusters

	header, err := i.header(l1At, l1Clusters)
	if err != nil {
		return err
	}
	table := binary.BigEndian.AppendUint64(nil, 2*ClusterSize)
	block := make([]byte, 0, 2*used)
	for range used {
		block = binary.BigEndian.AppendUint16(block, 1)
	}
	for _, part := range []struct {
		data []byte
		at   int64
	}{{i.LUKS, 3}, {block, 2}, {table, 1}, {header, 0}} {
		if _, err := f.WriteAt(part.data, part.at*ClusterSize); err != nil {
			return fmt.Errorf("writing a qcow2 image: %w", err)
		}
	}
	if err := f.Truncate(used * ClusterSize); err != nil {
		return fmt.Errorf("writing a qcow2 image: %w", err)
	}
	return nil
}

// header returns the header with its extensions and the backing file name.
func (i Image) header(l1At, l1Clusters int64) ([]byte, error) {
	h := raw{
		Magic: magic, Version: 3, ClusterBits: clusterBits, Size: uint64(i.Size),
		L1Size: uint32(l1Clusters * l1Entries), L1Offset: uint64(l1At) * ClusterSize,
		RefTableOffset: ClusterSize, RefTableClusters: 1, RefcountOrder: 4, HeaderLength: headerSize,
	}
	var ext []byte
	add := func(kind uint32, data []byte) {
		ext = binary.BigEndian.AppendUint32(ext, kind)
		ext = binary.BigEndian.AppendUint32(ext, uint32(len(data)))
		ext = append(ext, data...)
		ext = append(ext, make([]byte, -len(data)&7)...)
	}
	if i.Backing != "" {
		add(extBackingFormat, []byte(i.BackingFormat))
	}
	if len(i.LUKS) > 0 {
		h.Crypt = cryptLUKS
		place := binary.BigEndian.AppendUint64(nil, 3*ClusterSize)
		add(extCrypto, binary.BigEndian.AppendUint64(place, uint64(len(i.LUKS))))
	}
	add(extEnd, nil)
	if i.Backing != "" {
		h.BackingOffset, h.BackingSize = uint64(headerSize+len(ext)), uint32(len(i.Backing))
	}
	out, err := binary.Append(nil, binary.BigEndian, &h)
	if err != nil {
		return nil, fmt.Errorf("writing a qcow2 header: %w", err)
	}
	return append(append(out, ext...), i.Backing...), nil
}

// Grow makes the virtual size of an image larger. It reports false, and does nothing, when the image needs
// a larger L1 table for that; QEMU can do it then. The image must not be open elsewhere.
func Grow(f interface {
	io.ReaderAt
	io.WriterAt
}, size int64,
) (bool, error) {
	h, err := Read(f)
	if err != nil {
		return false, err
	}
	if size < h.Size {
		return false, fmt.Errorf("%w: size %d, was %d", ErrFormat, size, h.Size)
	}
	if size > h.l1*l1Coverage {
		return false, nil
	}
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, uint64(size)), sizeOffset); err != nil {
		return false, fmt.Errorf("growing a qcow2 image: %w", err)
	}
	return true, nil
}

// SetBacking replaces the name of the layer below by one of the same length, and its format. Both are in
// the first 4 KiB of the file, which are written at once.
func SetBacking(f interface {
	io.ReaderAt
	io.WriterAt
}, name, format string,
) error {
	h, err := Read(f)
	if err != nil {
		return err
	}
	page := make([]byte, 4096)
	if _, err := f.ReadAt(page, 0); err != nil {
		return fmt.Errorf("reading a qcow2 header: %w", err)
	}
	at := int64(binary.BigEndian.Uint64(page[8:]))
	ext := int64(binary.BigEndian.Uint32(page[100:]))
	for ext+8 <= int64(len(page)) && binary.BigEndian.Uint32(page[ext:]) != extBackingFormat && binary.BigEndian.Uint32(page[ext:]) != extEnd {
		ext += 8 + (int64(binary.BigEndian.Uint32(page[ext+4:]))+7)&^7
	}
	if len(h.Backing) != len(name) || at+int64(len(name)) > int64(len(page)) || ext+16 > int64(len(page)) ||
		len(h.BackingFormat) == 0 || len(h.BackingFormat) > 8 || len(format) == 0 || len(format) > 8 {
		return fmt.Errorf("%w: backing file %.100q cannot become %q", ErrFormat, h.Backing, name)
	}
	copy(page[at:], name)
	binary.BigEndian.PutUint32(page[ext+4:], uint32(len(format)))
	clear(page[ext+8 : ext+16])
	copy(page[ext+8:], format)
	if _, err := f.WriteAt(page, 0); err != nil {
		return fmt.Errorf("renaming the backing file of a qcow2 image: %w", err)
	}
	return nil
}

// Room is what a full image of this size takes in a file, in bytes: data, tables that map them, and
// reference counts.
func Room(size int64, luks int) int64 {
	data := (size + ClusterSize - 1) / ClusterSize
	clusters := 4 + data + (data+l1Entries-1)/l1Entries + int64(luks+ClusterSize-1)/ClusterSize
	clusters += (size + l1Coverage*l1Entries - 1) / (l1Coverage * l1Entries)
	return (clusters + clusters/(ClusterSize/2) + 2) * ClusterSize
}
