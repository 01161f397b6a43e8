// Package erofs writes and reads EROFS images of container image layers.
//
// It exists because a layer needs four things at once that no library offers
// together: hard links (two names, one inode), one pass over a stream with no
// spool of the file data, sparse files without their zeros, and data that can
// be copied block-wise into a merged image. The format written is the plain
// subset of EROFS that Linux 5.15 and later mounts: 4096-byte blocks, extended
// inodes, flat, inline and chunk-based data, inline extended attributes. There
// is no compression, no deduplication and no multi-device image.
//
// A [Node] tree is the common form: [Writer.Finish] writes one, [Load] reads
// one back. Load checks every offset and size against the file, so a damaged
// image yields [ErrCorrupt] and never a panic or a huge allocation. It is not
// a general EROFS reader; images of other tools that use other features are
// refused.
//
// The only caller is package layers. On-disk structures follow
// Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux.
package erofs

import (
	"errors"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrCorrupt is returned by [Load] for an image that breaks the format.
var ErrCorrupt = errors.New("corrupt erofs image")

// Limits of what an image can hold.
const (
	// BlockSize is the block size of every image, in bytes.
	BlockSize = 4096
	// MaxName is the longest file name, in bytes.
	MaxName = 255
	// MaxSymlink is the longest symbolic link target, in bytes.
	MaxSymlink = 4095
	// MaxXattrValue is the longest value of one extended attribute, in bytes.
	MaxXattrValue = 65535
)

// A Node is one inode. Hard links are several entries in Children maps that
// point to the same Node.
type Node struct {
	Mode      uint32 // file type and permission bits as in st_mode
	UID, GID  uint32
	Mtime     int64 // seconds since the epoch
	MtimeNsec uint32
	Rdev      uint32 // device number in the kernel's 32-bit encoding, see unix.Mkdev

	Xattrs   map[string]string // full name, for example "security.capability"
	Target   string            // symbolic links
	Children map[string]*Node  // directories
	Data     Data              // regular files
	Source   io.ReaderAt       // the file Data refers to; nil in a tree under construction

	place placement
}

// Data says where the content of a regular file is.
//
// Blocks holds the content up to the last full block and, when TailLen is 0,
// the zero-padded rest; the tail, shorter than a block, is stored apart next
// to the inode. A file with Chunks is sparse: entry i is the first block of
// bytes [i*ChunkSize, (i+1)*ChunkSize), or HoleBlock where all of them are 0.
type Data struct {
	Size    int64
	Block   uint32
	TailOff int64 // byte offset of the tail in the tail store or, after Load, in the image
	TailLen int
	Chunks  []uint32
}

// Sparse files are kept in chunks of this many bytes.
const (
	ChunkSize = 64 << 10
	chunkBits = 4 // log2(ChunkSize / BlockSize)
	// HoleBlock in Data.Chunks marks a chunk of zeros.
	HoleBlock = 0xffffffff
)

// placement is where Finish puts the inode.
type placement struct {
	done     bool
	pos      int64  // byte offset in the metadata area
	parent   uint64 // inode number of a directory's ".."
	nlink    uint32 // entries that refer to the inode
	xattrLen int
	block    uint32 // first data block of a directory or long symlink
	dirSize  int64
	inline   bool // the tail follows the inode
}

// IsDir says whether n is a directory.
func (n *Node) IsDir() bool { return n.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsRegular says whether n is a regular file.
func (n *Node) IsRegular() bool { return n.Mode&unix.S_IFMT == unix.S_IFREG }

// IsSymlink says whether n is a symbolic link.
func (n *Node) IsSymlink() bool { return n.Mode&unix.S_IFMT == unix.S_IFLNK }

// IsDevice says whether n is a character or block device.
func (n *Node) IsDevice() bool {
	t := n.Mode & unix.S_IFMT
	return t == unix.S_IFCHR || t == unix.S_IFBLK
}

// IsWhiteout says whether n is overlayfs' mark for a deleted name.
func (n *Node) IsWhiteout() bool { return n.Mode&unix.S_IFMT == unix.S_IFCHR && n.Rdev == 0 }

// NewDir returns an empty directory with the given permission bits.
func NewDir(perm uint32) *Node {
	return &Node{Mode: unix.S_IFDIR | perm, Children: map[string]*Node{}}
}

// blocks is the number of blocks Data.Block starts, without the tail.
func (d *Data) blocks() int64 {
	if d.Chunks != nil {
		return 0
	}
	full := d.Size - int64(d.TailLen)
	return (full + BlockSize - 1) / BlockSize
}

// Extent is one run of bytes of a file. Off is -1 in a hole.
type Extent struct {
	Off, Len int64
}

// Extents returns the content of a file of a loaded image as byte ranges of
// the image, in order.
func (d *Data) Extents() []Extent {
	if d.Size == 0 {
		return nil
	}
	if d.Chunks == nil {
		var out []Extent
		if n := d.Size - int64(d.TailLen); n > 0 {
			out = append(out, Extent{int64(d.Block) * BlockSize, n})
		}
		if d.TailLen > 0 {
			out = append(out, Extent{d.TailOff, int64(d.TailLen)})
		}
		return out
	}
	out := make([]Extent, 0, len(d.Chunks))
	for i, b := range d.Chunks {
		e := Extent{-1, min(ChunkSize, d.Size-int64(i)*ChunkSize)}
		if b != HoleBlock {
			e.Off = int64(b) * BlockSize
		}
		out = append(out, e)
	}
	return out
}

// ReadAll returns the content of a regular file of a loaded image, refusing
// files above limit bytes.
func (n *Node) ReadAll(limit int64) ([]byte, error) {
	if n.Data.Size > limit {
		return nil, errors.New("file too large")
	}
	buf := make([]byte, n.Data.Size)
	at := int64(0)
	for _, e := range n.Data.Extents() {
		if e.Off >= 0 {
			if _, err := n.Source.ReadAt(buf[at:at+e.Len], e.Off); err != nil {
				return nil, err
			}
		}
		at += e.Len
	}
	return buf, nil
}

// Lookup finds a path below root without leaving it: symbolic links are
// followed inside root, ".." stops at root. The last element is followed only
// if follow is set. It returns nil when there is nothing.
func Lookup(root *Node, path string, follow bool) *Node {
	const maxLinks = 40
	stack := []*Node{root}
	todo := split(path)
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		child := stack[len(stack)-1].Children[name]
		if child == nil {
			return nil
		}
		if child.IsSymlink() && (follow || len(todo) > 0) {
			if links++; links > maxLinks {
				return nil
			}
			if strings.HasPrefix(child.Target, "/") {
				stack = stack[:1]
			}
			todo = append(split(child.Target), todo...)
			continue
		}
		stack = append(stack, child)
	}
	return stack[len(stack)-1]
}

func split(path string) []string {
	parts := strings.Split(path, "/")
	return slices.DeleteFunc(parts, func(s string) bool { return s == "" || s == "." })
}
