package iso

import (
	"encoding/binary"
	"strings"
)

// writer lays out an image.
type writer struct {
	label  string
	dirs   [2][]*node // by tree
	tables [2][2]uint32
	sizes  [2]uint32 // of path tables, in bytes
	total  uint32    // sectors
}

// place decides where everything is: descriptors, path tables, directories, files.
func (w *writer) place(root *node) {
	const descriptors = 3
	next := uint32(systemArea + descriptors)
	for _, t := range []tree{primary, joliet} {
		w.sizes[t] = uint32(len(w.pathTable(t, binary.LittleEndian)))
		for order := range w.tables[t] {
			w.tables[t][order] = next
			next += sectors(w.sizes[t])
		}
	}
	for _, t := range []tree{primary, joliet} {
		for _, d := range w.dirs[t] {
			d.extent[t], d.size[t] = next, uint32(len(d.content(t)))
			next += sectors(d.size[t])
		}
	}
	w.eachFile(root, func(f *node) {
		size := uint32(len(f.data))
		for _, t := range []tree{primary, joliet} {
			f.extent[t], f.size[t] = next, size
		}
		next += max(sectors(size), 1)
	})
	w.total = next
}

func sectors(bytes uint32) uint32 { return (bytes + sector - 1) / sector }

func (w *writer) eachFile(n *node, do func(*node)) {
	for _, c := range n.children {
		if c.dir {
			w.eachFile(c, do)
		} else {
			do(c)
		}
	}
}

// write puts everything where it belongs.
func (w *writer) write(root *node) []byte {
	out := make([]byte, int(w.total)*sector)
	at := func(sectorNumber uint32, data []byte) { copy(out[int(sectorNumber)*sector:], data) }
	at(systemArea, w.descriptor(primary, root))
	at(systemArea+1, w.descriptor(joliet, root))
	const terminator = 255
	at(systemArea+2, header(terminator))
	for _, t := range []tree{primary, joliet} {
		at(w.tables[t][0], w.pathTable(t, binary.LittleEndian))
		at(w.tables[t][1], w.pathTable(t, binary.BigEndian))
		for _, d := range w.dirs[t] {
			at(d.extent[t], d.content(t))
		}
	}
	w.eachFile(root, func(f *node) { at(f.extent[primary], f.data) })
	return out
}

func header(kind byte) []byte { return append([]byte{kind}, "CD001\x01"...) }

// descriptor is the primary volume descriptor, or the supplementary one of Joliet.
func (w *writer) descriptor(t tree, root *node) []byte {
	out := make([]byte, sector)
	kind := byte(1)
	text := func(from, to int, s string) {
		if t == joliet {
			for i := from; i+1 < to; i += 2 {
				binary.BigEndian.PutUint16(out[i:], ' ')
			}
			copy(out[from:to], ucs2(s)[:min(len(ucs2(s)), (to-from)/2*2)])
			return
		}
		copy(out[from:to], s+strings.Repeat(" ", to-from))
	}
	if t == joliet {
		kind = 2
		copy(out[88:], "%/E") // UCS-2 level 3
	}
	copy(out, header(kind))
	text(8, 40, "")
	text(40, 72, w.label)
	both32(out[80:], w.total)
	both16(out[120:], 1)
	both16(out[124:], 1)
	both16(out[128:], sector)
	both32(out[132:], w.sizes[t])
	binary.LittleEndian.PutUint32(out[140:], w.tables[t][0])
	binary.BigEndian.PutUint32(out[148:], w.tables[t][1])
	copy(out[156:190], root.record(t, []byte{0}, nil))
	for _, field := range [][2]int{{190, 318}, {318, 446}, {446, 574}, {574, 702}, {702, 739}, {739, 776}, {776, 813}} {
		text(field[0], field[1], "")
	}
	for _, date := range []int{813, 830, 847, 864} {
		copy(out[date:], "0000000000000000\x00")
	}
	copy(out[813:], "2000010100000000\x00")
	copy(out[830:], "2000010100000000\x00")
	out[881] = 1
	return out
}

// byteOrder is how a path table writes numbers.
type byteOrder interface {
	AppendUint16([]byte, uint16) []byte
	AppendUint32([]byte, uint32) []byte
}

// pathTable lists the directories of a tree.
func (w *writer) pathTable(t tree, order byteOrder) []byte {
	var out []byte
	for _, d := range w.dirs[t] {
		id := d.id(t)
		if d.name == "" {
			id = []byte{0}
		}
		out = append(out, byte(len(id)), 0)
		out = order.AppendUint32(out, d.extent[t])
		out = order.AppendUint16(out, d.parent.number[t])
		out = append(out, id...)
		if len(out)%2 == 1 {
			out = append(out, 0)
		}
	}
	return out
}
