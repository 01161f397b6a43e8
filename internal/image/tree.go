package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// fixedTime is the modification time of everything that has none of its own.
var fixedTime = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// maxLinkDepth bounds the symbolic links that are followed for one path.
const maxLinkDepth = 40

// maxContent bounds what the files of one image hold together, in bytes. A tar
// entry may claim any size: a sparse file costs nothing to send.
const maxContent = 32 << 30

// node is a file of the tree. Two paths with the same node are hard links.
type node struct {
	kind     byte // tar type flag
	mode     int64
	uid, gid int
	modTime  time.Time
	target   string // of a symbolic link
	major    int64
	minor    int64
	offset   int64 // of a regular file's content in the spool
	size     int64
}

// tree is a file system in the making. Contents are kept in a spool file, so
// that a large image does not need as much memory. Keys of nodes are clean
// paths without the leading slash; the root has no node.
type tree struct {
	nodes map[string]*node
	spool *os.File
	end   int64
	limit int64 // of end
}

// newTree makes an empty tree with its spool in dir.
func newTree(dir string) (*tree, error) {
	spool, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, fmt.Errorf("creating spool file: %w", err)
	}
	if err := os.Remove(spool.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("unlinking spool file: %w", err), spool.Close())
	}
	return &tree{nodes: map[string]*node{}, spool: spool, limit: maxContent}, nil
}

func (t *tree) close() error {
	return t.spool.Close()
}

// resolve follows the symbolic links of all but the last element of name and
// returns a key. A name cannot leave the tree: ".." at the root is the root.
func (t *tree) resolve(name string) (string, error) {
	key := strings.TrimPrefix(path.Clean("/"+name), "/")
	followed := 0
	for i := 0; i < len(key); i++ {
		if key[i] != '/' {
			continue
		}
		parent, ok := t.nodes[key[:i]]
		if !ok || parent.kind != tar.TypeSymlink {
			continue
		}
		if followed++; followed > maxLinkDepth {
			return "", fmt.Errorf("/%s: too many symbolic links", name)
		}
		target := parent.target
		if !path.IsAbs(target) {
			target = path.Join("/", path.Dir(key[:i]), target)
		}
		key = strings.TrimPrefix(path.Clean(target+key[i:]), "/")
		i = -1
	}
	return key, nil
}

// lookup returns the node at name, following links of its directories only.
func (t *tree) lookup(name string) (*node, error) {
	key, err := t.resolve(name)
	if err != nil {
		return nil, err
	}
	n, ok := t.nodes[key]
	if !ok {
		return nil, fmt.Errorf("%s: no such file in the image", name)
	}
	return n, nil
}

// put places n at name and makes missing parents. A directory that is put on a
// directory, or on a link to one, leaves the contents alone; a directory is
// never replaced by something else.
func (t *tree) put(name string, n *node) error {
	key, err := t.resolve(name)
	if err != nil {
		return err
	}
	if key == "" {
		if n.kind != tar.TypeDir {
			return errors.New("the root of the image must be a directory")
		}
		return nil
	}
	for dir := path.Dir(key); dir != "."; dir = path.Dir(dir) {
		parent, ok := t.nodes[dir]
		if !ok {
			t.nodes[dir] = &node{kind: tar.TypeDir, mode: 0o755, modTime: fixedTime}
		} else if parent.kind != tar.TypeDir {
			return fmt.Errorf("/%s: /%s is not a directory", key, dir)
		}
	}
	if old, ok := t.nodes[key]; ok {
		switch {
		case n.kind == tar.TypeDir && old.kind == tar.TypeSymlink:
			return nil
		case n.kind != tar.TypeDir && old.kind == tar.TypeDir:
			return fmt.Errorf("/%s: is a directory already", key)
		}
	}
	t.nodes[key] = n
	return nil
}

