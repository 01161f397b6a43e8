package diskimage

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// vhd reads a fixed or dynamic VHD. The format is Microsoft's "Virtual Hard Disk Image Format Specification".
func (f file) vhd() (Info, error) {
	b, err := f.full(f.size-sector, sector)
	if err != nil {
		return Info{}, err
	}
	if !hasMagic(b, "conectix") {
		return Info{}, damaged("the VHD has no end; was the transfer interrupted?")
	}
	be := binary.BigEndian
	if want, got := be.Uint32(b[64:]), vhdChecksum(b); want != got {
		return Info{}, damaged("the VHD's end has the checksum %#x, and says %#x", got, want)
	}
	size := be.Uint64(b[48:])
	info := Info{Format: VHD, Size: int64(min(size, MaxSize+1)) / sector * sector}
	switch kind := be.Uint32(b[60:]); kind {
	case 2:
		info.Subformat = "fixed"
		if info.Size > f.size-sector {
			return Info{}, damaged("the VHD has %d bytes of %d", f.size-sector, size)
		}
	case 3:
		info.Subformat = "dynamic"
		if err := f.vhdTable(be.Uint64(b[16:]), size); err != nil {
			return Info{}, err
		}
	case 4:
		return Info{}, fmt.Errorf("%w: the VHD is a delta of another disk; merge it first", ErrReference)
	default:
		return Info{}, fmt.Errorf("%w: VHD of type %d", ErrUnsupported, kind)
	}
	return info, nil
}

// vhdTable looks at the second header of a dynamic VHD.
func (f file) vhdTable(at, size uint64) error {
	if at > uint64(f.size) {
		return damaged("the VHD's header is at %d of %d", at, f.size)
	}
	b, err := f.full(int64(at), 1024)
	if err != nil {
		return err
	}
	be := binary.BigEndian
	table, entries, block := be.Uint64(b[16:]), uint64(be.Uint32(b[28:])), uint64(be.Uint32(b[32:]))
	switch {
	case !hasMagic(b, "cxsparse"):
		return damaged("the VHD has no table")
	case block < sector || block > 256<<20 || block&(block-1) != 0:
		return damaged("blocks of %d bytes", block)
	case entries > 1<<28 || entries*block < size:
		return damaged("a table of %d blocks of %d bytes for %d bytes", entries, block, size)
	case table > uint64(f.size) || table+entries*4 > uint64(f.size):
		return damaged("the VHD's table is at %d of %d", table, f.size)
	}
	return nil
}

// vhdChecksum is the one's complement of the sum of all bytes but those of the checksum.
func vhdChecksum(b []byte) uint32 {
	var sum uint32
	for i, c := range b {
		if i < 64 || i >= 68 {
			sum += uint32(c)
		}
	}
	return ^sum
}

// Bounds and places of a VHDX. The format is Microsoft's [MS-VHDX].
const (
	vhdxRegions    = 192 << 10
	vhdxMaxEntries = 2047
)

// vhdxGUID is a GUID as it is on disk.
func vhdxGUID(text string) []byte {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != 16 {
		panic("diskimage: bad constant " + text)
	}
	for _, swap := range [][2]int{{0, 3}, {1, 2}, {4, 5}, {6, 7}} {
		b[swap[0]], b[swap[1]] = b[swap[1]], b[swap[0]]
	}
	return b
}

// vhdx finds size and parameters in the metadata of a VHDX.
func (f file) vhdx() (Info, error) {
	metadata, length, err := f.vhdxEntry(vhdxRegions, "regi", 16, 8, 32, vhdxGUID("8b7ca20647904b9ab8fe575f050f886e"), 16, 24)
	if err != nil {
		return Info{}, err
	}
	item := func(guid string, size int) ([]byte, error) {
		at, _, err := f.vhdxEntry(metadata, "metadata", 32, 10, 32, vhdxGUID(guid), 16, 20)
		if err != nil {
			return nil, err
		}
		if at < 64<<10 || at > length {
			return nil, damaged("VHDX metadata at %d", at)
		}
		return f.full(metadata+at, size)
	}
	parameters, err := item("caa16737fa364d43b3b633f0aa44e76b", 8)
	if err != nil {
		return Info{}, err
	}
	if binary.LittleEndian.Uint32(parameters[4:])&2 != 0 {
		return Info{}, fmt.Errorf("%w: the VHDX is a delta of another disk; merge it first", ErrReference)
	}
	size, err := item("2fa54224cd1b4876b2115dbed83bf4b8", 8)
	if err != nil {
		return Info{}, err
	}
	return Info{Format: VHDX, Size: int64(min(binary.LittleEndian.Uint64(size), MaxSize+1)) / sector * sector}, nil
}

// vhdxEntry finds an entry by its GUID in a table at some place, whose number of entries is at countAt, and
// returns offset and length that the entry holds. An offset of 8 bytes is followed by a length of 4; one of 4
// bytes likewise.
func (f file) vhdxEntry(table int64, magic string, header, countAt, entry int, guid []byte, offsetAt, lengthAt int) (offset, length int64, err error) {
	b, err := f.full(table, 64<<10)
	if err != nil {
		return 0, 0, err
	}
	if !hasMagic(b, magic) {
		return 0, 0, damaged("the VHDX has no table at %d", table)
	}
	le := binary.LittleEndian
	count := int(le.Uint16(b[countAt:]))
	if count > vhdxMaxEntries || header+count*entry > len(b) {
		return 0, 0, damaged("a VHDX table of %d entries", count)
	}
	for i := range count {
		e := b[header+i*entry:][:entry]
		if !bytes.Equal(e[:16], guid) {
			continue
		}
		var at uint64
		if lengthAt-offsetAt == 8 {
			at = le.Uint64(e[offsetAt:])
		} else {
			at = uint64(le.Uint32(e[offsetAt:]))
		}
		n := int64(le.Uint32(e[lengthAt:]))
		if at > uint64(f.size) {
			return 0, 0, damaged("the VHDX has something at %d of %d bytes", at, f.size)
		}
		return int64(at), n, nil
	}
	return 0, 0, damaged("the VHDX lacks a part")
}
