// Package changeset turns OCI layer tars into trees of inodes and stacks such
// trees into the root file system of an image.
//
// [FromTar] reads one layer ("changeset" in the OCI image specification) and
// needs no other layer: what can only be decided against the layers below is
// written down in marks that survive in the layer's own image. [Merge] stacks
// layers, acts on the marks and returns a tree without any.
//
//   - a deleted name is a character device 0:0, as in overlayfs;
//   - a directory that hides what lies below has trusted.overlay.opaque, as in
//     overlayfs;
//   - a directory the tar never mentions, only paths under it, has
//     trusted.atoll.implicit: it must not change the directory below it;
//   - a hard link to a file of a lower layer is an empty file with
//     trusted.atoll.link holding the path.
//
// A tar is what a stranger wrote. Paths cannot leave the root, names and sizes
// are bounded, and the work and memory a layer may cost are bounded by
// [Limits]. Where the specification is silent the result is what containerd's
// overlayfs unpack gives, so that a pod sees the same files under either
// runtime; the test beside this package compares the two.
//
// Only package layers calls it.
package changeset

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/storage/layers/erofs"
)

// ErrInvalid is what errors about a layer that no retry will fix match with
// errors.Is.
var ErrInvalid = errors.New("invalid layer")

// invalidError matches ErrInvalid without wrapping it: containerd's gRPC layer
// prints an error with two causes twice.
type invalidError struct{ msg string }

func (e *invalidError) Error() string        { return ErrInvalid.Error() + ": " + e.msg }
func (e *invalidError) Is(target error) bool { return target == ErrInvalid }

// Limits bound what one layer may cost.
type Limits struct {
	Metadata int64 // bytes of memory for names, attributes and inodes, roughly
	Content  int64 // sum of file sizes, holes included
}

// DefaultLimits lets through about two million files or 256 GiB of content.
var DefaultLimits = Limits{Metadata: 1 << 30, Content: 256 << 30}

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	paxXattr       = "SCHILY.xattr."

	xattrOpaque   = "trusted.overlay.opaque"
	xattrImplicit = "trusted.atoll.implicit"
	xattrLink     = "trusted.atoll.link"

	maxPath  = 4096
	maxDepth = maxPath / 2
	maxLinks = 40
	nodeCost = 512
)

// reader is the state of one FromTar call.
type reader struct {
	tar    *tar.Reader
	w      *erofs.Writer
	root   *erofs.Node
	limits Limits
}

// FromTar reads an uncompressed layer tar, stores the content of its files in
// w as they come and returns the tree for w.Finish. It stops reading at the
// end-of-archive mark; what follows is the caller's to drain.
func FromTar(ctx context.Context, r io.Reader, w *erofs.Writer, limits Limits) (*erofs.Node, error) {
	t := &reader{tar: tar.NewReader(r), w: w, root: erofs.NewDir(0o755), limits: limits}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hdr, err := t.tar.Next()
		if errors.Is(err, io.EOF) {
			return t.root, nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading layer: %w", tarError(err))
		}
		if err := t.entry(ctx, hdr); err != nil {
			return nil, fmt.Errorf("layer entry %q: %w", clip(hdr.Name), err)
		}
	}
}

// tarError marks what archive/tar says about bad input as ErrInvalid and
// leaves errors of the underlying stream alone.
func tarError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("%v", err)
	}
	return err
}

func invalid(format string, args ...any) error {
	return &invalidError{fmt.Sprintf(format, args...)}
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}

// charge takes the cost of one entry from the limits.
func (t *reader) charge(hdr *tar.Header) error {
	cost := int64(nodeCost + len(hdr.Name) + len(hdr.Linkname))
	for k, v := range hdr.PAXRecords {
		if strings.HasPrefix(k, paxXattr) {
			cost += int64(len(k) + len(v))
		}
	}
	if t.limits.Metadata -= cost; t.limits.Metadata < 0 {
		return invalid("too many files")
	}
	if t.limits.Content -= hdr.Size; hdr.Size < 0 || t.limits.Content < 0 {
		return invalid("too much content")
	}
	return nil
}

