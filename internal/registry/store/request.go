package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
)

// QuotaError says that a project may not take more.
type QuotaError struct {
	Project     string
	Quota, Used int64
	Asked       int64
}

// Error implements error.
func (e *QuotaError) Error() string {
	return fmt.Sprintf("project %s: quota %s, used %s, asked for %s more; delete images (atoll registry rm, then gc), or have an administrator raise spec.registry.quota of SupervisorNamespace %s",
		e.Project, size(e.Quota), size(e.Used), size(e.Asked), e.Project)
}

// FullError says that the disk may not take more.
type FullError struct {
	Free, Reserve int64
}

// Error implements error.
func (e *FullError) Error() string {
	return fmt.Sprintf("the disk of the registry is full (%s free, of which %s are kept for the host); an administrator must make room: atoll registry gc, or a larger disk",
		size(e.Free), size(e.Reserve))
}

// size writes bytes for people.
func size(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for len(units) > 1 && f >= 1024 {
		f, units = f/1024, units[1:]
	}
	if f == float64(int64(f)) {
		return fmt.Sprintf("%.0f %s", f, units[0])
	}
	return fmt.Sprintf("%.1f %s", f, units[0])
}

// Request is what one request to the registry makes known to the store, and the store to it.
type Request struct {
	mu     sync.Mutex
	err    error  // why it was refused
	upload string // the upload it writes
	reads  bool   // it may not write an upload
	opened []io.Closer
}

type requestKey struct{}

// WithRequest returns a context in which the store notes why it refuses something.
func WithRequest(ctx context.Context) (context.Context, *Request) {
	r := &Request{}
	return context.WithValue(ctx, requestKey{}, r), r
}

// Err is a *QuotaError, a *FullError or nil.
func (r *Request) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

func requestOf(ctx context.Context) *Request {
	r, ok := ctx.Value(requestKey{}).(*Request)
	if !ok {
		return &Request{}
	}
	return r
}

// ReadOnly is called before a request that only asks how far an upload is, for which distribution opens it to write.
func (r *Request) ReadOnly() {
	r.mu.Lock()
	r.reads = true
	r.mu.Unlock()
}

// Done closes what a request has opened and distribution has not closed.
func (r *Request) Done() {
	r.mu.Lock()
	opened := r.opened
	r.opened = nil
	r.mu.Unlock()
	for _, f := range opened {
		_ = f.Close() // most are closed already
	}
}

// open notes what Done closes.
func (r *Request) open(f io.Closer) {
	r.mu.Lock()
	r.opened = append(r.opened, f)
	r.mu.Unlock()
}

func (r *Request) readOnly() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reads
}

func (r *Request) setUpload(upload string) {
	r.mu.Lock()
	r.upload = upload
	r.mu.Unlock()
}

func (r *Request) uploading() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.upload
}

// refused notes a reason and returns the error. An error of the file system that means that it is full becomes one.
func (r *Request) refused(err error) error {
	if wrapped, ok := errors.AsType[storagedriver.Error](err); ok { // it has no Unwrap
		err = wrapped.Detail
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		err = &FullError{}
	}
	var quota *QuotaError
	var full *FullError
	if errors.As(err, &quota) || errors.As(err, &full) {
		r.mu.Lock()
		r.err = err
		r.mu.Unlock()
	}
	return err
}
