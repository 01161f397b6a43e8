package diskimage

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
)

// Bounds of a VMDK. The format is VMware's "Virtual Disk Format 5.0".
const (
	maxDescriptor = 1 << 20
	maxGrain      = 1 << 11 // sectors: 1 MiB
)

// vmdk reads a VMDK that is one file: monolithicSparse or streamOptimized.
func (f file) vmdk() (Info, error) {
	b, err := f.full(0, sector)
	if err != nil {
		return Info{}, err
	}
	le := binary.LittleEndian
	version, capacity, grain := le.Uint32(b[4:]), le.Uint64(b[12:]), le.Uint64(b[20:])
	descriptorAt, descriptorSize := le.Uint64(b[28:]), le.Uint64(b[36:])
	switch {
	case version == 0 || version > 3:
		return Info{}, fmt.Errorf("%w: VMDK of version %d", ErrUnsupported, version)
	case capacity == 0: // to QEMU the rest is a list of further files then
		return Info{}, fmt.Errorf("%w: the VMDK has no capacity of its own", ErrReference)
	case capacity > MaxSize/sector:
		return Info{}, fmt.Errorf("%w: the disk has %d sectors; up to %d bytes can be imported", ErrUnsupported, capacity, int64(MaxSize))
	case grain == 0 || grain > maxGrain || grain&(grain-1) != 0:
		return Info{}, damaged("grains of %d sectors", grain)
	case descriptorAt == 0 || descriptorSize == 0:
		return Info{}, fmt.Errorf("%w: the VMDK is one of several files (it has no descriptor); make one file of it: "+
			"qemu-img convert -O vmdk -o subformat=streamOptimized", ErrReference)
	case descriptorAt > uint64(f.size)/sector || descriptorSize > maxDescriptor/sector:
		return Info{}, damaged("its descriptor of %d sectors is at sector %d", descriptorSize, descriptorAt)
	}
	text, err := f.full(int64(descriptorAt)*sector, int(descriptorSize)*sector)
	if err != nil {
		return Info{}, err
	}
	subformat, err := vmdkDescriptor(text, capacity)
	if err != nil {
		return Info{}, err
	}
	if gd := le.Uint64(b[56:]); gd == math.MaxUint64 { // a stream: the table is at the end
		if footer := f.read(f.size-2*sector, sector); !hasMagic(footer, "KDMV") {
			return Info{}, damaged("the VMDK stream has no end; was the transfer interrupted?")
		} else if le.Uint64(footer[12:]) != capacity || le.Uint64(footer[56:]) > uint64(f.size)/sector {
			return Info{}, damaged("the VMDK stream's end says something else than its beginning")
		}
	} else if gd > uint64(f.size)/sector {
		return Info{}, damaged("its table is at sector %d, and the file has %d", gd, f.size/sector)
	}
	return Info{Format: VMDK, Subformat: subformat, Size: int64(capacity) * sector}, nil
}

// vmdkDescriptor reads the text within a VMDK, which must name one extent, the file itself, and no parent.
func vmdkDescriptor(text []byte, capacity uint64) (string, error) {
	text, _, _ = bytes.Cut(text, []byte{0})
	setting := regexp.MustCompile(`(?i)^\s*([a-z0-9_.]+)\s*=\s*"?([^"]*)"?\s*$`)
	extent := regexp.MustCompile(`^(RW|RDONLY|NOACCESS)\s+(\d+)\s+(\S+)(\s.*)?$`)
	createType, extents := "", 0
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if m := extent.FindStringSubmatch(line); m != nil {
			extents++
			sectors, err := strconv.ParseUint(m[2], 10, 63)
			switch {
			case m[3] != "SPARSE" || m[1] != "RW":
				return "", fmt.Errorf("%w: the VMDK has an extent of type %.20q", ErrReference, m[3])
			case extents > 1:
				return "", fmt.Errorf("%w: the VMDK has several extents; make one file of it: qemu-img convert -O vmdk -o subformat=streamOptimized", ErrReference)
			case err != nil || sectors > capacity:
				return "", damaged("an extent of %.30s sectors in a disk of %d", m[2], capacity)
			}
			continue
		}
		m := setting.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		switch key, value := strings.ToLower(m[1]), strings.TrimSpace(m[2]); {
		case key == "createtype":
			createType = value
		case key == "parentcid" && !strings.EqualFold(value, "ffffffff"), key == "parentfilenamehint":
			return "", fmt.Errorf("%w: the VMDK is a delta of another disk; export the virtual machine without snapshots", ErrReference)
		}
	}
	if createType != "monolithicSparse" && createType != "streamOptimized" {
		return "", fmt.Errorf("%w: a VMDK of type %.40q; monolithicSparse and streamOptimized can be imported", ErrUnsupported, createType)
	}
	if extents != 1 {
		return "", damaged("the VMDK's descriptor has no extent")
	}
	return createType, nil
}