func (t *reader) entry(ctx context.Context, hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := t.charge(hdr); err != nil {
		return err
	}
	name := path.Clean("/" + hdr.Name)
	if len(name) > maxPath {
		return invalid("path of %d bytes", len(name))
	}
	dirName, base := path.Split(name)
	if base == "" {
		return nil // the root keeps its defaults, as in containerd
	}
	if len(base) > erofs.MaxName {
		return invalid("file name of %d bytes", len(base))
	}
	dir, err := t.parent(dirName)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return whiteout(dir, base)
	}
	old := dir.Children[base]
	if hdr.Typeflag == tar.TypeLink {
		return t.link(dir, base, hdr)
	}
	n, err := t.node(ctx, hdr)
	if err != nil {
		return err
	}
	if n.IsDir() && old != nil {
		switch {
		case old.IsDir():
			n.Children = old.Children
			if _, opaque := old.Xattrs[xattrOpaque]; opaque {
				setXattr(n, xattrOpaque, "y")
			}
		case old.IsWhiteout():
			setXattr(n, xattrOpaque, "y")
		}
	}
	dir.Children[base] = n
	return nil
}

// parent walks to a directory of this layer, following the layer's own
// symbolic links, and makes what is missing.
func (t *reader) parent(name string) (*erofs.Node, error) {
	stack := []*erofs.Node{t.root}
	todo := elements(name)
	for links := 0; len(todo) > 0; {
		elem := todo[0]
		todo = todo[1:]
		if elem == ".." {
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		if len(elem) > erofs.MaxName || len(stack) > maxDepth {
			return nil, invalid("path too long")
		}
		dir := stack[len(stack)-1]
		child := dir.Children[elem]
		switch {
		case child == nil || child.IsWhiteout():
			made := erofs.NewDir(0o755)
			setXattr(made, xattrImplicit, "y")
			if child != nil {
				setXattr(made, xattrOpaque, "y")
			}
			if t.limits.Metadata -= nodeCost; t.limits.Metadata < 0 {
				return nil, invalid("too many files")
			}
			dir.Children[elem] = made
			child = made
		case child.IsSymlink():
			if links++; links > maxLinks {
				return nil, invalid("too many symbolic links in path")
			}
			if strings.HasPrefix(child.Target, "/") {
				stack = stack[:1]
			}
			todo = append(elements(child.Target), todo...)
			continue
		case !child.IsDir():
			return nil, invalid("%q is not a directory", elem)
		}
		stack = append(stack, child)
	}
	return stack[len(stack)-1], nil
}

func elements(p string) []string {
	var out []string
	for e := range strings.SplitSeq(p, "/") {
		if e != "" && e != "." {
			out = append(out, e)
		}
	}
	return out
}

// whiteout handles the names that delete. What the same layer adds stays,
// whichever comes first in the tar.
func whiteout(dir *erofs.Node, base string) error {
	if base == whiteoutOpaque {
		setXattr(dir, xattrOpaque, "y")
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return invalid("whiteout without a name")
	}
	switch old := dir.Children[name]; {
	case old == nil:
		dir.Children[name] = &erofs.Node{Mode: unix.S_IFCHR}
	case old.IsDir():
		setXattr(old, xattrOpaque, "y")
	}
	return nil
}

func setXattr(n *erofs.Node, name, value string) {
	if n.Xattrs == nil {
		n.Xattrs = map[string]string{}
	}
	n.Xattrs[name] = value
}

// link adds a hard link. Its header's metadata goes to the shared inode, since
// that is what applying the entry to a real file system does.
func (t *reader) link(dir *erofs.Node, base string, hdr *tar.Header) error {
	if len(hdr.Linkname) > maxPath {
		return invalid("link target of %d bytes", len(hdr.Linkname))
	}
	target := erofs.Lookup(t.root, hdr.Linkname, false)
	switch {
	case target == nil:
		n := &erofs.Node{Mode: unix.S_IFREG}
		setXattr(n, xattrLink, path.Clean("/"+hdr.Linkname))
		dir.Children[base] = n
		return nil
	case target.IsDir(), target.IsWhiteout():
		return invalid("hard link to %q, which is not a file", clip(hdr.Linkname))
	case !target.IsSymlink() && target.Xattrs[xattrLink] == "":
		if err := setMetadata(target, hdr); err != nil {
			return err
		}
	}
	dir.Children[base] = target
	return nil
}

// node makes the inode of any entry but a hard link.
func (t *reader) node(ctx context.Context, hdr *tar.Header) (*erofs.Node, error) {
	n := &erofs.Node{}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		n.Mode = unix.S_IFREG
		data, err := t.w.WriteFile(contextReader{ctx, t.tar}, hdr.Size)
		if err != nil {
			return nil, tarError(err)
		}
		n.Data = data
	case tar.TypeDir:
		n = erofs.NewDir(0)
	case tar.TypeSymlink:
		n.Mode, n.Target = unix.S_IFLNK, hdr.Linkname
		if n.Target == "" || len(n.Target) > erofs.MaxSymlink {
			return nil, invalid("symbolic link target of %d bytes", len(n.Target))
		}
	case tar.TypeChar, tar.TypeBlock:
		n.Mode = unix.S_IFCHR
		if hdr.Typeflag == tar.TypeBlock {
			n.Mode = unix.S_IFBLK
		}
		var ok bool
		if n.Rdev, ok = erofs.Mkdev(hdr.Devmajor, hdr.Devminor); !ok {
			return nil, invalid("device number %d:%d", hdr.Devmajor, hdr.Devminor)
		}
	case tar.TypeFifo:
		n.Mode = unix.S_IFIFO
	default:
		return nil, invalid("entry type %q", hdr.Typeflag)
	}
	return n, setMetadata(n, hdr)
}

