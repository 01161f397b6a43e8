package erofs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// maxTail is the longest end of a file that is stored next to its inode. Above
// it the space lost to not crossing a block outweighs the block saved.
const maxTail = 2048

// maxInline is the longest directory block or symlink target stored next to
// the inode; see place for why it is not a whole block.
const maxInline = BlockSize - slotSize

// ErrTooLarge is returned when an image would exceed what the format holds.
var ErrTooLarge = errors.New("image too large")

// A Writer builds one image in one pass: file contents first, in the order of
// the calls, then directories and inodes when Finish is called. It is not safe
// for concurrent use. After an error the file's content is useless.
type Writer struct {
	f     *os.File
	out   *bufio.Writer
	next  uint32 // next free block; what is before it is written or buffered
	chunk []byte
	sb    superblock

	tails    *os.File
	tailsOut *bufio.Writer
	tailsLen int64

	pending copyRange

	order   []*Node
	metaPos int64
}

// copyRange is a copy between files that may still grow.
type copyRange struct {
	src      *os.File
	off, len int64
}

// NewWriter returns a Writer to the empty file f. Short ends of files are
// spooled to an unnamed file in dir until Finish. uuid identifies the image;
// overlayfs wants one that is not all 0.
func NewWriter(f *os.File, dir string, uuid [16]byte) (*Writer, error) {
	tails, err := unnamedFile(dir)
	if err != nil {
		return nil, fmt.Errorf("creating a spool file: %w", err)
	}
	if _, err := f.Seek(BlockSize, io.SeekStart); err != nil {
		tails.Close()
		return nil, err
	}
	return &Writer{
		f: f, out: bufio.NewWriterSize(f, 1<<20), next: 1, chunk: make([]byte, ChunkSize),
		tails: tails, tailsOut: bufio.NewWriterSize(tails, 64<<10),
		sb: superblock{uuid: uuid},
	}, nil
}

// unnamedFile creates a file without a name in dir.
func unnamedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/(unnamed)"), nil
	}
	f, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// Close releases the spool. It does not close the image file.
func (w *Writer) Close() error { return w.tails.Close() }

// WriteFile stores the next size bytes of r as the content of a file. Aligned
// runs of zeros of ChunkSize bytes take no space.
func (w *Writer) WriteFile(r io.Reader, size int64) (Data, error) {
	if err := w.flushCopy(); err != nil {
		return Data{}, err
	}
	d := Data{Size: size, Block: w.next}
	for done := int64(0); done < size; {
		buf := w.chunk[:min(ChunkSize, size-done)]
		if _, err := io.ReadFull(r, buf); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return Data{}, err
		}
		done += int64(len(buf))
		if (len(buf) == ChunkSize || d.Chunks != nil) && allZero(buf) {
			if d.Chunks == nil {
				d.Chunks = []uint32{}
				for b := d.Block; b < w.next; b += 1 << chunkBits {
					d.Chunks = append(d.Chunks, b)
				}
			}
			d.Chunks = append(d.Chunks, HoleBlock)
			continue
		}
		if tail := len(buf) % BlockSize; done == size && d.Chunks == nil && tail > 0 && tail <= maxTail {
			if err := w.writeTail(&d, buf[len(buf)-tail:]); err != nil {
				return Data{}, err
			}
			buf = buf[:len(buf)-tail]
		}
		if d.Chunks != nil {
			d.Chunks = append(d.Chunks, w.next)
		}
		if err := w.writeBlocks(buf); err != nil {
			return Data{}, err
		}
	}
	return d, nil
}

func (w *Writer) writeTail(d *Data, tail []byte) error {
	d.TailOff, d.TailLen = w.tailsLen, len(tail)
	w.tailsLen += int64(len(tail))
	_, err := w.tailsOut.Write(tail)
	return err
}

// writeBlocks appends b, padded to a whole number of blocks.
func (w *Writer) writeBlocks(b []byte) error {
	if err := w.reserve((int64(len(b)) + BlockSize - 1) / BlockSize); err != nil {
		return err
	}
	if _, err := w.out.Write(b); err != nil {
		return err
	}
	return w.pad(int64(len(b)))
}

func (w *Writer) reserve(blocks int64) error {
	if int64(w.next)+blocks >= HoleBlock {
		return ErrTooLarge
	}
	w.next += uint32(blocks)
	return nil
}

// pad writes zeros after n bytes to the end of the block.
func (w *Writer) pad(n int64) error {
	return w.zeros(align(n, BlockSize) - n)
}

func (w *Writer) zeros(n int64) error {
	for ; n > 0; n -= BlockSize {
		if _, err := w.out.Write(zeroBlock[:min(n, BlockSize)]); err != nil {
			return err
		}
	}
	return nil
}

var zeroBlock [BlockSize]byte

