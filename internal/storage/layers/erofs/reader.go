package erofs

import (
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth bounds how deep Load follows directories. The longest path Linux
// accepts has half as many elements.
const maxDepth = 4096

// Load reads the tree of an image of size bytes that a Writer made. File
// contents stay in r; Node.Source and Node.Data say where.
func Load(r io.ReaderAt, size int64) (*Node, error) {
	l := &loader{r: r, size: size, seen: map[uint64]*Node{}, dirs: map[*Node]dirData{}, entries: size / direntSize}
	if err := l.readSuper(); err != nil {
		return nil, err
	}
	root, err := l.child(rootNid)
	if err != nil {
		return nil, err
	}
	if !root.IsDir() {
		return nil, corrupt("root is not a directory")
	}
	if err := l.fill(root, 0); err != nil {
		return nil, err
	}
	return root, nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

type loader struct {
	r       io.ReaderAt
	size    int64
	meta    int64             // byte offset of the metadata area
	seen    map[uint64]*Node  // by inode number: directories and inodes with several links
	dirs    map[*Node]dirData // directories not read yet
	entries int64             // directory entries that the image can still hold

	window    []byte
	windowOff int64
}

func (l *loader) readSuper() error {
	if l.size < 2*BlockSize || l.size%BlockSize != 0 {
		return corrupt("size %d", l.size)
	}
	block, err := l.bytes(0, BlockSize)
	if err != nil {
		return err
	}
	p := append([]byte(nil), block[superOffset:]...)
	if le.Uint32(p) != superMagic {
		return corrupt("no superblock")
	}
	sum := le.Uint32(p[4:])
	le.PutUint32(p[4:], 0)
	if superChecksum(p) != sum {
		return corrupt("superblock checksum")
	}
	if p[12] != blockBits || le.Uint16(p[14:]) != rootNid || le.Uint32(p[80:])&^incompatChunked != 0 {
		return corrupt("unsupported features")
	}
	if blocks := int64(le.Uint32(p[36:])); blocks*BlockSize != l.size {
		return corrupt("%d blocks in a file of %d bytes", blocks, l.size)
	}
	l.meta = int64(le.Uint32(p[40:])) * BlockSize
	return nil
}

// bytes returns n bytes at off, valid until the next call.
func (l *loader) bytes(off, n int64) ([]byte, error) {
	const size = 256 << 10
	if off < 0 || n < 0 || n > l.size || off > l.size-n {
		return nil, corrupt("%d bytes at offset %d", n, off)
	}
	if off < l.windowOff || off+n > l.windowOff+int64(len(l.window)) {
		want := min(max(n, size), l.size-off)
		if int64(cap(l.window)) < want {
			l.window = make([]byte, want)
		}
		l.window, l.windowOff = l.window[:want], off
		if _, err := io.ReadFull(io.NewSectionReader(l.r, off, want), l.window); err != nil {
			l.window = l.window[:0]
			return nil, fmt.Errorf("reading image: %w", err)
		}
	}
	at := off - l.windowOff
	return l.window[at : at+n], nil
}

// dirData says where the entries of a directory are.
type dirData struct {
	block   uint32
	size    int64
	tailOff int64
	inline  bool
}

// inode reads one inode and, for a directory, where its entries are.
func (l *loader) inode(nid uint64) (*Node, dirData, error) {
	var dir dirData
	if nid > uint64(l.size)/slotSize {
		return nil, dir, corrupt("inode number %d", nid)
	}
	off := l.meta + int64(nid)*slotSize
	b, err := l.bytes(off, inodeSize)
	if err != nil {
		return nil, dir, err
	}
	format := le.Uint16(b)
	layout := format >> 1
	if format&1 == 0 {
		return nil, dir, corrupt("inode %d is not extended", nid)
	}
	n := &Node{
		Mode: uint32(le.Uint16(b[4:])), UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]),
		Mtime: int64(le.Uint64(b[32:])), MtimeNsec: le.Uint32(b[40:]),
	}
	icount, size, data := int64(le.Uint16(b[2:])), int64(le.Uint64(b[8:])), le.Uint32(b[16:])
	nlink := le.Uint32(b[44:])
	off += inodeSize
	if icount > 0 {
		xattrLen := xattrHeaderSize + 4*(icount-1)
		if n.Xattrs, err = l.xattrs(off, xattrLen); err != nil {
			return nil, dir, fmt.Errorf("inode %d: %w", nid, err)
		}
		off += xattrLen
	}
	if size < 0 {
		return nil, dir, corrupt("inode %d: size %d", nid, size)
	}
	switch {
	case n.IsDir():
		n.Children = map[string]*Node{}
		dir = dirData{data, size, off, layout == layoutInline}
	case n.IsRegular():
		n.Source = l.r
		n.Data, err = l.fileData(layout, size, data, off)
	case n.IsSymlink():
		n.Target, err = l.symlink(layout, size, data, off)
	case n.IsDevice():
		n.Rdev = data
	case fileType(n.Mode) == 0:
		err = corrupt("mode %#o", n.Mode)
	}
	if err != nil {
		return nil, dir, fmt.Errorf("inode %d: %w", nid, err)
	}
	if nlink > 1 && !n.IsDir() {
		l.seen[nid] = n
	}
	return n, dir, nil
}