// setMetadata sets owner, permissions, time and extended attributes.
func setMetadata(n *erofs.Node, hdr *tar.Header) error {
	const maxID = 1<<32 - 2
	if hdr.Uid < 0 || hdr.Uid > maxID || hdr.Gid < 0 || hdr.Gid > maxID {
		return invalid("owner %d:%d", hdr.Uid, hdr.Gid)
	}
	n.UID, n.GID = uint32(hdr.Uid), uint32(hdr.Gid)
	n.Mode &= unix.S_IFMT
	if n.IsSymlink() {
		n.Mode |= 0o777
	} else {
		n.Mode |= uint32(hdr.Mode) & 0o7777
	}
	n.Mtime, n.MtimeNsec = mtime(hdr.ModTime)
	total := 0
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || !keepXattr(n, name) {
			continue
		}
		if total += len(name) + len(value); len(value) > erofs.MaxXattrValue || total > 1<<17 {
			return invalid("extended attribute %q too large", clip(name))
		}
		setXattr(n, name, value)
	}
	return nil
}

// keepXattr says whether an attribute of a tar goes into the image: not the
// marks of this package and of overlayfs, which a layer could use to forge
// them, and not what file systems refuse.
func keepXattr(n *erofs.Node, name string) bool {
	switch {
	case strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "trusted.atoll."):
		return false
	case strings.HasPrefix(name, "user.") && !n.IsRegular() && !n.IsDir():
		return false
	}
	return erofs.ValidXattr(name, "")
}

// mtime maps times that file systems cannot hold to the epoch, as containerd
// does.
func mtime(t time.Time) (sec int64, nsec uint32) {
	if sec := t.Unix(); sec >= 0 && sec < (1<<63-1)/int64(time.Second) {
		return sec, uint32(t.Nanosecond())
	}
	return 0, 0
}

// contextReader stops a long copy when its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
