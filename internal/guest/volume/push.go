package volume

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// dataLink is the name of the link that the kubelet's AtomicWriter switches.
const dataLink = "..data"

// File is one entry of a pushed tree; see the message File of the protocol.
type File struct {
	Path   string
	Mode   uint32
	UID    uint32
	GID    uint32
	Data   []byte
	Target string
	Append bool
}

// push is an uncommitted push: files are in stage, a tree of the shape the volume will have.
type push struct {
	stage   string
	replace bool
	root    *File
	order   []File // directories and files without data, links with target, as they came
	seen    map[string]bool
}

// Put adds files to the current push and, with commit, makes it visible. replace starts a push
// that is the whole new content of the volume; otherwise named files are written in place.
func (s *Store) Put(id string, files []File, replace, commit bool) error {
	v, err := s.Get(id)
	if err != nil {
		return err
	}
	if v.Kind != Pushed {
		return fmt.Errorf("volume %s is not written by the host: %w", id, ErrInvalid)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if replace || v.push == nil {
		if err := v.begin(filepath.Join(s.cfg.Stage, id), replace); err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
	}
	for _, f := range files {
		if err := v.push.add(f); err != nil {
			return fmt.Errorf("volume %s: staging %q: %w", id, f.Path, err)
		}
	}
	if !commit {
		return nil
	}
	p := v.push
	v.push = nil
	err = p.commit(v.Root)
	if rerr := os.RemoveAll(p.stage); err == nil && rerr != nil {
		err = rerr
	}
	if err != nil {
		return fmt.Errorf("volume %s: committing: %w", id, err)
	}
	return nil
}

func (v *Volume) begin(stage string, replace bool) error {
	v.push = nil
	if err := os.RemoveAll(stage); err != nil {
		return err
	}
	if err := os.Mkdir(stage, 0o700); err != nil {
		return err
	}
	v.push = &push{stage: stage, replace: replace, seen: map[string]bool{}}
	return nil
}

// add stages one file or a chunk of one. Nothing but this code writes into the stage.
func (p *push) add(f File) error {
	if err := checkPath(f.Path); err != nil {
		return err
	}
	kind := f.Mode & unix.S_IFMT
	if f.Path == "." {
		if kind != unix.S_IFDIR {
			return fmt.Errorf("%w: the root is a directory", ErrInvalid)
		}
		p.root = &f
		return nil
	}
	name := filepath.Join(p.stage, f.Path)
	if err := p.parents(f.Path); err != nil {
		return err
	}
	var err error
	switch kind {
	case unix.S_IFDIR:
		if err = os.Mkdir(name, 0o700); errors.Is(err, os.ErrExist) {
			err = nil
		}
	case unix.S_IFLNK:
		err = os.Symlink(f.Target, name)
	case unix.S_IFREG:
		err = stageFile(name, f)
	default:
		err = fmt.Errorf("%w: type %o", ErrInvalid, kind)
	}
	if err != nil {
		return err
	}
	if err := unix.Lchown(name, int(f.UID), int(f.GID)); err != nil {
		return err
	}
	if kind != unix.S_IFLNK {
		if err := unix.Chmod(name, f.Mode&0o7777); err != nil {
			return err
		}
	}
	if !p.seen[f.Path] {
		p.seen[f.Path] = true
		f.Data = nil
		p.order = append(p.order, f)
	}
	return nil
}

// parents makes the directories of a path in the stage. A component that is something else is an
// error: a link there would be followed.
func (p *push) parents(file string) error {
	for i := range len(file) {
		if file[i] != '/' {
			continue
		}
		name := filepath.Join(p.stage, file[:i])
		var st unix.Stat_t
		err := unix.Lstat(name, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
			if err = os.Mkdir(name, 0o755); err == nil {
				err = os.Chmod(name, 0o755)
			}
		case err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR:
			err = fmt.Errorf("%w: %s is not a directory", ErrInvalid, file[:i])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func stageFile(name string, f File) error {
	flags := unix.O_WRONLY | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if f.Append {
		flags |= unix.O_APPEND
	} else {
		flags |= unix.O_TRUNC
	}
	file, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(f.Data)
	return errors.Join(err, file.Close())
}

func (p *push) commit(volume string) error {
	stage, err := openDir(p.stage)
	if err != nil {
		return err
	}
	defer closeFD(stage)
	root, err := openDir(volume)
	if err != nil {
		return err
	}
	defer closeFD(root)
	if p.replace {
		err = p.commitTree(stage, root)
	} else {
		err = p.commitFiles(stage, root)
	}
	if err != nil || p.root == nil {
		return err
	}
	if err := unix.Fchownat(root, "", int(p.root.UID), int(p.root.GID), unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	return unix.Chmod(volume, p.root.Mode&0o7777)
}

// commitTree switches the whole volume: new top-level entries are moved in whole, "..data" is
// renamed over the old one after them, and what the push did not name goes last. A reader that
// comes through "..data" sees the old tree or the new one.
func (p *push) commitTree(stage, root int) error {
	keep, data := map[string]bool{}, false
	for _, f := range p.order {
		top, _, _ := strings.Cut(f.Path, "/")
		if keep[top] {
			continue
		}
		keep[top] = true
		if top == dataLink {
			data = true
			continue
		}
		if err := moveIn(stage, root, top); err != nil {
			return fmt.Errorf("moving %s: %w", top, err)
		}
	}
	if data {
		if err := moveIn(stage, root, dataLink); err != nil {
			return fmt.Errorf("switching %s: %w", dataLink, err)
		}
	}
	return removeOthers(root, keep)
}

// moveIn replaces root/name by stage/name in one step; the old one lands in the stage. A link that
// already says the same stays, so that watchers are not woken for nothing.
func moveIn(stage, root int, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(root, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return unix.Renameat2(stage, name, root, name, unix.RENAME_NOREPLACE)
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if a, err := readlinkat(stage, name); err == nil {
			if b, err := readlinkat(root, name); err == nil && a == b {
				return nil
			}
			return unix.Renameat(stage, name, root, name)
		}
	}
	return unix.Renameat2(stage, name, root, name, unix.RENAME_EXCHANGE)
}

func readlinkat(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

func removeOthers(root int, keep map[string]bool) error {
	dir := fmt.Sprintf("/proc/self/fd/%d", root)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if keep[e.Name()] {
			continue
		}
		// RemoveAll works by openat and never follows a link below dir.
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// commitFiles writes the named files in place: a bind mount of a file shows its inode, so the inode
// stays and the content changes.
func (p *push) commitFiles(stage, root int) error {
	for _, f := range p.order {
		if err := commitFile(stage, root, f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return nil
}

func commitFile(stage, root int, f File) error {
	dir, base := path.Split(f.Path)
	parent := root
	if dir = strings.TrimSuffix(dir, "/"); dir != "" {
		if err := mkdirs(root, dir); err != nil {
			return err
		}
		fd, err := openBeneath(root, dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer closeFD(fd)
		parent = fd
	}
	if f.Mode&unix.S_IFMT == unix.S_IFDIR {
		return commitDir(parent, base, f)
	}
	old, err := openBeneath(parent, base, unix.O_WRONLY|unix.O_NONBLOCK)
	if err != nil || f.Mode&unix.S_IFMT == unix.S_IFLNK {
		if err == nil {
			closeFD(old)
		}
		return unix.Renameat(stage, f.Path, parent, base)
	}
	dst := os.NewFile(uintptr(old), f.Path)
	defer dst.Close()
	var st unix.Stat_t
	if err := unix.Fstat(old, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.Renameat(stage, f.Path, parent, base)
	}
	fd, err := openBeneath(stage, f.Path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(fd), f.Path)
	defer src.Close()
	if err := dst.Truncate(0); err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		return err
	}
	if err := dst.Chown(int(f.UID), int(f.GID)); err != nil {
		return err
	}
	return dst.Chmod(fileMode(f.Mode))
}

func commitDir(parent int, base string, f File) error {
	if err := unix.Mkdirat(parent, base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	fd, err := openBeneath(parent, base, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if err := unix.Fchown(fd, int(f.UID), int(f.GID)); err != nil {
		return err
	}
	return unix.Fchmod(fd, f.Mode&0o7777)
}

// openBeneath opens a path below dir without following any link.
func openBeneath(dir int, name string, flags uint64) (int, error) {
	return unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// Tail reads the last limit bytes of a regular file in a pushed volume.
func (s *Store) Tail(id, file string, limit int64) ([]byte, error) {
	v, err := s.Get(id)
	if err != nil {
		return nil, err
	}
	if err := checkPath(file); err != nil {
		return nil, err
	}
	root, err := openDir(v.Root)
	if err != nil {
		return nil, err
	}
	defer closeFD(root)
	fd, err := openBeneath(root, file, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENOENT) {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("volume %s: opening %s: %w", id, file, err)
	}
	f := os.NewFile(uintptr(fd), file)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", id, err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("volume %s: %s is not a regular file: %w", id, file, ErrInvalid)
	}
	if st.Size() > limit {
		if _, err := f.Seek(st.Size()-limit, io.SeekStart); err != nil {
			return nil, fmt.Errorf("volume %s: %w", id, err)
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("volume %s: reading %s: %w", id, file, err)
	}
	return data, nil
}
