package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
)

// errWriting says that two requests want to write the same upload.
var errWriting = errors.New("the upload is being written by another request")

// writing is what is known of an upload that a request has open, or that ends. A file that is open takes its room after
// it was removed, too, so that the bytes of an upload count until nobody has it open.
type writing struct {
	open     bool // a request has the file open
	closed   bool // no more bytes are taken: it was cancelled, or becomes a blob
	removing int  // who removes its files
	gone     bool // its files are removed
}

// begin is called before an upload is opened. One request at a time has it: what another one would write after the
// digest was verified would be in the blob.
func (s *Store) begin(name, upload string) error {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.writing[upload]; w != nil {
		if w.closed {
			return storagedriver.PathNotFoundError{Path: upload}
		}
		return errWriting
	}
	p.upload(upload).open = true
	return nil
}

// finish is called when an upload was closed.
func (s *Store) finish(name, upload string) {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.upload(upload)
	w.open = false
	p.ended(upload, w)
}

// seal has an upload take no more bytes, because its digest is verified.
func (s *Store) seal(name, upload string) {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upload(upload).closed = true
}

// end removes the files of an upload by f. Who has it open cannot go on.
func (s *Store) end(name, upload string, f func() error) error {
	p := s.project(name)
	p.mu.Lock()
	w := p.upload(upload)
	before := w.closed
	w.closed = true
	w.removing++
	p.mu.Unlock()
	err := f()
	p.mu.Lock()
	defer p.mu.Unlock()
	w.removing--
	if err == nil || errors.As(err, new(storagedriver.PathNotFoundError)) {
		w.gone = true
	} else if w.removing == 0 && !w.gone {
		w.closed = before
	}
	p.ended(upload, w)
	return err
}

// Writing tells whether a request has an upload open and may go on with it.
func (s *Store) Writing(repo, id string) bool {
	name, _, _ := strings.Cut(repo, "/")
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.writing[repo+"/"+id]
	return w != nil && w.open && !w.closed
}

// cancelled tells that the files of an upload that somebody has open are removed.
func (s *Store) cancelled(name, upload string) bool {
	p := s.project(name)
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.writing[upload]
	return w != nil && (w.gone || w.removing > 0)
}

// upload is the record of an upload. The caller holds the project.
func (p *project) upload(upload string) *writing {
	w := p.writing[upload]
	if w == nil {
		w = &writing{}
		p.writing[upload] = w
	}
	return w
}

// ended forgets what nobody has open, and its bytes when it is gone. The caller holds the project.
func (p *project) ended(upload string, w *writing) {
	switch {
	case w.open || w.removing > 0:
		return
	case w.gone:
		p.used -= p.uploads[upload]
		delete(p.uploads, upload)
	case w.closed: // it becomes a blob
		return
	}
	if p.writing[upload] == w {
		delete(p.writing, upload)
	}
}

// cutOff has nobody go on with an upload of a project that was put aside. The caller holds it.
func (p *project) cutOff() {
	for upload, w := range p.writing {
		w.closed, w.gone = true, true
		p.ended(upload, w)
	}
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
	project, _, _ := strings.Cut(repo, "/")
	if err := s.end(project, repo+"/"+id, func() error { return os.RemoveAll(dir) }); err != nil {
		return false, fmt.Errorf("cancelling an upload to %s: %w", repo, err)
	}
	return true, nil
}

// uploadID is what distribution calls an upload.
var uploadID = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
