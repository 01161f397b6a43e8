package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
)

// key is a sha256 digest.
type key [32]byte

// linked is a blob of a project: how many links of the project's repositories lead to it, and its size.
type linked struct {
	links int32
	size  int64
}

// project counts what one project takes: every blob once, however many repositories have it, and unfinished uploads.
type project struct {
	name string

	mu      sync.Mutex
	owner   string // uid of the namespace it was last used for
	loaded  bool
	used    int64
	blobs   map[key]linked
	uploads map[string]int64
	writing map[string]*writing // uploads that are open or end
	loose   map[key]int64       // blobs whose last link was deleted, and that are there until a collection: they are counted
}

// project returns the record of a project; it may be of one that has nothing.
func (s *Store) project(name string) *project {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.projects[name]
	if !ok {
		p = &project{name: name, writing: make(map[string]*writing)}
		s.projects[name] = p
	}
	return p
}

// Usage is how many bytes a project takes.
func (s *Store) Usage(name string) (int64, error) {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := s.load(p); err != nil {
		return 0, err
	}
	return p.used, nil
}

// forget makes the next use read the disk.
func (p *project) forget() {
	p.loaded, p.used, p.blobs, p.uploads, p.loose = false, 0, nil, nil, nil
}

// keyOf returns a sha256 digest as a key; others are aliases of one and not counted.
func keyOf(digest string) (key, bool) {
	var k key
	text, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(text) != 2*len(k) {
		return k, false
	}
	_, err := hex.Decode(k[:], []byte(text))
	return k, err == nil
}

// load reads from disk what a project has, at its first use. The caller holds the project.
func (s *Store) load(p *project) error {
	if p.loaded {
		return nil
	}
	p.used, p.blobs, p.uploads, p.loose = 0, make(map[key]linked), make(map[string]int64), make(map[key]int64)
	root := s.repositories(p.name)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		switch at := parse(strings.TrimPrefix(path, s.cfg.Dir)); {
		case at.kind == layer || at.kind == revision:
			info, err := os.Stat(s.blobPath(at.digest))
			if err == nil {
				p.add(at.digest, info.Size())
			}
			return ignoreMissing(err)
		case at.kind == upload && at.data:
			info, err := d.Info()
			if err == nil {
				p.uploads[at.upload] += info.Size()
				p.used += info.Size()
			}
			return ignoreMissing(err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("counting registry project %s: %w", p.name, err)
	}
	p.loaded = true
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// add counts one more link.
func (p *project) add(digest string, size int64) {
	k, ok := keyOf(digest)
	if !ok {
		return
	}
	p.settle(k)
	l, known := p.blobs[k]
	if !known {
		l.size = size
		p.used += size
	}
	l.links++
	p.blobs[k] = l
}

// drop counts one link less. The blob of the last one is loose then.
func (p *project) drop(digest string) {
	k, ok := keyOf(digest)
	l, known := p.blobs[k]
	if !ok || !known {
		return
	}
	if l.links--; l.links > 0 {
		p.blobs[k] = l
		return
	}
	p.loose[k] = l.size
	delete(p.blobs, k)
}

// settle does not count a loose blob any more.
func (p *project) settle(k key) {
	p.used -= p.loose[k]
	delete(p.loose, k)
}

// has tells whether a blob is counted.
func (p *project) has(digest string) bool {
	k, ok := keyOf(digest)
	_, known := p.blobs[k]
	_, loose := p.loose[k]
	return ok && (known || loose)
}

// fits says whether n more bytes are within the quota.
func (p *project) fits(quota func(string) (int64, bool), n int64) error {
	if limit, bounded := quota(p.name); bounded && n > 0 && p.used+n > limit {
		return &QuotaError{Project: p.name, Quota: limit, Used: p.used, Asked: n}
	}
	return nil
}

// grow counts n bytes more of an upload, or refuses them.
func (s *Store) grow(name, upload string, n int64) error {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.writing[upload]; w == nil || w.closed {
		return storagedriver.PathNotFoundError{Path: upload} // it was cancelled
	}
	if err := s.load(p); err != nil {
		return err
	}
	if err := p.fits(s.cfg.Quota, n); err != nil {
		return err
	}
	p.uploads[upload] += n
	p.used += n
	return nil
}

// release forgets an upload that is gone.
func (s *Store) release(name, upload string) {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded {
		p.used -= p.uploads[upload]
		delete(p.uploads, upload)
	}
}

// link counts a new link of a blob, which the bytes of an upload become, and returns what undoes it.
func (s *Store) link(name, digest string, size int64, upload string) (undo func(), err error) {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := s.load(p); err != nil {
		return nil, err
	}
	came := p.uploads[upload]
	more := size - came
	if p.has(digest) {
		more = 0
	}
	if err := p.fits(s.cfg.Quota, more); err != nil {
		return nil, err
	}
	if came > 0 {
		p.used -= came
		p.uploads[upload] = 0
	}
	p.add(digest, size)
	return func() { s.unlink(name, digest) }, nil
}

// Reserve counts n bytes that a request is about to make the content of a digest in a project, or refuses them, so that
// nothing is on disk that is refused then. Those that get a link are counted for that; release gives back what did not.
func (s *Store) Reserve(ctx context.Context, name, digest string, n int64) (release func(), err error) {
	r := requestOf(ctx)
	if err := s.room(n); err != nil {
		return nil, r.refused(err)
	}
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := s.load(p); err != nil {
		return nil, err
	}
	if p.has(digest) {
		return func() {}, nil
	}
	if err := p.fits(s.cfg.Quota, n); err != nil {
		return nil, r.refused(err)
	}
	upload := rand.Text()
	p.uploads[upload] = n
	p.used += n
	r.setUpload(upload)
	return func() { s.release(name, upload) }, nil
}

// unlink counts a link that is gone. Its blob counts until a collection has removed it.
func (s *Store) unlink(name, digest string) {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded {
		p.drop(digest)
	}
}
