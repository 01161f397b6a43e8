// Package initramfs writes cpio archives in the "newc" format, which the kernel unpacks into its
// first root file system. See Documentation/driver-api/early-userspace/buffer-format.rst in the
// kernel source.
//
// It writes files, directories, symlinks and device nodes, all owned by root, with no time stamps,
// so that the same entries always make the same bytes. It does not compress: under QEMU that only
// costs start time. Package vm calls it to build a template.
package initramfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry is one file of the archive. Exactly one of Content, File, Link, Dir and Device says what
// it is; an entry with none of them is an empty file. Parent directories that have no entry of
// their own are made with mode 0755.
type Entry struct {
	Path    string      // absolute and clean
	Mode    os.FileMode // permission bits, with os.ModeSetuid and the like
	Content []byte      // content of a regular file
	File    string      // path of a host file to copy the content from
	Link    string      // target of a symlink
	Dir     bool        // a directory
	Device  *Device     // a character or block device
}

// Device is a device node.
type Device struct {
	Block        bool
	Major, Minor uint32
}

// header is what precedes the content of each archive member.
type header struct {
	mode         uint32
	size         int64
	major, minor uint32
}

// Write writes the archive for entries, in their order.
func Write(w io.Writer, entries []Entry) error {
	a := archive{w: bufio.NewWriterSize(w, 1<<16), seen: map[string]bool{"/": true}}
	for _, e := range entries {
		if err := a.add(e); err != nil {
			return fmt.Errorf("adding %q to the initramfs: %w", e.Path, err)
		}
	}
	if err := a.member("TRAILER!!!", header{}, nil); err != nil {
		return fmt.Errorf("writing the initramfs: %w", err)
	}
	if err := a.w.Flush(); err != nil {
		return fmt.Errorf("writing the initramfs: %w", err)
	}
	return nil
}

// archive is an archive being written.
type archive struct {
	w    *bufio.Writer
	n    int64 // bytes written
	ino  uint32
	seen map[string]bool
}

func (a *archive) add(e Entry) error {
	if !path.IsAbs(e.Path) || path.Clean(e.Path) != e.Path || strings.ContainsRune(e.Path, 0) {
		return errors.New("path is not absolute and clean")
	}
	if a.seen[e.Path] {
		return errors.New("path is there already")
	}
	if err := a.parents(path.Dir(e.Path)); err != nil {
		return err
	}
	a.seen[e.Path] = true
	name := strings.TrimPrefix(e.Path, "/")
	h := header{mode: permissions(e.Mode)}
	kinds := 0
	var content io.Reader
	if e.Dir {
		kinds++
		h.mode |= unix.S_IFDIR
	}
	if e.Link != "" {
		kinds++
		h.mode, h.size, content = unix.S_IFLNK|0o777, int64(len(e.Link)), strings.NewReader(e.Link)
	}
	if d := e.Device; d != nil {
		kinds++
		h.major, h.minor = d.Major, d.Minor
		h.mode |= unix.S_IFCHR
		if d.Block {
			h.mode = permissions(e.Mode) | unix.S_IFBLK
		}
	}
	if e.Content != nil {
		kinds++
		content = strings.NewReader(string(e.Content))
	}
	if e.File != "" {
		kinds++
		f, err := os.Open(e.File)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if !st.Mode().IsRegular() {
			return fmt.Errorf("%s is no regular file", e.File)
		}
		h.size, content = st.Size(), f
	}
	if kinds > 1 {
		return errors.New("more than one kind of content")
	}
	if h.mode&unix.S_IFMT == 0 {
		h.mode |= unix.S_IFREG
		h.size = max(h.size, int64(len(e.Content)))
	}
	return a.member(name, h, content)
}

// parents makes the directories above an entry that have not been made yet.
func (a *archive) parents(dir string) error {
	if a.seen[dir] {
		return nil
	}
	if err := a.parents(path.Dir(dir)); err != nil {
		return err
	}
	a.seen[dir] = true
	return a.member(strings.TrimPrefix(dir, "/"), header{mode: unix.S_IFDIR | 0o755}, nil)
}

// member writes one header, name and content, each padded to four bytes.
func (a *archive) member(name string, h header, content io.Reader) error {
	const maxSize = 1<<32 - 1
	if h.size > maxSize || len(name) >= unix.PathMax {
		return errors.New("too large for the format")
	}
	a.ino++
	nlink := 1
	if h.mode&unix.S_IFMT == unix.S_IFDIR {
		nlink = 2
	}
	text := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.ino, h.mode, 0, 0, nlink, 0, h.size, 0, 0, h.major, h.minor, len(name)+1, 0, name)
	n, err := a.w.WriteString(text)
	a.n += int64(n)
	if err != nil {
		return err
	}
	if err := a.pad(); err != nil {
		return err
	}
	if h.size > 0 {
		m, err := io.CopyN(a.w, content, h.size)
		a.n += m
		if err != nil {
			return fmt.Errorf("copying content: %w", err)
		}
	}
	return a.pad()
}

func (a *archive) pad() error {
	n, err := a.w.Write(make([]byte, -a.n&3))
	a.n += int64(n)
	return err
}

// permissions turns Go's mode bits into those of the kernel.
func permissions(m os.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&os.ModeSetuid != 0 {
		bits |= unix.S_ISUID
	}
	if m&os.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	if m&os.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	return bits
}
