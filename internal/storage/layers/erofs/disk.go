package erofs

import (
	"encoding/binary"
	"hash/crc32"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// On-disk constants, names as in fs/erofs/erofs_fs.h.
const (
	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2

	compatChecksum  = 0x1 // EROFS_FEATURE_COMPAT_SB_CHKSUM
	compatMtime     = 0x2 // EROFS_FEATURE_COMPAT_MTIME
	incompatChunked = 0x4 // EROFS_FEATURE_INCOMPAT_CHUNKED_FILE

	blockBits = 12
	slotSize  = 32 // inode numbers count these
	inodeSize = 64 // extended inode

	layoutPlain  = 0 // EROFS_INODE_FLAT_PLAIN
	layoutInline = 2 // EROFS_INODE_FLAT_INLINE
	layoutChunk  = 4 // EROFS_INODE_CHUNK_BASED

	direntSize      = 12
	xattrHeaderSize = 12
	xattrEntrySize  = 4

	// rootNid is the inode number of the root. 0 would do for the kernel, but
	// readers treat a directory entry with inode number 0 as deleted.
	rootNid = 2
)

var le = binary.LittleEndian

// superblock holds the fields of the superblock that vary between images.
type superblock struct {
	blocks    uint32
	metaBlock uint32
	inodes    uint64
	incompat  uint32
	uuid      [16]byte
}

// encode returns the first block of the image.
func (s *superblock) encode() []byte {
	b := make([]byte, BlockSize)
	p := b[superOffset:]
	le.PutUint32(p[0:], superMagic)
	le.PutUint32(p[8:], compatChecksum|compatMtime)
	p[12] = blockBits
	le.PutUint16(p[14:], rootNid)
	le.PutUint64(p[16:], s.inodes)
	le.PutUint32(p[36:], s.blocks)
	le.PutUint32(p[40:], s.metaBlock)
	copy(p[48:64], s.uuid[:])
	le.PutUint32(p[80:], s.incompat)
	le.PutUint32(p[4:], superChecksum(p))
	return b
}

// superChecksum is CRC32C over the superblock to the end of its block with the
// checksum field 0 and, unlike the usual CRC32C, no final inversion.
func superChecksum(p []byte) uint32 {
	return ^crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli))
}

// inode is the part of an extended inode that is not in Node.
type inode struct {
	layout   uint16
	xattrLen int
	size     uint64
	data     uint32 // start block, device number or chunk format
	ino      uint32
	nlink    uint32
}

func (i *inode) encode(n *Node) []byte {
	b := make([]byte, inodeSize)
	le.PutUint16(b[0:], 1|i.layout<<1)
	if i.xattrLen > 0 {
		le.PutUint16(b[2:], uint16((i.xattrLen-xattrHeaderSize)/4+1))
	}
	le.PutUint16(b[4:], uint16(n.Mode))
	le.PutUint64(b[8:], i.size)
	le.PutUint32(b[16:], i.data)
	le.PutUint32(b[20:], i.ino)
	le.PutUint32(b[24:], n.UID)
	le.PutUint32(b[28:], n.GID)
	le.PutUint64(b[32:], uint64(n.Mtime))
	le.PutUint32(b[40:], n.MtimeNsec)
	le.PutUint32(b[44:], i.nlink)
	return b
}

// xattrPrefixes maps the index stored in an entry to the start of the name.
var xattrPrefixes = [...]struct {
	index  byte
	prefix string
}{
	{1, "user."},
	{2, "system.posix_acl_access"},
	{3, "system.posix_acl_default"},
	{4, "trusted."},
	{6, "security."},
}

// SplitXattr returns the index of the name's prefix and the rest of the name.
// ok is false for a name that EROFS cannot hold.
func splitXattr(name string) (index byte, rest string, ok bool) {
	for _, p := range xattrPrefixes {
		if r, found := strings.CutPrefix(name, p.prefix); found {
			if whole := p.index == 2 || p.index == 3; whole != (r == "") {
				return 0, "", false
			}
			return p.index, r, len(r) <= 255
		}
	}
	return 0, "", false
}

// ValidXattr says whether an image can hold an attribute of this name and
// value.
func ValidXattr(name, value string) bool {
	_, _, ok := splitXattr(name)
	return ok && len(value) <= MaxXattrValue
}

// maxXattrArea is what the 16-bit count of 4-byte units can express.
const maxXattrArea = xattrHeaderSize + 4*(65535-1)

// xattrAreaLen is the size of the attributes as stored after the inode.
func xattrAreaLen(xattrs map[string]string) int {
	if len(xattrs) == 0 {
		return 0
	}
	n := xattrHeaderSize
	for name, value := range xattrs {
		_, rest, _ := splitXattr(name)
		n += align(xattrEntrySize+len(rest)+len(value), 4)
	}
	return n
}

func encodeXattrs(xattrs map[string]string) []byte {
	b := make([]byte, xattrHeaderSize, xattrAreaLen(xattrs))
	for _, name := range slices.Sorted(maps.Keys(xattrs)) {
		value := xattrs[name]
		index, rest, _ := splitXattr(name)
		b = append(b, byte(len(rest)), index)
		b = le.AppendUint16(b, uint16(len(value)))
		b = append(b, rest...)
		b = append(b, value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

func align[T int | int64](n, to T) T { return (n + to - 1) / to * to }

// fileType is the type code of a directory entry, as in linux/fs_types.h.
func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}

// dirNames returns the names of a directory as stored: sorted by bytes with
// "." and ".." among them, since the kernel looks names up by bisection and
// some names ("+x") sort before ".".
func dirNames(n *Node) []string {
	names := make([]string, 0, len(n.Children)+2)
	names = append(names, ".", "..")
	for name := range n.Children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// dirBlocks splits names into the groups that share a block and calls f for
// each with the number of bytes used.
func dirBlocks(names []string, f func(group []string, used int)) {
	for len(names) > 0 {
		used, n := 0, 0
		for n < len(names) && used+direntSize+len(names[n]) <= BlockSize {
			used += direntSize + len(names[n])
			n++
		}
		f(names[:n], used)
		names = names[n:]
	}
}
