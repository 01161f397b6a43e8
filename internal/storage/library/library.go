// Package library keeps images of virtual machines as they came: the content of library items, in a directory.
//
// An item is a directory named by its uid. While it comes, its bytes are in a file called part, which an interrupted
// transfer goes on with; when all of them are there and their checksum is right it becomes original; what is in an
// archive or compressed is unpacked beside it; and when every disk was found to be sound, item.json says so. An item
// without item.json is no item to anybody. docs/decisions/0014-images.md says why originals are kept.
//
//	<dir>/<uid>/part, part.json   a transfer under way, and what it is one of
//	<dir>/<uid>/original          the file as it came, unless all of it is unpacked
//	<dir>/<uid>/disk-0 ...        disks that were compressed
//	<dir>/<uid>/item.json         what it is; written last
//
// The directory is for root; files in it can be read by everybody, which only the readers of package convert make
// use of. Several processes may use it at once, but only one brings an item in at a time.
//
// It is not a store of volumes: the agent's importer converts disks into datastores. What can go wrong is told by
// the errors below; anything else (a network that fails, a full file system) may go away and is worth another try.
package library

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/diskimage/ovf"
)

// Errors to tell apart.
var (
	// ErrNotFound: there is no such item, or it is not complete.
	ErrNotFound = errors.New("image has no content yet")
	// ErrChecksum: the bytes are others than was said. They are deleted.
	ErrChecksum = errors.New("checksum does not match")
	// ErrSource: the source cannot be what was meant: a URL that does not exist, a scheme that is not known.
	ErrSource = errors.New("source cannot be used")
	// ErrContent: the bytes are not an image, or one that is refused.
	ErrContent = errors.New("content cannot be used")
	// ErrWaiting: nobody has uploaded everything yet.
	ErrWaiting = errors.New("waiting for the upload")
	// ErrFull: the file system of the directory has no room.
	ErrFull = errors.New("no room for images")
)

// Permanent tells whether trying again is of no use.
func Permanent(err error) bool {
	return errors.Is(err, ErrChecksum) || errors.Is(err, ErrSource) || errors.Is(err, ErrContent)
}

// Names within an item's directory.
const (
	partFile     = "part"
	partInfo     = "part.json"
	originalFile = "original"
	itemFile     = "item.json"
	lockFile     = "lock"
)

// Config of a library.
type Config struct {
	// Dir is the absolute path of the directory; it is made if it is missing.
	Dir string
	// MaxUnpacked bounds what a compressed disk may become, in bytes; 0 is 4 TiB.
	MaxUnpacked int64
	// Reserve is the part of the file system that is not filled; 0 is 0.05.
	Reserve float64
	// Guarded are networks that items which may not reach this host may not reach either: those of the cluster, where
	// this host gets past every network policy.
	Guarded []netip.Prefix
	// AllowLocal lets items that may not reach this host (Source.Guarded) do so; for tests.
	AllowLocal bool
}

// Library is a directory of items.
type Library struct{ cfg Config }

// New checks the configuration.
func New(cfg Config) (*Library, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("image library: the directory %q is not absolute", cfg.Dir)
	}
	if cfg.MaxUnpacked == 0 {
		cfg.MaxUnpacked = 4 << 40
	}
	if cfg.Reserve == 0 {
		cfg.Reserve = 0.05
	}
	return &Library{cfg}, nil
}

// Kind is what an item is, in VMware's words.
type Kind string

// The kinds.
const (
	KindOVF Kind = "OVF"
	KindISO Kind = "ISO"
)

// Item is a complete item.
type Item struct {
	Format int    `json:"format"`
	ID     string `json:"id"`
	Kind   Kind   `json:"kind"`
	// FileName is the name of the file it came as.
	FileName string `json:"fileName,omitempty"`
	// SHA256 is of the file as it came, and SourceBytes its size; Bytes is what the item takes.
	SHA256      string    `json:"sha256"`
	SourceBytes int64     `json:"sourceBytes"`
	Bytes       int64     `json:"bytes"`
	Created     time.Time `json:"created"`
	Disks       []Disk    `json:"disks"`
	// OVF is what came with an OVA.
	OVF *ovf.Descriptor `json:"ovf,omitempty"`
}

// Disk is a disk of an item: part of one of its files.
type Disk struct {
	Name string `json:"name"`
	File string `json:"file"`
	// Offset and Length are where it is in the file; Length 0 is all of it.
	Offset int64          `json:"offset,omitempty"`
	Length int64          `json:"length,omitempty"`
	Info   diskimage.Info `json:"info"`
	// Size is the capacity in bytes: that of the image, or more if the OVF says so.
	Size int64 `json:"size"`
	// Controller is SCSI, SATA, IDE, NVME or "".
	Controller string `json:"controller,omitempty"`
	Bus        int    `json:"bus,omitempty"`
	Unit       int    `json:"unit,omitempty"`
}

const itemFormat = 1

// maxItem bounds what is read of item.json.
const maxItem = 8 << 20