func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), BlockSize)
		if !bytes.Equal(b[:n], zeroBlock[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// CopyFile stores the content d of the loaded image in src as the content of a
// file of this image. The kernel copies whole blocks; file systems that share
// blocks between files (XFS, btrfs) share them.
func (w *Writer) CopyFile(src *os.File, d Data) (Data, error) {
	out := Data{Size: d.Size, Block: w.next}
	if d.TailLen > 0 {
		tail := w.chunk[:d.TailLen]
		if _, err := src.ReadAt(tail, d.TailOff); err != nil {
			return Data{}, err
		}
		if err := w.writeTail(&out, tail); err != nil {
			return Data{}, err
		}
	}
	if d.Chunks == nil {
		return out, w.copyBlocks(src, d.Block, d.blocks())
	}
	out.Chunks = make([]uint32, len(d.Chunks))
	for i, b := range d.Chunks {
		if b == HoleBlock {
			out.Chunks[i] = HoleBlock
			continue
		}
		out.Chunks[i] = w.next
		n := min(ChunkSize, d.Size-int64(i)*ChunkSize)
		if err := w.copyBlocks(src, b, (n+BlockSize-1)/BlockSize); err != nil {
			return Data{}, err
		}
	}
	return out, nil
}

func (w *Writer) copyBlocks(src *os.File, block uint32, n int64) error {
	if n == 0 {
		return nil
	}
	if err := w.reserve(n); err != nil {
		return err
	}
	off := int64(block) * BlockSize
	if p := &w.pending; p.src == src && p.off+p.len == off {
		p.len += n * BlockSize
		return nil
	}
	if err := w.flushCopy(); err != nil {
		return err
	}
	w.pending = copyRange{src, off, n * BlockSize}
	return nil
}

// flushCopy carries out the pending copy.
func (w *Writer) flushCopy() error {
	p := w.pending
	w.pending = copyRange{}
	if p.len == 0 {
		return nil
	}
	if err := w.out.Flush(); err != nil {
		return err
	}
	for p.len > 0 {
		n, err := unix.CopyFileRange(int(p.src.Fd()), &p.off, int(w.f.Fd()), nil, int(min(p.len, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
			_, err = io.Copy(w.f, io.NewSectionReader(p.src, p.off, p.len))
			return err
		case err != nil:
			return os.NewSyscallError("copy_file_range", err)
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		p.len -= int64(n)
	}
	return nil
}

// Finish writes the tree, whose Data come from this Writer, and the
// superblock. It does not sync the file.
func (w *Writer) Finish(root *Node) error {
	if err := w.flushCopy(); err != nil {
		return err
	}
	if err := w.layout(root); err != nil {
		return err
	}
	if err := w.tailsOut.Flush(); err != nil {
		return err
	}
	for _, n := range w.order {
		if err := w.writeOutOfLine(n); err != nil {
			return err
		}
	}
	w.sb.metaBlock = w.next
	if err := w.writeInodes(); err != nil {
		return err
	}
	if err := w.out.Flush(); err != nil {
		return err
	}
	w.sb.blocks = w.next
	w.sb.inodes = uint64(len(w.order))
	_, err := w.f.WriteAt(w.sb.encode(), 0)
	return err
}

func (w *Writer) writeInodes() error {
	if err := w.reserve((w.metaPos + BlockSize - 1) / BlockSize); err != nil {
		return err
	}
	at := int64(0)
	for i, n := range w.order {
		b, err := w.encodeInode(n, uint32(i+1))
		if err != nil {
			return err
		}
		if err := w.zeros(n.place.pos - at); err != nil {
			return err
		}
		if _, err := w.out.Write(b); err != nil {
			return err
		}
		at = n.place.pos + int64(len(b))
	}
	return w.pad(at)
}

// nid is the inode number that stands for the place of n.
func (p *placement) nid() uint64 { return uint64(p.pos / slotSize) }

// Layout gives every inode its place: the root, then directory by directory
// the entries of each, so that a directory's inodes are near each other.
func (w *Writer) layout(root *Node) error {
	w.metaPos = rootNid * slotSize
	root.place = placement{nlink: 1} // its "..", which no parent counts
	if err := w.place(root); err != nil {
		return err
	}
	root.place.parent = root.place.nid()
	return w.layoutDir(root)
}

func (w *Writer) layoutDir(dir *Node) error {
	dir.place.nlink++ // "."
	names := dirNames(dir)
	for _, name := range names {
		n := dir.Children[name]
		if n == nil {
			continue
		}
		if !n.place.done {
			n.place = placement{}
			if err := w.place(n); err != nil {
				return err
			}
		} else if n.IsDir() {
			return fmt.Errorf("directory %q has two parents", name)
		}
		n.place.nlink++
	}
	for _, name := range names {
		if n := dir.Children[name]; n != nil && n.IsDir() {
			dir.place.nlink++ // its ".."
			n.place.parent = dir.place.nid()
			if err := w.layoutDir(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// place reserves room for the inode of n and what follows it. The kernel wants
// inline data within one block: if it does not fit after the inode here, the
// inode moves so that its data starts within the first slot of the next block.
func (w *Writer) place(n *Node) error {
	p := &n.place
	p.done = true
	p.xattrLen = xattrAreaLen(n.Xattrs)
	if p.xattrLen > maxXattrArea {
		return fmt.Errorf("extended attributes: %w", ErrTooLarge)
	}
	tail, outOfLine := 0, int64(0)
	switch {
	case n.IsDir():
		last := 0
		dirBlocks(dirNames(n), func(_ []string, used int) { outOfLine++; last = used })
		p.dirSize = (outOfLine-1)*BlockSize + int64(last)
		if last <= maxInline {
			tail = last
			outOfLine--
		}
	case n.IsSymlink():
		if len(n.Target) == 0 || len(n.Target) > MaxSymlink {
			return fmt.Errorf("symbolic link with a target of %d bytes", len(n.Target))
		}
		if tail = len(n.Target); tail > maxInline {
			tail, outOfLine = 0, 1
		}
	case n.IsRegular():
		tail = n.Data.TailLen
	}
	p.inline = tail > 0
	p.block = w.next
	if err := w.reserve(outOfLine); err != nil {
		return err
	}
	fixed := int64(inodeSize + p.xattrLen)
	p.pos = align(w.metaPos, slotSize)
	if p.inline && (p.pos+fixed)%BlockSize+int64(tail) > BlockSize {
		p.pos = align(align(p.pos+fixed, BlockSize)-fixed, slotSize)
	}
	w.metaPos = p.pos + fixed + int64(tail) + 4*int64(len(n.Data.Chunks))
	w.order = append(w.order, n)
	if len(w.order) >= math.MaxUint32 {
		return ErrTooLarge
	}
	return nil
}

// writeOutOfLine writes the blocks of a directory or symlink that are not kept
// at the inode.
func (w *Writer) writeOutOfLine(n *Node) error {
	if n.IsSymlink() && !n.place.inline {
		if _, err := w.out.WriteString(n.Target); err != nil {
			return err
		}
		return w.pad(int64(len(n.Target)))
	}
	if !n.IsDir() || n.place.inline && n.place.dirSize < BlockSize {
		return nil
	}
	left := n.place.dirSize
	var err error
	dirBlocks(dirNames(n), func(group []string, _ int) {
		if left -= BlockSize; err != nil || left <= 0 && n.place.inline {
			return
		}
		b := make([]byte, BlockSize)
		encodeDirents(b, n, group)
		_, err = w.out.Write(b)
	})
	return err
}

// encodeDirents writes one directory block.
func encodeDirents(b []byte, dir *Node, names []string) {
	off := len(names) * direntSize
	for i, name := range names {
		var nid uint64
		mode := uint32(unix.S_IFDIR)
		switch name {
		case ".":
			nid = dir.place.nid()
		case "..":
			nid = dir.place.parent
		default:
			child := dir.Children[name]
			nid, mode = child.place.nid(), child.Mode
		}
		e := b[i*direntSize:]
		le.PutUint64(e, nid)
		le.PutUint16(e[8:], uint16(off))
		e[10] = fileType(mode)
		off += copy(b[off:], name)
	}
}

// encodeInode returns the inode with everything that follows it.
func (w *Writer) encodeInode(n *Node, ino uint32) ([]byte, error) {
	p := &n.place
	i := inode{xattrLen: p.xattrLen, ino: ino, nlink: p.nlink}
	if p.inline {
		i.layout = layoutInline
	}
	var tail []byte
	switch {
	case n.IsDir():
		i.size, i.data = uint64(p.dirSize), p.block
		if p.inline {
			dirBlocks(dirNames(n), func(group []string, used int) {
				tail = make([]byte, used)
				encodeDirents(tail, n, group)
			})
		}
	case n.IsSymlink():
		i.size, i.data = uint64(len(n.Target)), p.block
		if p.inline {
			tail = []byte(n.Target)
		}
	case n.IsRegular():
		i.size, i.data = uint64(n.Data.Size), n.Data.Block
		if n.Data.Chunks != nil {
			i.layout, i.data = layoutChunk, chunkBits
			w.sb.incompat |= incompatChunked
			for _, b := range n.Data.Chunks {
				tail = le.AppendUint32(tail, b)
			}
		} else if p.inline {
			tail = make([]byte, n.Data.TailLen)
			if _, err := w.tails.ReadAt(tail, n.Data.TailOff); err != nil {
				return nil, err
			}
		}
	case n.IsDevice():
		i.data = n.Rdev
	}
	b := i.encode(n)
	if p.xattrLen > 0 {
		b = append(b, encodeXattrs(n.Xattrs)...)
	}
	return append(b, tail...), nil
}