func (l *loader) xattrs(off, size int64) (map[string]string, error) {
	b, err := l.bytes(off, size)
	if err != nil {
		return nil, err
	}
	if b[4] != 0 {
		return nil, corrupt("shared attributes")
	}
	out := map[string]string{}
	for b = b[xattrHeaderSize:]; len(b) > 0; {
		if len(b) < xattrEntrySize {
			return nil, corrupt("attribute entry")
		}
		nameLen, index, valueLen := int(b[0]), b[1], int(le.Uint16(b[2:]))
		end := xattrEntrySize + nameLen + valueLen
		if end > len(b) {
			return nil, corrupt("attribute entry")
		}
		name := ""
		for _, p := range xattrPrefixes {
			if p.index == index {
				name = p.prefix + string(b[xattrEntrySize:xattrEntrySize+nameLen])
			}
		}
		if _, _, ok := splitXattr(name); !ok {
			return nil, corrupt("attribute name")
		}
		out[name] = string(b[xattrEntrySize+nameLen : end])
		b = b[min(align(end, 4), len(b)):]
	}
	return out, nil
}

// checkBlocks says whether n blocks from block on are inside the image.
func (l *loader) checkBlocks(block uint32, n int64) error {
	if block == 0 || n < 0 || int64(block)+n > l.size/BlockSize {
		return corrupt("%d blocks at block %d", n, block)
	}
	return nil
}

func (l *loader) fileData(layout uint16, size int64, data uint32, off int64) (Data, error) {
	d := Data{Size: size, Block: data}
	switch layout {
	case layoutInline:
		d.TailOff, d.TailLen = off, int(size%BlockSize)
		if d.TailLen == 0 {
			return d, corrupt("inline data of a file of %d bytes", size)
		}
		if _, err := l.bytes(off, int64(d.TailLen)); err != nil {
			return d, err
		}
	case layoutPlain:
	case layoutChunk:
		return l.chunks(size, data, off)
	default:
		return d, corrupt("data layout %d", layout)
	}
	if size-int64(d.TailLen) > l.size {
		return d, corrupt("file of %d bytes", size)
	}
	if n := d.blocks(); n > 0 {
		return d, l.checkBlocks(d.Block, n)
	}
	return d, nil
}

