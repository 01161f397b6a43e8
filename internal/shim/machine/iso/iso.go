// Package iso writes small ISO 9660 file systems, as guests read their configuration from: a few files, complete in
// memory, with their names in Joliet (Windows, Linux) and Rock Ridge (Linux without Joliet, BSD).
//
// It is not a mastering tool: no booting, no links, no owners. What it writes depends on its input only, so the same
// files give the same bytes. internal/shim/machine/seed is its caller. What can go wrong: a name that is too long or
// not a clean path, too many bytes.
//
// Sources: ECMA-119 (ISO 9660), the Joliet specification of 1995, IEEE P1281 (SUSP) and P1282 (Rock Ridge 1.10).
package iso

import (
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode/utf16"
)

// Bounds of what can be written.
const (
	MaxBytes = 64 << 20 // of all files
	MaxName  = 64       // UTF-16 units of one element of a path, what Joliet has room for
	maxDepth = 7
)

const (
	sector      = 2048
	systemArea  = 16 // sectors
	recordFixed = 33
	dirFlag     = 2
	// year, month, day of everything; 1 January 2000, with no meaning.
	year, month, day = 100, 1, 1
)

// node is a file or directory.
type node struct {
	name     string // "" for the root
	iso      string // its name in the primary tree
	dir      bool
	data     []byte
	children []*node
	parent   *node
	number   [2]uint16 // of a directory in the path tables, from 1
	extent   [2]uint32 // first sector, in the primary tree and in Joliet's; of files both are the same
	size     [2]uint32 // in bytes
}

// tree says which of the two trees something is in.
type tree int

const (
	primary tree = iota
	joliet
)

// Make returns a file system with a label and files, whose names are paths with slashes.
func Make(label string, files map[string][]byte) ([]byte, error) {
	root, err := build(files)
	if err != nil {
		return nil, fmt.Errorf("making ISO image: %w", err)
	}
	if label == "" || len(label) > 32 {
		return nil, fmt.Errorf("making ISO image: the label %q does not have 1 to 32 characters", label)
	}
	w := &writer{label: label}
	w.dirs[primary], w.dirs[joliet] = directories(root, primary), directories(root, joliet)
	w.place(root)
	return w.write(root), nil
}

// build makes the tree of files.
func build(files map[string][]byte) (*node, error) {
	root, total := &node{dir: true}, 0
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if path.Clean("/"+name) != "/"+name || strings.ContainsAny(name, "\\:;*?\x00") {
			return nil, fmt.Errorf("%q is not a clean path", name)
		}
		parts := strings.Split(name, "/")
		if len(parts) > maxDepth {
			return nil, fmt.Errorf("%q has more than %d elements", name, maxDepth)
		}
		at := root
		for i, part := range parts {
			if n := len(utf16.Encode([]rune(part))); n == 0 || n > MaxName || len(part) > 2*MaxName {
				return nil, fmt.Errorf("%q: the name %q does not have 1 to %d characters", name, part, MaxName)
			}
			last := i == len(parts)-1
			at = at.child(part, !last)
			if at.dir == last {
				return nil, fmt.Errorf("%q is both a file and a directory", name)
			}
		}
		at.data = files[name]
		if total += len(at.data); total > MaxBytes {
			return nil, fmt.Errorf("the files have more than %d bytes", MaxBytes)
		}
	}
	root.parent = root
	root.nameAll()
	return root, nil
}

// child finds or makes a child.
func (n *node) child(name string, dir bool) *node {
	for _, c := range n.children {
		if c.name == name {
			return c
		}
	}
	c := &node{name: name, dir: dir, parent: n}
	n.children = append(n.children, c)
	return c
}

// nameAll gives all nodes names that the primary tree can have.
func (n *node) nameAll() {
	seen := map[string]bool{}
	for i, c := range n.children {
		c.iso = mangle(c.name, c.dir)
		if seen[c.iso] {
			c.iso = mangle(fmt.Sprintf("F%07d", i), c.dir)
		}
		seen[c.iso] = true
		c.nameAll()
	}
}

// mangle makes a name of eight and three letters, digits and _.
func mangle(name string, dir bool) string {
	clean := func(s string, limit int) string {
		s = strings.Map(func(r rune) rune {
			if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
				return r
			}
			return '_'
		}, strings.ToUpper(s))
		return s[:min(len(s), limit)]
	}
	const base, ext = 8, 3
	if dir {
		return clean(name, base)
	}
	before, after := name, ""
	if i := strings.LastIndexByte(name, '.'); i > 0 {
		before, after = name[:i], name[i+1:]
	}
	return clean(before, base) + "." + clean(after, ext) + ";1"
}

