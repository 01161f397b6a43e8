// Package volume keeps a pod's volumes inside the guest: directories on the scratch disk, tmpfs,
// trees the host pushes file by file (ConfigMaps, Secrets, /etc/hosts), and disks of their own.
//
// Guest init's service calls it. Containers write into volumes while it works on them, so every
// path below a volume is resolved by the kernel beneath the volume's root and without following
// links (openat2); a hostile container can spoil its own volume and nothing else.
package volume

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/usage"
)

// Kind says where a volume's data is.
type Kind int

// The kinds of volumes; see CreateVolumeRequest.
const (
	Scratch Kind = iota
	Memory
	Pushed
	Image
	OnDisk // a file system on a disk of its own
	Block  // a disk without a directory
)

var (
	// ErrNotFound is wrapped when there is no such volume or file.
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped when the volume exists.
	ErrExists = errors.New("already exists")
	// ErrInvalid is wrapped when a path or request makes no sense.
	ErrInvalid = errors.New("invalid")
)

// Config says where things are. All directories must exist when volumes are created.
type Config struct {
	Dir     string // Memory and Pushed volumes; the prefix of bind sources
	Stage   string // same file system as Dir: pushed files before they are committed
	Scratch string // Scratch and Image volumes
}

// Store holds the volumes of the pod.
type Store struct {
	cfg   Config
	meter *usage.Meter

	mu      sync.Mutex
	volumes map[string]*Volume
}

// Volume is one volume.
type Volume struct {
	ID   string
	Kind Kind
	Root string // its directory
	Disk Disk   // of OnDisk and Block

	mu     sync.Mutex // serializes pushes and the filling from an image
	push   *push
	filled bool

	dir *usage.Dir // scratch volumes
}

// New returns an empty store. meter measures what is under cfg.Scratch.
func New(cfg Config, meter *usage.Meter) *Store {
	return &Store{cfg: cfg, meter: meter, volumes: map[string]*Volume{}}
}

// Create makes a volume. size limits a Memory volume (0: half of memory) and, where the scratch
// file system has quota, a Scratch volume (0: no limit); mode, uid and gid are of its root
// directory.
func (s *Store) Create(id string, kind Kind, size uint64, mode, uid, gid uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.volumes[id]; ok {
		return fmt.Errorf("volume %s: %w", id, ErrExists)
	}
	root := filepath.Join(s.cfg.Dir, id)
	if kind == Scratch || kind == Image {
		root = filepath.Join(s.cfg.Scratch, id)
	}
	if mode == 0 {
		mode = 0o755
	}
	if err := unix.Mkdir(root, 0o700); err != nil {
		return fmt.Errorf("making volume %s: %w", id, err)
	}
	if kind == Memory {
		options := "mode=0700"
		if size > 0 {
			options += fmt.Sprintf(",size=%d", size)
		}
		if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
			return fmt.Errorf("mounting volume %s: %w", id, err)
		}
	}
	if err := unix.Chown(root, int(uid), int(gid)); err != nil {
		return fmt.Errorf("setting owner of volume %s: %w", id, err)
	}
	if err := unix.Chmod(root, mode&0o7777); err != nil {
		return fmt.Errorf("setting mode of volume %s: %w", id, err)
	}
	v := &Volume{ID: id, Kind: kind, Root: root}
	if kind == Scratch || kind == Image {
		dir, err := s.meter.Track(root, size)
		if err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
		v.dir = dir
	}
	s.volumes[id] = v
	return nil
}

// Usage is what the volume takes. Pushed volumes are small and not measured.
func (v *Volume) Usage() (usage.Usage, error) {
	switch v.Kind {
	case Memory, OnDisk:
		u, _, _, err := usage.FileSystem(v.Root)
		return u, err
	case Pushed, Block:
		return usage.Usage{}, nil
	default:
		return v.dir.Usage()
	}
}

// Get returns a volume by id.
func (s *Store) Get(id string) (*Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[id]
	if v == nil {
		return nil, fmt.Errorf("volume %s: %w", id, ErrNotFound)
	}
	return v, nil
}

