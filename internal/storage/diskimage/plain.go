package diskimage

import (
	"encoding/binary"
	"fmt"
)

// plain reads an ISO or a raw image.
func (f file) plain(anyRaw bool) (Info, error) {
	size := (f.size + sector - 1) / sector * sector
	if b := f.read(32<<10, 2048); len(b) == 2048 && string(b[1:6]) == "CD001" {
		le := binary.LittleEndian
		blocks, block := int64(le.Uint32(b[80:])), int64(le.Uint16(b[128:]))
		if block == 0 || blocks*block > f.size {
			return Info{}, damaged("the ISO has %d bytes of %d", f.size, blocks*block)
		}
		boot := f.read(34<<10, 64)
		return Info{Format: ISO, Size: size, Bootable: len(boot) == 64 && string(boot[1:6]) == "CD001" && hasMagic(boot[7:], "EL TORITO")}, nil
	}
	head := f.read(0, 2*sector)
	info := Info{Format: Raw, Size: size}
	if len(head) == 2*sector && head[510] == 0x55 && head[511] == 0xaa {
		info.Bootable = true
		if err := f.partitions(head); err != nil {
			return Info{}, err
		}
	}
	if !info.Bootable && !anyRaw {
		return Info{}, fmt.Errorf("%w: it begins with %q; a raw disk without a partition table is taken if the file's name ends in .raw or .img",
			ErrUnknown, head[:min(8, len(head))])
	}
	return info, nil
}

// partitions looks whether the disk is as long as its partition table says.
func (f file) partitions(head []byte) error {
	le := binary.LittleEndian
	sectors := (f.size + sector - 1) / sector
	if hasMagic(head[sector:], "EFI PART") {
		if last := le.Uint64(head[sector+32:]); last >= uint64(sectors) {
			return damaged("the disk has %d sectors, and its partition table is one of %d", sectors, last+1)
		}
		return nil
	}
	for i := range 4 {
		p := head[446+16*i:][:16]
		start, count := int64(le.Uint32(p[8:])), int64(le.Uint32(p[12:]))
		status := p[0]
		if p[4] == 0 || p[4] == 0xee || status != 0 && status != 0x80 { // not a table after all, but a boot sector
			continue
		}
		if start+count > sectors {
			return damaged("the disk has %d sectors, and its partition %d ends at %d", sectors, i+1, start+count)
		}
	}
	return nil
}

// Packing is how a file is packed.
type Packing string

// What Packed knows.
const (
	Unpacked Packing = ""
	Gzip     Packing = "gzip"
	XZ       Packing = "xz"
	Zstd     Packing = "zstd"
	Tar      Packing = "tar"
)

// Packed tells how a file is packed, by its first 512 bytes.
func Packed(head []byte) Packing {
	switch {
	case hasMagic(head, "\x1f\x8b"):
		return Gzip
	case hasMagic(head, "\xfd7zXZ\x00"):
		return XZ
	case hasMagic(head, "\x28\xb5\x2f\xfd"):
		return Zstd
	case len(head) >= 262 && hasMagic(head[257:], "ustar"):
		return Tar
	}
	return Unpacked
}
