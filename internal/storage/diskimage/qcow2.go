package diskimage

import (
	"encoding/binary"
	"fmt"
)

// Parts of a qcow2 header that matter here. The format is QEMU's docs/interop/qcow2.txt.
const (
	qcowDirty    = 1 << 0
	qcowCorrupt  = 1 << 1
	qcowDataFile = 1 << 2
	qcowZstd     = 1 << 3
	qcowExtL2    = 1 << 4

	qcowExtEnd      = 0
	qcowExtCrypto   = 0x0537be77
	qcowExtDataFile = 0x44415441

	qcowMaxL1 = 32 << 20 / 8
)

// qcow2 reads an image of version 2 or 3, of any cluster size.
func (f file) qcow2() (Info, error) {
	b, err := f.full(0, 72)
	if err != nil {
		return Info{}, err
	}
	be := binary.BigEndian
	version, clusterBits := be.Uint32(b[4:]), be.Uint32(b[20:])
	size, l1Size, l1At := be.Uint64(b[24:]), be.Uint32(b[36:]), be.Uint64(b[40:])
	switch {
	case version != 2 && version != 3:
		return Info{}, fmt.Errorf("%w: qcow2 of version %d; convert it: qemu-img convert -O qcow2", ErrUnsupported, version)
	case be.Uint64(b[8:]) != 0:
		return Info{}, fmt.Errorf("%w: it has a backing file; make it whole: qemu-img convert -O qcow2", ErrReference)
	case be.Uint32(b[32:]) != 0:
		return Info{}, fmt.Errorf("%w: it is encrypted; decrypt it first, and have volumes encrypted by an EncryptionClass", ErrUnsupported)
	case clusterBits < 9 || clusterBits > 21:
		return Info{}, damaged("clusters of 2^%d bytes", clusterBits)
	case size == 0 || size > MaxSize:
		return Info{}, fmt.Errorf("%w: the disk has %d bytes; from 1 to %d can be imported", ErrUnsupported, size, int64(MaxSize))
	case l1Size > qcowMaxL1 || l1At%(1<<clusterBits) != 0 || l1At > uint64(f.size) || l1At+uint64(l1Size)*8 > uint64(f.size):
		return Info{}, damaged("its table is at %d and has %d entries, and the file has %d bytes", l1At, l1Size, f.size)
	case be.Uint32(b[60:]) > 1<<16:
		return Info{}, damaged("%d internal snapshots", be.Uint32(b[60:]))
	}
	if version == 3 {
		if err := f.qcow2Version3(1 << clusterBits); err != nil {
			return Info{}, err
		}
	}
	return Info{Format: QCOW2, Size: int64(size+sector-1) / sector * sector}, nil
}

// qcow2Version3 reads what version 3 added: features and extensions.
func (f file) qcow2Version3(cluster int) error {
	b, err := f.full(0, 104)
	if err != nil {
		return err
	}
	be := binary.BigEndian
	features, length := be.Uint64(b[72:]), be.Uint32(b[100:])
	switch {
	case features&qcowDataFile != 0:
		return fmt.Errorf("%w: its data are in another file; make it whole: qemu-img convert -O qcow2", ErrReference)
	case features&qcowCorrupt != 0:
		return damaged("QEMU has marked it as corrupt; try qemu-img check -r all on a copy")
	case features&^(qcowDirty|qcowZstd|qcowExtL2) != 0:
		return fmt.Errorf("%w: unknown features %#x", ErrUnsupported, features)
	case length < 104 || length > 4096 || length%8 != 0:
		return damaged("a header of %d bytes", length)
	}
	ext := f.read(int64(length), max(cluster, 4096)-int(length))
	for len(ext) >= 8 {
		kind, size := be.Uint32(ext), uint64(be.Uint32(ext[4:]))
		ext = ext[8:]
		switch {
		case kind == qcowExtEnd:
			return nil
		case size > uint64(len(ext)):
			return damaged("a header extension of %d bytes", size)
		case kind == qcowExtDataFile:
			return fmt.Errorf("%w: its data are in another file; make it whole: qemu-img convert -O qcow2", ErrReference)
		case kind == qcowExtCrypto:
			return fmt.Errorf("%w: it is encrypted; decrypt it first", ErrUnsupported)
		}
		ext = ext[min(uint64(len(ext)), (size+7)&^7):]
	}
	return nil
}