// Remove deletes a volume and its content; one that is not there is fine.
func (s *Store) Remove(id string) error {
	s.mu.Lock()
	v := s.volumes[id]
	delete(s.volumes, id)
	s.mu.Unlock()
	if v == nil {
		return nil
	}
	if v.Kind == Memory {
		if err := unix.Unmount(v.Root, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmounting volume %s: %w", id, err)
		}
	}
	if err := os.RemoveAll(v.Root); err != nil {
		return fmt.Errorf("removing volume %s: %w", id, err)
	}
	return nil
}

// List returns all volumes.
func (s *Store) List() []*Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*Volume, 0, len(s.volumes))
	for _, v := range s.volumes {
		if v != nil {
			list = append(list, v)
		}
	}
	return list
}

// Source is where a bind mount comes from.
type Source struct {
	Root string // directory the source may not leave
	Sub  string // below Root, "" for Root itself
	Dir  bool
}

// Source resolves the source of a bind mount, Dir/<id> or Dir/<id>/<path>. A path that does not
// exist is made, as the kubelet does for subPath: directories with the mode and group of the root.
func (s *Store) Source(source string) (Source, error) {
	rest, ok := strings.CutPrefix(path.Clean(source), s.cfg.Dir+"/")
	if !ok {
		return Source{}, fmt.Errorf("bind source %s is not a volume: %w", source, ErrInvalid)
	}
	id, sub, _ := strings.Cut(rest, "/")
	v, err := s.Get(id)
	if err != nil {
		return Source{}, err
	}
	if v.Kind == Block {
		return Source{}, fmt.Errorf("volume %s is a device and cannot be mounted: %w", id, ErrInvalid)
	}
	if sub == "" {
		return Source{Root: v.Root, Dir: true}, nil
	}
	dir, err := v.ensure(sub)
	if err != nil {
		return Source{}, fmt.Errorf("path %s in volume %s: %w", sub, id, err)
	}
	return Source{Root: v.Root, Sub: sub, Dir: dir}, nil
}

// ensure makes the directories of a path that are missing and reports whether it is a directory.
// Links are followed as long as they stay in the volume.
func (v *Volume) ensure(sub string) (dir bool, err error) {
	if err := checkPath(sub); err != nil {
		return false, err
	}
	root, err := openDir(v.Root)
	if err != nil {
		return false, err
	}
	defer closeFD(root)
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := unix.Openat2(root, sub, how)
	if errors.Is(err, unix.ENOENT) && v.Kind != Pushed {
		if err = mkdirs(root, sub); err != nil {
			return false, err
		}
		fd, err = unix.Openat2(root, sub, how)
	}
	if err != nil {
		return false, err
	}
	defer closeFD(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// mkdirs makes every missing directory of sub below root.
func mkdirs(root int, sub string) error {
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return err
	}
	parent := root
	defer func() {
		if parent != root {
			closeFD(parent)
		}
	}()
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	}
	done := ""
	for name := range strings.SplitSeq(sub, "/") {
		made := false
		if err := unix.Mkdirat(parent, name, 0o700); err == nil {
			made = true
		} else if !errors.Is(err, unix.EEXIST) {
			return err
		}
		done = path.Join(done, name)
		// From the root each time: a link on the way may go up and stay beneath it.
		fd, err := unix.Openat2(root, done, how)
		if err != nil {
			return err
		}
		if parent != root {
			closeFD(parent)
		}
		parent = fd
		if made {
			if err := unix.Fchownat(fd, "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH); err != nil {
				return err
			}
			if err := os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), fileMode(st.Mode)); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileMode converts permission, set-id and sticky bits.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	if mode&unix.S_ISUID != 0 {
		m |= os.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= os.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= os.ModeSticky
	}
	return m
}

// checkPath accepts clean relative paths without ".." components.
func checkPath(p string) error {
	if p == "" || len(p) > unix.PathMax-1 || p[0] == '/' || path.Clean(p) != p || strings.IndexByte(p, 0) >= 0 {
		return fmt.Errorf("%w path %q", ErrInvalid, p)
	}
	if p == ".." || strings.HasPrefix(p, "../") {
		return fmt.Errorf("%w path %q", ErrInvalid, p)
	}
	return nil
}

func openDir(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening %s: %w", dir, err)
	}
	return fd, nil
}

func closeFD(fd int) { _ = unix.Close(fd) }
