package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// Defaults of a Config.
const (
	defaultGrace       = 2 * time.Hour
	defaultUntaggedAge = 7 * 24 * time.Hour
	defaultUploadAge   = time.Hour
	// reserveBytes and reservePart of a disk are kept free of images, whichever is less.
	reserveBytes = 2 << 30
	reservePart  = 25
	// threads is how many operations of the file system may run at a time.
	threads = 100
)

// Config of a store.
type Config struct {
	// Dir is where everything is. It is made when missing.
	Dir string
	// Quota of a project in bytes; not ok is no bound.
	Quota func(project string) (limit int64, ok bool)
	// Grace is how long what nothing refers to is kept, 2 hours when zero.
	Grace time.Duration
	// UploadAge is how long an upload that nobody goes on with is kept, one hour when zero: those of an interrupted push count.
	UploadAge time.Duration
	// Reserve are the bytes of the disk that images may not take: 4 % of it and at most 2 GiB when zero.
	Reserve int64
	Logger  *slog.Logger
}

// Store is the disk of one registry.
type Store struct {
	cfg    Config
	driver *driver

	digests [256]sync.Mutex // of what there is of a digest or a tag, by hash

	mu         sync.Mutex // guards projects and held
	projects   map[string]*project
	held       map[*time.Time]struct{} // since when manifests are being pushed
	collecting sync.Mutex
}

// New checks the configuration and opens the directory.
func New(cfg Config) (*Store, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("registry store: directory %q is not absolute", cfg.Dir)
	}
	if cfg.Grace == 0 {
		cfg.Grace = defaultGrace
	}
	if cfg.UploadAge == 0 {
		cfg.UploadAge = defaultUploadAge
	}
	if cfg.Quota == nil {
		cfg.Quota = func(string) (int64, bool) { return 0, false }
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{cfg: cfg, projects: make(map[string]*project), held: make(map[*time.Time]struct{})}
	for _, dir := range []string{cfg.Dir, s.repositories(), s.base("blobs"), s.trash(), s.owners()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("registry store: %w", err)
		}
	}
	s.driver = &driver{
		StorageDriver: filesystem.New(filesystem.DriverParameters{RootDirectory: cfg.Dir, MaxThreads: threads}),
		store:         s,
	}
	return s, nil
}

// Driver is the store as distribution uses it.
func (s *Store) Driver() storagedriver.StorageDriver { return s.driver }

func (s *Store) trash() string  { return filepath.Join(s.cfg.Dir, "trash") }
func (s *Store) owners() string { return filepath.Join(s.cfg.Dir, "projects") }

// lock holds what there is of a digest or a tag.
func (s *Store) lock(key string) (unlock func()) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key))
	m := &s.digests[h.Sum32()%uint32(len(s.digests))]
	m.Lock()
	return m.Unlock
}

// Own makes a project that of owner, which is the uid of its namespace. What a project of the same name had under
// another owner is put aside, so that nobody inherits it.
func (s *Store) Own(name, owner string) error {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.owner == owner {
		return nil
	}
	known, err := s.Owner(name)
	if err != nil {
		return err
	}
	if known != owner {
		if err := s.discard(p); err != nil {
			return fmt.Errorf("registry project %s: %w", name, err)
		}
		if err := atomicfile.Write(filepath.Join(s.owners(), name), []byte(owner), 0o600); err != nil {
			return fmt.Errorf("registry project %s: %w", name, err)
		}
	}
	p.owner = owner
	return nil
}

// Owner is the uid of the namespace that a project is of, "" when nobody has used it.
func (s *Store) Owner(name string) (string, error) {
	known, err := os.ReadFile(filepath.Join(s.owners(), name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("registry project %s: %w", name, err)
	}
	return string(known), nil
}

// Remove puts a project aside whose namespace has gone, if it still is of that one and not of another of its name.
func (s *Store) Remove(name, owner string) error {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if known, err := s.Owner(name); err != nil || known != owner {
		return err
	}
	if err := s.discard(p); err != nil {
		return fmt.Errorf("removing registry project %s: %w", name, err)
	}
	if err := os.Remove(filepath.Join(s.owners(), name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing registry project %s: %w", name, err)
	}
	p.owner = ""
	return nil
}

// discard renames what a project has out of the way. The caller holds it.
func (s *Store) discard(p *project) error {
	err := os.Rename(s.repositories(p.name), filepath.Join(s.trash(), p.name+"-"+rand.Text()))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p.forget()
	if err := syncDir(s.repositories()); err != nil {
		return err
	}
	if err == nil {
		s.cfg.Logger.Info("registry project put aside", "project", p.name)
	}
	return nil
}

// CancelUpload removes what has come of an upload, and says whether there was any.
func (s *Store) CancelUpload(repo, id string) (bool, error) {
	if !uploadID.MatchString(id) {
		return false, nil
	}
	dir := s.repositories(repo, "_uploads", id)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return false, fmt.Errorf("cancelling an upload to %s: %w", repo, err)
	}
	project, _, _ := strings.Cut(repo, "/")
	s.release(project, repo+"/"+id)
	return true, nil
}

// uploadID is what distribution calls an upload.
var uploadID = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// Projects are the names of all projects that have had something.
func (s *Store) Projects() ([]string, error) {
	entries, err := os.ReadDir(s.repositories())
	if err != nil {
		return nil, fmt.Errorf("listing registry projects: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), "_") {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// room refuses when the disk has less free than what is kept for the host, and n bytes.
func (s *Store) room(n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return fmt.Errorf("looking at the registry's disk: %w", err)
	}
	reserve := s.cfg.Reserve
	if reserve == 0 {
		reserve = min(reserveBytes, int64(st.Blocks)*st.Bsize/reservePart)
	}
	if free := int64(st.Bavail) * st.Bsize; free-n < reserve {
		return &FullError{Free: free, Reserve: reserve}
	}
	return nil
}

// Hold is called around the push of a manifest: what it has looked at stays, however long the push takes.
func (s *Store) Hold() (release func()) {
	began := time.Now()
	s.mu.Lock()
	s.held[&began] = struct{}{}
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		delete(s.held, &began)
		s.mu.Unlock()
	}
}

// heldSince is now, or when the oldest push that is under way began.
func (s *Store) heldSince() time.Time {
	since := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for began := range s.held {
		if began.Before(since) {
			since = *began
		}
	}
	return since
}

// Check says whether a request that announces n bytes for a project can be taken.
func (s *Store) Check(ctx context.Context, name string, n int64) error {
	r := requestOf(ctx)
	if err := s.room(n); err != nil {
		return r.refused(err)
	}
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := s.load(p); err != nil {
		return err
	}
	return r.refused(p.fits(s.cfg.Quota, n))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
