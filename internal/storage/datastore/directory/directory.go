// Package directory is a datastore in a directory of the host.
//
// The directory may be on a file system that several hosts have mounted at the same path, if that has working
// fcntl locks. Nothing here knows about volumes, only about records and images (package chain does). The
// caller is the agent.
//
// What can go wrong: the directory is not there, or another one is (a file system that is not mounted), both
// ErrUnavailable; it is full, ErrFull; a file is not what it should be, ErrCorrupt.
package directory

import (
	"fmt"
	"path/filepath"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Config is what a directory datastore is made of.
type Config struct {
	// Path is the absolute path of the directory.
	Path string
	// ID, if set, is what Init returned for this directory. Another datastore that turns up at Path, or an
	// empty mount point, is ErrUnavailable then.
	ID string
	// Keys wraps keys of encrypted volumes; nil refuses them with ErrKey.
	Keys datastore.Keys
	// Limits says how full it may get.
	Limits datastore.Limits
	// Timeout is how long a single step on the directory may take before a call gives up with
	// ErrUnavailable; 0 is 25 s.
	Timeout time.Duration
	// QEMUImg is the path of qemu-img; empty looks it up.
	QEMUImg string
}

// New returns the store in a directory. It does not look at it; Init prepares a new one.
func New(c Config) (*chain.Store, error) {
	if !filepath.IsAbs(c.Path) || filepath.Clean(c.Path) == "/" {
		return nil, fmt.Errorf("%w: datastore path %.200q is not absolute", datastore.ErrInvalid, c.Path)
	}
	c.Path = filepath.Clean(c.Path)
	tool := &qemuimg.Tool{Path: c.QEMUImg}
	place := &dir{path: c.Path, id: c.ID, layers: &layerDir{path: filepath.Join(c.Path, layersDir), qemu: tool}}
	return chain.New(place, chain.Options{Keys: c.Keys, Limits: c.Limits, Timeout: c.Timeout, Tool: tool})
}
