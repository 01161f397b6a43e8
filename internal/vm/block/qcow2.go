package block

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Incompatible features of a qcow2 image that are fine: dirty reference counts, a compression type,
// extended L2 entries. See docs/interop/qcow2.txt of QEMU.
const (
	qcow2Dirty       = 1 << 0
	qcow2Corrupt     = 1 << 1
	qcow2DataFile    = 1 << 2
	qcow2Compression = 1 << 3
	qcow2ExtendedL2  = 1 << 4
)

// checkQCOW2 refuses an image that names another file as the place of its data, which QEMU would open, or
// that is no image.
func checkQCOW2(r io.ReaderAt) error {
	header := make([]byte, 80)
	if n, err := r.ReadAt(header, 0); n < len(header) {
		return fmt.Errorf("reading the qcow2 header: %w", err)
	}
	version := binary.BigEndian.Uint32(header[4:])
	if string(header[:4]) != "QFI\xfb" || version < 2 || version > 3 {
		return fmt.Errorf("%w: not a qcow2 image", ErrImage)
	}
	if version == 2 {
		return nil // has no features
	}
	switch features := binary.BigEndian.Uint64(header[72:]); {
	case features&qcow2DataFile != 0:
		return fmt.Errorf("%w: the qcow2 image has its data in another file", ErrImage)
	case features&qcow2Corrupt != 0:
		return fmt.Errorf("%w: the qcow2 image is marked as corrupt", ErrImage)
	case features&^(qcow2Dirty|qcow2Compression|qcow2ExtendedL2) != 0:
		return fmt.Errorf("%w: the qcow2 image has unknown features %#x", ErrImage, features)
	}
	return nil
}