func (l *loader) chunks(size int64, format uint32, off int64) (Data, error) {
	d := Data{Size: size}
	n := size / ChunkSize
	if size%ChunkSize != 0 {
		n++
	}
	if format != chunkBits || n == 0 || n > l.size/4 {
		return d, corrupt("chunk format %#x of a file of %d bytes", format, size)
	}
	b, err := l.bytes(off, 4*n)
	if err != nil {
		return d, err
	}
	d.Chunks = make([]uint32, n)
	for i := range d.Chunks {
		block := le.Uint32(b[4*i:])
		d.Chunks[i] = block
		if block == HoleBlock {
			continue
		}
		blocks := (min(ChunkSize, size-int64(i)*ChunkSize) + BlockSize - 1) / BlockSize
		if err := l.checkBlocks(block, blocks); err != nil {
			return d, err
		}
	}
	return d, nil
}

func (l *loader) symlink(layout uint16, size int64, data uint32, off int64) (string, error) {
	if size == 0 || size > MaxSymlink {
		return "", corrupt("symbolic link of %d bytes", size)
	}
	if layout == layoutPlain {
		off = int64(data) * BlockSize
	}
	b, err := l.bytes(off, size)
	return string(b), err
}

// fill reads the entries of a directory and everything below.
func (l *loader) fill(dir *Node, depth int) error {
	d := l.dirs[dir]
	delete(l.dirs, dir)
	if depth > maxDepth {
		return corrupt("directories nested too deep")
	}
	var subdirs []*Node
	last := ""
	for done := int64(0); done < d.size; {
		n := min(BlockSize, d.size-done)
		off := int64(d.block)*BlockSize + done
		if d.inline && n < BlockSize {
			off = d.tailOff
		}
		b, err := l.bytes(off, n)
		if err != nil {
			return err
		}
		b = append([]byte(nil), b...)
		done += n
		err = eachDirent(b, func(name string, nid uint64) error {
			if l.entries--; l.entries < 0 {
				return corrupt("too many directory entries")
			}
			if last != "" && name <= last {
				return corrupt("directory is not sorted")
			}
			last = name
			if name == "." || name == ".." {
				return nil
			}
			child, err := l.child(nid)
			if err != nil {
				return err
			}
			if child.IsDir() {
				subdirs = append(subdirs, child)
			}
			dir.Children[name] = child
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, sub := range subdirs {
		if err := l.fill(sub, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (l *loader) child(nid uint64) (*Node, error) {
	if n := l.seen[nid]; n != nil {
		if n.IsDir() {
			return nil, corrupt("directory with two parents")
		}
		return n, nil
	}
	n, dir, err := l.inode(nid)
	if err != nil {
		return nil, err
	}
	if n.IsDir() {
		l.seen[nid] = n
		l.dirs[n] = dir
	}
	return n, nil
}

// eachDirent calls f for the entries of one directory block.
func eachDirent(b []byte, f func(name string, nid uint64) error) error {
	if len(b) < direntSize {
		return corrupt("directory block of %d bytes", len(b))
	}
	first := int(le.Uint16(b[8:]))
	if first == 0 || first%direntSize != 0 || first > len(b) {
		return corrupt("directory block")
	}
	for at := 0; at < first; at += direntSize {
		nid, start, end := le.Uint64(b[at:]), int(le.Uint16(b[at+8:])), len(b)
		if at+direntSize < first {
			end = int(le.Uint16(b[at+direntSize+8:]))
		}
		if start < first || end > len(b) || start >= end {
			return corrupt("directory entry")
		}
		name := string(b[start:end])
		if at+direntSize >= first {
			name, _, _ = strings.Cut(name, "\x00")
		}
		if name == "" || len(name) > MaxName || strings.ContainsAny(name, "/\x00") {
			return corrupt("file name %q", name)
		}
		if err := f(name, nid); err != nil {
			return err
		}
	}
	return nil
}

// Mkdev returns the device number as Node.Rdev wants it. ok is false for
// numbers that do not fit the kernel's 32-bit form.
func Mkdev(major, minor int64) (rdev uint32, ok bool) {
	if major < 0 || major > 0xfff || minor < 0 || minor > 0xfffff {
		return 0, false
	}
	return uint32(unix.Mkdev(uint32(major), uint32(minor))), true
}
