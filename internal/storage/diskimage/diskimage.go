// Package diskimage tells what a disk image of unknown origin is, by its headers alone.
//
// QEMU's own guessing follows whatever a header names. Here the format is one of a fixed list, found by our own
// parsers, and everything that would make QEMU open a second file (backing files, data files, parents, further
// extents) is refused before QEMU sees the image. What comes out is passed to QEMU explicitly.
//
// It reads headers only and never data; whether the data are whole is for `qemu-img check` (package convert) to
// say, and for the checks of ends here. Callers are the library of images and the conversion into datastores.
// What can go wrong is told by the errors below; their texts are for people and say the way out.
package diskimage

import (
	"errors"
	"fmt"
	"io"
)

// Errors of Detect.
var (
	// ErrUnknown: no format of the list.
	ErrUnknown = errors.New("not a disk image of a known format (qcow2, raw, ISO, VMDK, VHD, VHDX)")
	// ErrDamaged: the header makes no sense, or the file ends too early.
	ErrDamaged = errors.New("damaged or truncated image")
	// ErrReference: the image wants other files to be read.
	ErrReference = errors.New("image refers to another file")
	// ErrUnsupported: a sound image with something that cannot be imported.
	ErrUnsupported = errors.New("image cannot be imported")
)

// Format of an image.
type Format string

// The formats.
const (
	QCOW2 Format = "qcow2"
	Raw   Format = "raw"
	ISO   Format = "iso"
	VMDK  Format = "vmdk"
	VHD   Format = "vhd"
	VHDX  Format = "vhdx"
)

// MaxSize is the largest disk that is taken, in bytes: what a datastore takes.
const MaxSize = 64 << 40

const sector = 512

// Info is what a header says.
type Info struct {
	Format Format
	// Subformat is of VMDK ("streamOptimized", "monolithicSparse") and VHD ("fixed", "dynamic").
	Subformat string
	// Size is the virtual size in bytes.
	Size int64
	// Bootable: there is a boot sector, a partition table or a boot record. Only of raw images and ISOs.
	Bootable bool
}

// Driver is the name of QEMU's driver for the format.
func (i Info) Driver() string {
	switch i.Format {
	case VHD:
		return "vpc"
	case ISO:
		return "raw"
	default:
		return string(i.Format)
	}
}

// Node is the image as QEMU's JSON pseudo-protocol takes it: the format said, and nothing below it.
func (i Info) Node(file map[string]any) map[string]any {
	node := map[string]any{"driver": i.Driver(), "file": file, "read-only": true}
	switch i.Format {
	case QCOW2, VMDK:
		node["backing"] = nil
	case VHD: // the header has two sizes, and ours is this one
		node["force_size_calc"] = "current_size"
	}
	return node
}

// Detect tells what an image of that many bytes is. A file without any mark is raw only if anyRaw is set, since
// it might be anything.
func Detect(r io.ReaderAt, bytes int64, anyRaw bool) (Info, error) {
	f := file{r, bytes}
	head := f.read(0, sector)
	var info Info
	var err error
	switch {
	case bytes == 0:
		return Info{}, fmt.Errorf("%w: the file is empty", ErrDamaged)
	case hasMagic(head, "QFI\xfb"):
		info, err = f.qcow2()
	case hasMagic(head, "KDMV"):
		info, err = f.vmdk()
	case hasMagic(head, "vhdxfile"):
		info, err = f.vhdx()
	case hasMagic(head, "conectix"), hasMagic(f.read(bytes-sector, sector), "conectix"):
		info, err = f.vhd()
	default:
		if err := refused(head); err != nil {
			return Info{}, err
		}
		info, err = f.plain(anyRaw)
	}
	if err != nil {
		return Info{}, err
	}
	if info.Size <= 0 || info.Size > MaxSize {
		return Info{}, fmt.Errorf("%w: the disk has %d bytes; from 1 to %d can be imported", ErrUnsupported, info.Size, int64(MaxSize))
	}
	return info, nil
}

// refused names formats that are known, and not taken.
func refused(head []byte) error {
	for magic, what := range map[string]string{
		"# Disk DescriptorFile": "a VMDK descriptor whose data are in other files; make one file of it: qemu-img convert -O vmdk -o subformat=streamOptimized",
		"COWD":                  "a VMDK of an old ESX host; export it as OVA",
		"\xbe\xba\xfe\xca":      "a VMDK of type seSparse; export it as OVA",
		"<<< ":                  "a VDI of VirtualBox; export it as OVA, or convert it: qemu-img convert -O qcow2",
		"PK\x03\x04":            "a ZIP archive; unpack it first",
		"BZh":                   "compressed with bzip2; use gzip, xz or zstd",
		"LUKS\xba\xbe":          "encrypted with LUKS; decrypt it first, and have volumes encrypted by an EncryptionClass",
		"<?xml":                 "an XML file; of an OVF package the OVA file is needed, which has the disks in it",
		"<!DOC":                 "an HTML page; is the URL right?",
		"<!doc":                 "an HTML page; is the URL right?",
		"<html":                 "an HTML page; is the URL right?",
	} {
		if hasMagic(head, magic) {
			return fmt.Errorf("%w: it is %s", ErrUnsupported, what)
		}
	}
	return nil
}

// file is what is looked at.
type file struct {
	io.ReaderAt
	size int64
}

// read returns n bytes, or fewer at the end of the file, or none when it cannot be read.
func (f file) read(at int64, n int) []byte {
	if at < 0 || at >= f.size {
		return nil
	}
	b := make([]byte, min(int64(n), f.size-at))
	got, err := f.ReadAt(b, at)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	return b[:got]
}

// full is read that wants all bytes.
func (f file) full(at int64, n int) ([]byte, error) {
	b := f.read(at, n)
	if len(b) < n {
		return nil, fmt.Errorf("%w: it ends at %d bytes, within its header", ErrDamaged, f.size)
	}
	return b, nil
}

func hasMagic(b []byte, magic string) bool {
	return len(b) >= len(magic) && string(b[:len(magic)]) == magic
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}
