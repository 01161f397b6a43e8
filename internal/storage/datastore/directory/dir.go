package directory

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
)

// dir is a place in a directory:
//
//	datastore.json        what makes the directory a datastore: its id
//	lock                  nothing in it; byte ranges of it are locked
//	volumes/<id>.json     records
//	snapshots/<id>.json
//	layers/<layer>.img    images; <layer>.img.new is one that is being made
type dir struct {
	path   string
	id     string // "" is any
	layers *layerDir
}

// markFormat is the version of the layout.
const markFormat = 1

// markFile and lockFile are the names of the first two.
const (
	markFile = "datastore.json"
	lockFile = "lock"
	suffix   = ".json"
)

// mark is the content of the mark file.
type mark struct {
	Format  int       `json:"format"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

// Init makes an empty or missing directory a datastore, unless it is one. It returns the id.
func (d *dir) Init() (string, error) {
	switch m, err := d.mark(); {
	case err == nil:
		return m.ID, d.dirs()
	case !errors.Is(err, fs.ErrNotExist):
		return "", err
	case d.id != "":
		return "", fmt.Errorf("%w: %s is not datastore %s (not mounted?)", datastore.ErrUnavailable, d.path, d.id)
	}
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		return "", chain.Unavailable(err)
	}
	found, err := os.ReadDir(d.path)
	if err != nil {
		return "", chain.Unavailable(err)
	}
	for _, e := range found {
		switch e.Name() {
		case lockFile, string(chain.Volumes), string(chain.Snapshots), layersDir, "lost+found": // an interrupted init
		default:
			if !strings.HasPrefix(e.Name(), "."+markFile+".") {
				return "", fmt.Errorf("%w: %s is not empty and is no datastore: it has %s", datastore.ErrInvalid, d.path, e.Name())
			}
		}
	}
	if err := d.dirs(); err != nil {
		return "", err
	}
	m := mark{Format: markFormat, ID: "d" + strings.ToLower(rand.Text()), Created: time.Now().UTC()}
	b, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("encoding %s: %w", markFile, err)
	}
	if err := atomicfile.Write(filepath.Join(d.path, markFile), append(b, '\n'), 0o600); err != nil {
		return "", chain.NoSpace(err)
	}
	return m.ID, nil
}

// dirs makes the directories below.
func (d *dir) dirs() error {
	for _, name := range []string{string(chain.Volumes), string(chain.Snapshots), layersDir} {
		if err := os.Mkdir(filepath.Join(d.path, name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return chain.Unavailable(err)
		}
	}
	f, err := os.OpenFile(filepath.Join(d.path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return chain.Unavailable(err)
	}
	return f.Close()
}

// mark reads the mark file.
func (d *dir) mark() (mark, error) {
	var m mark
	b, err := os.ReadFile(filepath.Join(d.path, markFile))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return m, err
		}
		return m, chain.Unavailable(err)
	}
	if err := json.Unmarshal(b, &m); err != nil || m.ID == "" {
		return m, fmt.Errorf("%w: %s", datastore.ErrCorrupt, filepath.Join(d.path, markFile))
	}
	if m.Format != markFormat {
		return m, fmt.Errorf("%w: %s has format %d", datastore.ErrCorrupt, d.path, m.Format)
	}
	return m, nil
}

func (d *dir) Ready() error {
	m, err := d.mark()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s is no datastore (not mounted, or removed?)", datastore.ErrUnavailable, d.path)
	case err != nil:
		return err
	case d.id != "" && m.ID != d.id:
		return fmt.Errorf("%w: %s is datastore %s, not %s", datastore.ErrUnavailable, d.path, m.ID, d.id)
	}
	return nil
}

// file is the path of a record.
func (d *dir) file(k chain.Kind, id string) string {
	return filepath.Join(d.path, string(k), id+suffix)
}

func (d *dir) List(k chain.Kind) (ids, strays []string, err error) {
	found, err := os.ReadDir(filepath.Join(d.path, string(k)))
	if err != nil {
		return nil, nil, chain.Unavailable(err)
	}
	for _, e := range found {
		id, ok := strings.CutSuffix(e.Name(), suffix)
		if ok && e.Type().IsRegular() && chain.ValidID(id) {
			ids = append(ids, id)
		} else if !halfRecord(e.Name()) {
			strays = append(strays, filepath.Join(d.path, string(k), e.Name()))
		}
	}
	return ids, strays, nil
}

// maxRecord bounds what is read of a record.
const maxRecord = 1 << 20

func (d *dir) Read(k chain.Kind, id string) ([]byte, error) {
	f, err := os.OpenFile(d.file(k, id), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return nil, chain.Unavailable(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, chain.Unavailable(err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxRecord {
		return nil, fmt.Errorf("%w: %s is no record", datastore.ErrCorrupt, f.Name())
	}
	b := make([]byte, info.Size())
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, chain.Unavailable(err)
	}
	return b, nil
}

func (d *dir) Write(k chain.Kind, id string, data []byte) error {
	return chain.NoSpace(atomicfile.Write(d.file(k, id), data, 0o600))
}

func (d *dir) Remove(k chain.Kind, id string) error {
	if err := os.Remove(d.file(k, id)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return chain.Unavailable(err)
	}
	return syncDir(filepath.Join(d.path, string(k)))
}

func (d *dir) Space() (capacity, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.path, &st); err != nil {
		return 0, 0, chain.Unavailable(err)
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

func (d *dir) Images() chain.Images { return d.layers }

func (d *dir) Locker() chain.Locker { return &fileLocks{path: filepath.Join(d.path, lockFile)} }

// Sweep removes what an interrupted replacement of a record has left. The lock of the store is held, and
// nothing younger than a minute is touched, since records are written without it.
func (d *dir) Sweep() error {
	for _, k := range chain.Kinds() {
		half, err := filepath.Glob(filepath.Join(d.path, string(k), ".*"+suffix+".*"))
		if err != nil {
			return chain.Unavailable(err)
		}
		for _, path := range half {
			info, err := os.Lstat(path)
			if err != nil || !info.Mode().IsRegular() || time.Since(info.ModTime()) < time.Minute {
				continue
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return chain.Unavailable(err)
			}
		}
	}
	return nil
}

// halfRecord recognises the temporary files of package atomicfile.
func halfRecord(name string) bool {
	name, ok := strings.CutPrefix(name, ".")
	return ok && strings.Contains(name, suffix+".")
}

// syncDir makes changes of a directory durable.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return chain.Unavailable(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return chain.Unavailable(err)
	}
	return nil
}