// id is the name of a node in the records of a tree.
func (n *node) id(t tree) []byte {
	if t == primary {
		return []byte(n.iso)
	}
	name := n.name
	if !n.dir {
		name += ";1"
	}
	return ucs2(name)
}

func ucs2(s string) []byte {
	var out []byte
	for _, u := range utf16.Encode([]rune(s)) {
		out = binary.BigEndian.AppendUint16(out, u)
	}
	return out
}

// sorted are the children in the order of a tree.
func (n *node) sorted(t tree) []*node {
	out := slices.Clone(n.children)
	slices.SortFunc(out, func(a, b *node) int { return strings.Compare(string(a.id(t)), string(b.id(t))) })
	return out
}

// directories lists the directories level by level, as path tables have them, and numbers them.
func directories(root *node, t tree) []*node {
	out := []*node{root}
	for i := 0; i < len(out); i++ {
		out[i].number[t] = uint16(i + 1)
		for _, c := range out[i].sorted(t) {
			if c.dir {
				out = append(out, c)
			}
		}
	}
	return out
}

// record is a directory record.
func (n *node) record(t tree, id, system []byte) []byte {
	out := make([]byte, recordFixed, recordFixed+len(id)+1+len(system)+1)
	both32(out[2:], n.extent[t])
	both32(out[10:], n.size[t])
	copy(out[18:], []byte{year, month, day})
	if n.dir {
		out[25] = dirFlag
	}
	both16(out[28:], 1)
	out[32] = byte(len(id))
	out = append(out, id...)
	if len(out)%2 == 1 {
		out = append(out, 0)
	}
	if out = append(out, system...); len(out)%2 == 1 {
		out = append(out, 0)
	}
	out[0] = byte(len(out))
	return out
}

// content is the records of a directory, none of which crosses a sector.
func (n *node) content(t tree) []byte {
	var rootOnly, attributes []byte
	if t == primary {
		attributes = posix(n)
		if n.name == "" {
			rootOnly = append([]byte{'S', 'P', 7, 1, 0xbe, 0xef, 0}, rockRidge()...)
		}
	}
	records := [][]byte{
		n.record(t, []byte{0}, append(rootOnly, attributes...)),
		n.parent.record(t, []byte{1}, posixIf(t, n.parent)),
	}
	for _, c := range n.sorted(t) {
		var system []byte
		if t == primary {
			system = append(posix(c), append([]byte{'N', 'M', byte(5 + len(c.name)), 1, 0}, c.name...)...)
		}
		records = append(records, c.record(t, c.id(t), system))
	}
	var out []byte
	for _, r := range records {
		if left := sector - len(out)%sector; len(r) > left {
			out = append(out, make([]byte, left)...)
		}
		out = append(out, r...)
	}
	return pad(out)
}

func posixIf(t tree, n *node) []byte {
	if t != primary {
		return nil
	}
	return posix(n)
}

// rockRidge says which extension is in use.
func rockRidge() []byte {
	const id = "RRIP_1991A"
	return append([]byte{'E', 'R', byte(8 + len(id)), 1, byte(len(id)), 0, 0, 1}, id...)
}

// posix is the mode of a node, whose owner is root.
func posix(n *node) []byte {
	const fileMode, dirMode = 0o100444, 0o40555
	mode, links := uint32(fileMode), uint32(1)
	if n.dir {
		mode, links = dirMode, 2
	}
	out := append([]byte{'P', 'X', 36, 1}, make([]byte, 32)...)
	both32(out[4:], mode)
	both32(out[12:], links)
	return out
}

// both16 and both32 write a number in both byte orders.
func both16(b []byte, n uint16) {
	binary.LittleEndian.PutUint16(b, n)
	binary.BigEndian.PutUint16(b[2:], n)
}

func both32(b []byte, n uint32) {
	binary.LittleEndian.PutUint32(b, n)
	binary.BigEndian.PutUint32(b[4:], n)
}

// pad fills the last sector.
func pad(b []byte) []byte { return append(b, make([]byte, (sector-len(b)%sector)%sector)...) }