// putFile places a regular file with the content of r.
func (t *tree) putFile(name string, r io.Reader, n node) error {
	n.kind = tar.TypeReg
	n.offset = t.end
	room := t.limit - t.end
	size, err := io.Copy(io.NewOffsetWriter(t.spool, t.end), io.LimitReader(r, room+1))
	if err != nil {
		return fmt.Errorf("storing %s: %w", name, err)
	}
	if size > room {
		return fmt.Errorf("storing %s: the image holds more than %d bytes", name, t.limit)
	}
	n.size = size
	t.end += size
	return t.put(name, &n)
}

// putBytes places a regular file with the given content, owned by root.
func (t *tree) putBytes(name string, content []byte, mode int64) error {
	return t.putFile(name, bytes.NewReader(content), node{mode: mode, modTime: fixedTime})
}

// content returns what a regular file holds.
func (t *tree) content(n *node) *io.SectionReader {
	return io.NewSectionReader(t.spool, n.offset, n.size)
}

// readFile returns the content of the regular file at name.
func (t *tree) readFile(name string) ([]byte, error) {
	n, err := t.lookup(name)
	if err != nil {
		return nil, err
	}
	if n.kind != tar.TypeReg {
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
	return io.ReadAll(t.content(n))
}

// remove drops every path that matches the pattern, with what is below it.
func (t *tree) remove(pattern string) int {
	pattern = strings.TrimPrefix(pattern, "/")
	depth := strings.Count(pattern, "/") + 1
	removed := 0
	for key := range t.nodes {
		elements := strings.SplitN(key, "/", depth+1)
		if len(elements) < depth {
			continue
		}
		if ok, _ := path.Match(pattern, strings.Join(elements[:depth], "/")); ok {
			delete(t.nodes, key)
			removed++
		}
	}
	return removed
}

// addTar unpacks a tar stream into the tree.
func (t *tree) addTar(r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		header, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading tar: %w", err)
		}
		if err := t.addTarEntry(header, tr); err != nil {
			return err
		}
	}
}

func (t *tree) addTarEntry(header *tar.Header, r io.Reader) error {
	n := node{
		kind: header.Typeflag, mode: header.Mode & 0o7777, uid: header.Uid, gid: header.Gid,
		modTime: header.ModTime.Truncate(time.Second).UTC(),
	}
	switch header.Typeflag {
	case tar.TypeReg:
		return t.putFile(header.Name, r, n)
	case tar.TypeDir, tar.TypeFifo:
	case tar.TypeSymlink:
		n.target = header.Linkname
	case tar.TypeChar, tar.TypeBlock:
		n.major, n.minor = header.Devmajor, header.Devminor
	case tar.TypeLink:
		linked, err := t.lookup(header.Linkname)
		if err != nil {
			return fmt.Errorf("hard link %s: %w", header.Name, err)
		}
		return t.put(header.Name, linked)
	default:
		return fmt.Errorf("%s: unknown tar entry type %q", header.Name, header.Typeflag)
	}
	return t.put(header.Name, &n)
}

// writeTar writes the tree as an OCI layer: sorted, without names of users.
func (t *tree) writeTar(w io.Writer) error {
	keys := make([]string, 0, len(t.nodes))
	for key := range t.nodes {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	tw := tar.NewWriter(w)
	first := make(map[*node]string)
	for _, key := range keys {
		n := t.nodes[key]
		header := &tar.Header{
			Typeflag: n.kind, Name: key, Linkname: n.target, Mode: n.mode, Uid: n.uid, Gid: n.gid,
			Size: n.size, ModTime: n.modTime, Devmajor: n.major, Devminor: n.minor,
		}
		linked := ""
		if n.kind == tar.TypeReg {
			linked = first[n]
			first[n] = key
		}
		switch {
		case n.kind == tar.TypeDir:
			header.Name += "/"
		case linked != "":
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, linked, 0
		}
		if err := tw.WriteHeader(header); err != nil {
			return fmt.Errorf("writing layer entry %s: %w", key, err)
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		if _, err := io.Copy(tw, t.content(n)); err != nil {
			return fmt.Errorf("writing layer entry %s: %w", key, err)
		}
	}
	return tw.Close()
}
