package disk

import (
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// fat is a FAT16 file system in the making (Microsoft's "FAT: General Overview
// of On-Disk Format", 1.03). Files are contiguous, names are of the old short
// form, times are fixed.
type fat struct {
	label string
	root  *fatDir
	nodes []*fatNode // in the order of their clusters
	table []uint16
}

const (
	clusterSectors = 4
	clusterSize    = clusterSectors * sectorSize
	rootEntries    = 512
	fatMinClusters = 4085 + 64 // fewer are taken for FAT12
	fatMaxClusters = 65525 - 64
	fatDate        = (2025-1980)<<9 | 1<<5 | 1
)

// fatNode is a file or a directory.
type fatNode struct {
	name  string
	dir   *fatDir
	data  []byte
	first uint16
}

type fatDir struct {
	parent   *fatDir
	self     *fatNode
	children []*fatNode
}

var shortName = regexp.MustCompile(`^[A-Z0-9_-]{1,8}(\.[A-Z0-9_-]{1,3})?$`)

// newFAT lays out the files, by their paths.
func newFAT(label string, files map[string][]byte) (*fat, error) {
	f := &fat{label: label, root: &fatDir{}, table: []uint16{0xfff8, 0xffff}}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dir := f.root
		parts := strings.Split(name, "/")
		for i, part := range parts {
			if !shortName.MatchString(part) {
				return nil, fmt.Errorf("%s: %q is not a short name", name, part)
			}
			if i < len(parts)-1 {
				dir = dir.sub(part)
			}
		}
		dir.children = append(dir.children, &fatNode{name: path.Base(name), data: files[name]})
	}
	if err := f.allocate(f.root); err != nil {
		return nil, err
	}
	for len(f.table) < fatMinClusters {
		f.table = append(f.table, 0)
	}
	return f, nil
}

// sub returns the directory of that name, which is made if need be.
func (d *fatDir) sub(name string) *fatDir {
	for _, child := range d.children {
		if child.dir != nil && child.name == name {
			return child.dir
		}
	}
	node := &fatNode{name: name}
	node.dir = &fatDir{parent: d, self: node}
	d.children = append(d.children, node)
	return node.dir
}

// allocate gives everything below a directory its clusters.
func (f *fat) allocate(d *fatDir) error {
	for _, child := range d.children {
		clusters := (len(child.data) + clusterSize - 1) / clusterSize
		if child.dir != nil {
			clusters = 1
			if len(child.dir.children)+2 > clusterSize/32 {
				return fmt.Errorf("directory %s holds too much", child.name)
			}
		}
		if clusters == 0 {
			continue
		}
		first := len(f.table)
		if first+clusters > fatMaxClusters {
			return fmt.Errorf("%s does not fit a FAT16 file system", child.name)
		}
		child.first = uint16(first)
		for i := range clusters {
			next := uint16(first + i + 1)
			if i == clusters-1 {
				next = 0xffff
			}
			f.table = append(f.table, next)
		}
		f.nodes = append(f.nodes, child)
		if child.dir != nil {
			if err := f.allocate(child.dir); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *fat) tableSectors() int { return (2*len(f.table) + sectorSize - 1) / sectorSize }

func (f *fat) dataSector() int { return 1 + 2*f.tableSectors() + rootEntries*32/sectorSize }

// size in bytes.
func (f *fat) size() int64 {
	return int64(f.dataSector()+(len(f.table)-2)*clusterSectors) * sectorSize
}

// writeTo writes the file system, which begins at a sector of the disk.
func (f *fat) writeTo(w io.WriterAt, at uint32) error {
	table := make([]byte, f.tableSectors()*sectorSize)
	for i, next := range f.table {
		binary.LittleEndian.PutUint16(table[2*i:], next)
	}
	label := dirEntry(f.label, 0x08, 0, 0)
	copy(label, fmt.Sprintf("%-11s", f.label))
	root := append(label, f.entries(f.root)...)
	if len(root) > rootEntries*32 {
		return fmt.Errorf("the root directory holds too much")
	}
	for _, part := range []struct {
		data   []byte
		sector int
	}{
		{f.bootSector(at), 0},
		{table, 1},
		{table, 1 + f.tableSectors()},
		{root, 1 + 2*f.tableSectors()},
	} {
		if _, err := w.WriteAt(part.data, int64(part.sector)*sectorSize); err != nil {
			return err
		}
	}
	for _, node := range f.nodes {
		data := node.data
		if node.dir != nil {
			data = f.entries(node.dir)
		}
		sector := f.dataSector() + (int(node.first)-2)*clusterSectors
		if _, err := w.WriteAt(data, int64(sector)*sectorSize); err != nil {
			return err
		}
	}
	return nil
}

func (f *fat) bootSector(at uint32) []byte {
	out := make([]byte, sectorSize)
	le := binary.LittleEndian
	copy(out, []byte{0xeb, 0x3c, 0x90})
	copy(out[3:], "ATOLL   ")
	le.PutUint16(out[11:], sectorSize)
	out[13] = clusterSectors
	le.PutUint16(out[14:], 1) // reserved sectors
	out[16] = 2               // tables
	le.PutUint16(out[17:], rootEntries)
	sectors := uint32(f.size() / sectorSize)
	if sectors < 0x10000 {
		le.PutUint16(out[19:], uint16(sectors))
	} else {
		le.PutUint32(out[32:], sectors)
	}
	out[21] = 0xf8
	le.PutUint16(out[22:], uint16(f.tableSectors()))
	le.PutUint16(out[24:], 63)
	le.PutUint16(out[26:], 255)
	le.PutUint32(out[28:], at)
	out[36], out[38] = 0x80, 0x29
	le.PutUint32(out[39:], 0xa7011bad) // serial number
	copy(out[43:], fmt.Sprintf("%-11s", f.label))
	copy(out[54:], "FAT16   ")
	out[510], out[511] = 0x55, 0xaa
	return out
}

// entries is the content of a directory.
func (f *fat) entries(d *fatDir) []byte {
	var out []byte
	if d.self != nil {
		var parent uint16
		if d.parent.self != nil {
			parent = d.parent.self.first
		}
		out = append(out, dirEntry(".", 0x10, d.self.first, 0)...)
		out = append(out, dirEntry("..", 0x10, parent, 0)...)
	}
	for _, child := range d.children {
		attributes := byte(0x20)
		if child.dir != nil {
			attributes = 0x10
		}
		out = append(out, dirEntry(child.name, attributes, child.first, uint32(len(child.data)))...)
	}
	return out
}

func dirEntry(name string, attributes byte, first uint16, size uint32) []byte {
	out := make([]byte, 32)
	base, ext, _ := strings.Cut(name, ".")
	if strings.Trim(name, ".") == "" {
		base, ext = name, ""
	}
	copy(out, fmt.Sprintf("%-8.8s%-3.3s", base, ext))
	out[11] = attributes
	for _, offset := range []int{16, 18, 24} {
		binary.LittleEndian.PutUint16(out[offset:], fatDate)
	}
	binary.LittleEndian.PutUint16(out[26:], first)
	binary.LittleEndian.PutUint32(out[28:], size)
	return out
}