// validID is a uid, or anything as harmless.
func validID(id string) bool {
	return regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`).MatchString(id)
}

// path of a file of an item.
func (l *Library) path(id string, name ...string) string {
	return filepath.Join(append([]string{l.cfg.Dir, id}, name...)...)
}

// dir makes the directory of an item.
func (l *Library) dir(id string) error {
	if !validID(id) {
		return fmt.Errorf("%w: item id %.80q", ErrSource, id)
	}
	if err := os.MkdirAll(l.path(id), 0o700); err != nil {
		return fmt.Errorf("making the directory of image %s: %w", id, full(err))
	}
	return nil
}

// Item returns a complete item. ErrNotFound.
func (l *Library) Item(id string) (Item, error) {
	if !validID(id) {
		return Item{}, fmt.Errorf("%w: item id %.80q", ErrNotFound, id)
	}
	f, err := os.Open(l.path(id, itemFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Item{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return Item{}, fmt.Errorf("reading image %s: %w", id, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxItem))
	if err != nil {
		return Item{}, fmt.Errorf("reading image %s: %w", id, err)
	}
	var i Item
	if err := json.Unmarshal(b, &i); err != nil || i.Format != itemFormat || i.ID != id {
		return Item{}, fmt.Errorf("reading image %s: %s is damaged; delete the library item and import it again", id, f.Name())
	}
	return i, nil
}

// Items returns the ids of all items, complete or not.
func (l *Library) Items() ([]string, error) {
	found, err := os.ReadDir(l.cfg.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing images: %w", err)
	}
	var out []string
	for _, e := range found {
		if e.IsDir() && validID(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// exportPrefix begins the names of directories that files are exported in, exportFor is how long that takes at most.
const (
	exportPrefix = ".export-"
	exportFor    = 24 * time.Hour
)

// Sweep removes what interrupted exports have left.
func (l *Library) Sweep() error {
	found, err := filepath.Glob(filepath.Join(l.cfg.Dir, exportPrefix+"*"))
	if err != nil {
		return fmt.Errorf("sweeping images: %w", err)
	}
	for _, path := range found {
		if info, statErr := os.Lstat(path); statErr == nil && time.Since(info.ModTime()) > exportFor {
			err = errors.Join(err, os.RemoveAll(path))
		}
	}
	return err
}

// Remove removes an item, or what there is of it. No item is no error. What is being read of it can be read on.
func (l *Library) Remove(id string) error {
	if !validID(id) {
		return nil
	}
	if err := os.Remove(l.path(id, itemFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing image %s: %w", id, err)
	}
	if err := os.RemoveAll(l.path(id)); err != nil {
		return fmt.Errorf("removing image %s: %w", id, err)
	}
	return nil
}

// Open returns a disk of an item for package convert; close its File.
func (l *Library) Open(id string, disk int) (convert.Image, Disk, error) {
	i, err := l.Item(id)
	if err != nil {
		return convert.Image{}, Disk{}, err
	}
	if disk < 0 || disk >= len(i.Disks) {
		return convert.Image{}, Disk{}, fmt.Errorf("%w: %s has %d disks, there is no disk %d", ErrNotFound, id, len(i.Disks), disk)
	}
	d := i.Disks[disk]
	f, err := os.Open(l.path(id, filepath.Base(d.File)))
	if err != nil {
		return convert.Image{}, Disk{}, fmt.Errorf("opening image %s: %w", id, err)
	}
	return convert.Image{File: f, Offset: d.Offset, Length: d.Length, Info: d.Info}, d, nil
}

// save writes item.json, after everything else is durable.
func (l *Library) save(i Item) error {
	if err := syncDir(l.path(i.ID)); err != nil {
		return err
	}
	b, err := json.MarshalIndent(i, "", " ")
	if err != nil {
		return fmt.Errorf("encoding image %s: %w", i.ID, err)
	}
	if err := atomicfile.Write(l.path(i.ID, itemFile), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing image %s: %w", i.ID, full(err))
	}
	return nil
}

// room fails when so many more bytes would not fit.
func (l *Library) room(bytes int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(l.cfg.Dir, &st); err != nil {
		return fmt.Errorf("looking for room in %s: %w", l.cfg.Dir, err)
	}
	free := int64(float64(st.Bavail)*float64(st.Bsize) - l.cfg.Reserve*float64(st.Blocks)*float64(st.Bsize))
	if bytes > free {
		return fmt.Errorf("%w: %s has room for %d more bytes, and %d are needed", ErrFull, l.cfg.Dir, max(0, free), bytes)
	}
	return nil
}

// full recognises a full file system.
func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// errBusy: another transfer of the item is under way.
var errBusy = errors.New("another transfer is under way")

// lockWait is how long somebody waits who has bytes to send: who looks at an upload holds the lock for a moment.
const lockWait = 5 * time.Second

// lockSoon is lock, and waits a little.
func (l *Library) lockSoon(ctx context.Context, id string) (func(), error) {
	for deadline := time.Now().Add(lockWait); ; {
		unlock, err := l.lock(id)
		if !errors.Is(err, errBusy) || time.Now().After(deadline) || ctx.Err() != nil {
			return unlock, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(lockWait / 100):
		}
	}
}

// lock takes the lock of an item for as long as the returned function has not been called. It does not wait.
func (l *Library) lock(id string) (func(), error) {
	f, err := os.OpenFile(l.path(id, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking image %s: %w", id, full(err))
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errBusy
		}
		return nil, fmt.Errorf("locking image %s: %w", id, err)
	}
	return func() { _ = f.Close() }, nil
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("syncing %s: %w", path, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("syncing %s: %w", path, err)
	}
	return nil
}

// ctxReader ends with a context.
type ctxReader struct {
	ctx context.Context
	io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
