package volumes

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
)

// Bounds of one pushed volume. A ConfigMap or Secret has at most 1 MiB, a projected volume several of
// them.
const (
	maxTreeBytes = 32 << 20
	maxTreeFiles = 8192
	maxTreeDepth = 32
)

// ErrTooLarge is wrapped when a volume exceeds the bounds above.
var ErrTooLarge = errors.New("too large")

// errChanged: the tree was switched while it was read.
var errChanged = errors.New("volume changed while it was read")

// dataLink is the link that the kubelet's AtomicWriter switches to publish a new tree.
const dataLink = "..data"

type digest [sha256.Size]byte

// Tree is the content of a volume directory.
type Tree struct {
	Files  []*guestv1.File // parents first; the first is the root, "."
	Digest digest
}

// ReadTree reads a directory that the kubelet writes. Modes, owners and links are kept as they are;
// times are not part of it.
func ReadTree(dir string) (Tree, error) {
	for range 10 {
		t, err := readTree(dir)
		if !errors.Is(err, errChanged) && !errors.Is(err, fs.ErrNotExist) {
			return t, err
		}
		if _, serr := os.Stat(dir); serr != nil {
			return Tree{}, err
		}
	}
	return Tree{}, errChanged
}

func readTree(dir string) (Tree, error) {
	before, _ := os.Readlink(path.Join(dir, dataLink)) // "" for a volume without the link
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Tree{}, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	r := treeReader{}
	if err := r.dir(root, ".", 0); err != nil {
		return Tree{}, err
	}
	if after, _ := os.Readlink(path.Join(dir, dataLink)); after != before {
		return Tree{}, errChanged
	}
	return Tree{Files: r.files, Digest: digestOf(r.files)}, nil
}

type treeReader struct {
	files []*guestv1.File
	bytes int64
}

// dir reads the directory that fd is open on, and closes it.
func (r *treeReader) dir(fd int, name string, depth int) error {
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	if depth > maxTreeDepth {
		return fmt.Errorf("%w: more than %d directories deep", ErrTooLarge, maxTreeDepth)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if err := r.add(&guestv1.File{Path: name, Mode: st.Mode, Uid: st.Uid, Gid: st.Gid}); err != nil {
		return err
	}
	entries, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := r.entry(fd, path.Join(name, e.Name()), e.Name(), depth); err != nil {
			return err
		}
	}
	return nil
}

func (r *treeReader) entry(dir int, name, base string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	f := &guestv1.File{Path: name, Mode: st.Mode, Uid: st.Uid, Gid: st.Gid}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return r.dir(fd, name, depth+1)
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, base, buf)
		if err != nil {
			return &fs.PathError{Op: "readlink", Path: name, Err: err}
		}
		f.Target = string(buf[:n])
	case unix.S_IFREG:
		fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: name, Err: err}
		}
		if f.Data, err = readAll(os.NewFile(uintptr(fd), name), maxTreeBytes-r.bytes); err != nil {
			return err
		}
	default:
		return nil // the kubelet makes no sockets or devices
	}
	return r.add(f)
}

// readAll reads and closes a file.
func readAll(f *os.File, limit int64) ([]byte, error) {
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, maxTreeBytes)
	}
	return data, nil
}

func (r *treeReader) add(f *guestv1.File) error {
	r.bytes += int64(len(f.Data))
	r.files = append(r.files, f)
	if len(r.files) > maxTreeFiles {
		return fmt.Errorf("%w: more than %d files", ErrTooLarge, maxTreeFiles)
	}
	return nil
}

// readSingle reads one file, whatever its name is.
func readSingle(name string) (*guestv1.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.Join(errors.New("not a regular file"), f.Close())
	}
	data, err := readAll(f, maxTreeBytes)
	if err != nil {
		return nil, err
	}
	return &guestv1.File{Mode: st.Mode, Uid: st.Uid, Gid: st.Gid, Data: data}, nil
}

// digestOf tells trees apart.
func digestOf(files []*guestv1.File) digest {
	h := sha256.New()
	field := func(b []byte) {
		h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	for _, f := range files {
		field([]byte(f.Path))
		field(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(
			binary.LittleEndian.AppendUint32(nil, f.Mode), f.Uid), f.Gid))
		field([]byte(f.Target))
		field(f.Data)
	}
	return digest(h.Sum(nil))
}

// fileOverhead is a bound of what a file costs in a message besides its data.
const fileOverhead = 2*unix.PathMax + 64

// Requests cuts files into calls of at most channel.MaxFrame bytes of data. With replace they are the
// whole new content of the volume. The last one commits.
func Requests(volume string, files []*guestv1.File, replace bool) []*guestv1.PutFilesRequest {
	var out []*guestv1.PutFilesRequest
	req := &guestv1.PutFilesRequest{Volume: volume, Replace: replace}
	data, size := 0, 0
	flush := func() {
		out = append(out, req)
		req, data, size = &guestv1.PutFilesRequest{Volume: volume}, 0, 0
	}
	for _, f := range files {
		for rest, first := f.Data, true; first || len(rest) > 0; first = false {
			if data >= channel.MaxFrame || size >= 3*channel.MaxFrame-fileOverhead {
				flush()
			}
			n := min(len(rest), channel.MaxFrame-data)
			req.Files = append(req.Files, &guestv1.File{
				Path: f.Path, Mode: f.Mode, Uid: f.Uid, Gid: f.Gid, Target: f.Target, Data: rest[:n], Append: !first,
			})
			rest = rest[n:]
			data += n
			size += n + len(f.Path) + len(f.Target) + 64
		}
	}
	req.Commit = true
	flush()
	return out
}
