package diskimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// qcow2Header is a sound header of an image of 1 GiB, changed by f.
func qcow2Header(version uint32, f func(b []byte)) []byte {
	b := make([]byte, 4<<16)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], version)
	be.PutUint32(b[20:], 16)
	be.PutUint64(b[24:], 1<<30)
	be.PutUint32(b[36:], 2)
	be.PutUint64(b[40:], 3<<16)
	be.PutUint32(b[100:], 104)
	f(b)
	return b
}

// vmdkHeader is a sound monolithicSparse VMDK of 1 GiB with this descriptor.
func vmdkHeader(descriptor string, f func(b []byte)) []byte {
	b := make([]byte, 64<<10)
	le := binary.LittleEndian
	copy(b, "KDMV")
	le.PutUint32(b[4:], 1)
	le.PutUint64(b[12:], 1<<21)
	le.PutUint64(b[20:], 128)
	le.PutUint64(b[28:], 1)
	le.PutUint64(b[36:], 20)
	le.PutUint64(b[56:], 26)
	copy(b[512:], descriptor)
	f(b)
	return b
}

const vmdkText = `# Disk DescriptorFile
version=1
CID=4b7dbdf2
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW 2097152 SPARSE "x.vmdk"
`

// vhdFooter is a sound fixed VHD of 1 MiB.
func vhdFooter(f func(b []byte)) []byte {
	out := make([]byte, 1<<20+512)
	b := out[1<<20:]
	be := binary.BigEndian
	copy(b, "conectix")
	be.PutUint64(b[40:], 1<<20)
	be.PutUint64(b[48:], 1<<20)
	be.PutUint32(b[60:], 2)
	f(b)
	be.PutUint32(b[64:], vhdChecksum(b))
	return out
}

// gpt is the beginning of a disk of so many sectors, whose table says there are others.
func gpt(sectors, says uint64) []byte {
	b := make([]byte, sectors*512)
	b[510], b[511] = 0x55, 0xaa
	copy(b[512:], "EFI PART")
	binary.LittleEndian.PutUint64(b[512+32:], says-1)
	return b
}

func mbr(sectors, start, count int) []byte {
	b := make([]byte, sectors*512)
	b[510], b[511] = 0x55, 0xaa
	b[446], b[450] = 0x80, 0x83
	binary.LittleEndian.PutUint32(b[454:], uint32(start))
	binary.LittleEndian.PutUint32(b[458:], uint32(count))
	return b
}

func iso(blocks, says int) []byte {
	b := make([]byte, blocks*2048)
	copy(b[32769:], "CD001")
	binary.LittleEndian.PutUint32(b[32768+80:], uint32(says))
	binary.LittleEndian.PutUint16(b[32768+128:], 2048)
	return b
}

func nothing([]byte) {}

