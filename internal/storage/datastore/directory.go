package datastore

import (
	"time"
)

// Config is what a directory datastore is made of.
type Config struct {
	// Path is the absolute path of the directory.
	Path string
	// ID, if set, is what Init returned for this directory. Another datastore that turns up at Path, or an
	// empty mount point, is ErrUnavailable then.
	ID string
	// Keys wraps keys of encrypted volumes; nil refuses them with ErrKey.
	Keys Keys
	// Limits says how full it may get.
	Limits Limits
	// Timeout is how long a single step on the directory may take before a call gives up with
	// ErrUnavailable; 0 is 10 s.
	Timeout time.Duration
	// QEMUImg is the path of qemu-img; empty looks it up.
	QEMUImg string
}

// Limits are fill levels, as a part of the file system's capacity. Zero values take the defaults.
type Limits struct {
	// WarnAt, default 0.8: from here on Status.Warning is set.
	WarnAt float64
	// RefuseAt, default 0.95: from here on nothing is created, grown or snapshotted.
	RefuseAt float64
	// Overcommit is how many times the capacity the sizes of all volumes may add up to; 0 is any.
	Overcommit float64
}