func TestDetect(t *testing.T) {
	put32 := func(at int, v uint32) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint32(b[at:], v) }
	}
	put64 := func(at int, v uint64) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint64(b[at:], v) }
	}
	for name, c := range map[string]struct {
		image  []byte
		format Format
		size   int64
		err    error
		text   string
	}{
		"qcow2":              {qcow2Header(3, nothing), QCOW2, 1 << 30, nil, ""},
		"qcow2 of version 2": {qcow2Header(2, nothing), QCOW2, 1 << 30, nil, ""},
		"qcow2 zstd":         {qcow2Header(3, put64(72, qcowZstd|qcowExtL2|qcowDirty)), QCOW2, 1 << 30, nil, ""},
		"backing":            {qcow2Header(3, put64(8, 1000)), "", 0, ErrReference, "backing file"},
		"data file":          {qcow2Header(3, put64(72, qcowDataFile)), "", 0, ErrReference, "another file"},
		"data file ext":      {qcow2Header(3, func(b []byte) { put32(104, qcowExtDataFile)(b); put32(108, 8)(b) }), "", 0, ErrReference, "another file"},
		"corrupt bit":        {qcow2Header(3, put64(72, qcowCorrupt)), "", 0, ErrDamaged, "marked"},
		"unknown feature":    {qcow2Header(3, put64(72, 1<<40)), "", 0, ErrUnsupported, "unknown features"},
		"encrypted":          {qcow2Header(3, put32(32, 2)), "", 0, ErrUnsupported, "encrypted"},
		"cluster bits":       {qcow2Header(3, put32(20, 40)), "", 0, ErrDamaged, "clusters"},
		"table beyond":       {qcow2Header(3, put64(40, 1<<40)), "", 0, ErrDamaged, "table"},
		"huge":               {qcow2Header(3, put64(24, 1<<60)), "", 0, ErrUnsupported, "can be imported"},
		"truncated header":   {qcow2Header(3, nothing)[:60], "", 0, ErrDamaged, "within its header"},
		"version 9":          {qcow2Header(9, nothing), "", 0, ErrUnsupported, "version 9"},

		"vmdk":          {vmdkHeader(vmdkText, nothing), VMDK, 1 << 30, nil, ""},
		"vmdk parent":   {vmdkHeader(strings.Replace(vmdkText, "parentCID=ffffffff", "parentCID=01020304", 1), nothing), "", 0, ErrReference, "delta"},
		"vmdk hint":     {vmdkHeader(vmdkText+"parentFileNameHint=\"/etc/passwd\"\n", nothing), "", 0, ErrReference, "delta"},
		"vmdk flat":     {vmdkHeader(strings.Replace(vmdkText, "SPARSE", "FLAT", 1), nothing), "", 0, ErrReference, "FLAT"},
		"vmdk extents":  {vmdkHeader(vmdkText+"RW 5 SPARSE \"y\"\n", nothing), "", 0, ErrReference, "several"},
		"vmdk type":     {vmdkHeader(strings.Replace(vmdkText, "monolithicSparse", "twoGbMaxExtentSparse", 1), nothing), "", 0, ErrUnsupported, "twoGb"},
		"vmdk capacity": {vmdkHeader(vmdkText, func(b []byte) { clear(b[12:20]) }), "", 0, ErrReference, "capacity"},
		"vmdk stream":   {vmdkHeader(vmdkText, func(b []byte) { binary.LittleEndian.PutUint64(b[56:], 1<<64-1) }), "", 0, ErrDamaged, "no end"},
		"vmdk text":     {[]byte(vmdkText), "", 0, ErrUnsupported, "descriptor"},

		"vhd":       {vhdFooter(nothing), VHD, 1 << 20, nil, ""},
		"vhd delta": {vhdFooter(func(b []byte) { binary.BigEndian.PutUint32(b[60:], 4) }), "", 0, ErrReference, "delta"},
		"vhd short": {vhdFooter(func(b []byte) { binary.BigEndian.PutUint64(b[48:], 2<<20) }), "", 0, ErrDamaged, "of 2097152"},
		"vhd bad":   {append(vhdFooter(nothing)[:1<<20+100], bytes.Repeat([]byte{1}, 412)...), "", 0, ErrDamaged, "checksum"},

		"iso":           {iso(100, 100), ISO, 100 * 2048, nil, ""},
		"iso truncated": {iso(50, 100), "", 0, ErrDamaged, "ISO"},
		"gpt":           {gpt(2048, 2048), Raw, 1 << 20, nil, ""},
		"gpt truncated": {gpt(1024, 2048), "", 0, ErrDamaged, "2048"},
		"mbr":           {mbr(2048, 1, 2047), Raw, 1 << 20, nil, ""},
		"mbr truncated": {mbr(1024, 1, 2047), "", 0, ErrDamaged, "partition 1"},
		"no mark":       {bytes.Repeat([]byte("x"), 4096), "", 0, ErrUnknown, ".raw"},
		"empty":         {nil, "", 0, ErrDamaged, "empty"},
		"html":          {[]byte("<!DOCTYPE html><html>"), "", 0, ErrUnsupported, "HTML"},
		"luks":          {append([]byte("LUKS\xba\xbe"), make([]byte, 1000)...), "", 0, ErrUnsupported, "LUKS"},
	} {
		info, err := Detect(bytes.NewReader(c.image), int64(len(c.image)), false)
		if !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if info.Format != c.format || info.Size != c.size {
			t.Errorf("%s: %+v", name, info)
		}
	}
	if info, err := Detect(bytes.NewReader(make([]byte, 1000)), 1000, true); err != nil || info.Format != Raw || info.Size != 1024 {
		t.Errorf("any raw: %+v, %v", info, err)
	}
}

func FuzzDetect(f *testing.F) {
	f.Add(qcow2Header(3, nothing)[:1024])
	f.Add(vmdkHeader(vmdkText, nothing)[:2048])
	f.Add(vhdFooter(nothing)[1<<20-512:])
	f.Add(gpt(64, 64))
	f.Add(iso(18, 18))
	f.Add(append([]byte("vhdxfile"), make([]byte, 300<<10)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := Detect(bytes.NewReader(b), int64(len(b)), true)
		if err != nil {
			for _, known := range []error{ErrUnknown, ErrDamaged, ErrReference, ErrUnsupported} {
				if errors.Is(err, known) {
					return
				}
			}
			t.Fatal(err)
		}
		if info.Size <= 0 || info.Size > MaxSize || info.Size%512 != 0 || info.Format == "" {
			t.Fatalf("%+v", info)
		}
		Packed(b)
	})
}
