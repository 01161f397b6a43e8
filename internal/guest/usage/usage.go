// Package usage measures how much of the scratch file system a directory uses and bounds it: by
// ext4 project quota where the file system has it (exact, free, enforced with ENOSPC), else by a
// cached walk (no limit then).
//
// Guest init tracks each container's writable layer and each scratch volume. A walk races with the
// container's own writes, so its figures are approximate.
package usage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Usage is what a directory takes.
type Usage struct {
	Bytes  uint64
	Inodes uint64
}

// Meter hands out project ids on one file system.
type Meter struct {
	mu    sync.Mutex
	root  *os.File // on the file system; nil without quota
	next  uint32
	limit int // entries a walk looks at
}

// Dir is a tracked directory.
type Dir struct {
	meter   *Meter
	path    string
	project uint32 // 0: by walking

	mu       sync.Mutex
	last     Usage
	measured time.Time
	took     time.Duration
}

const (
	firstProject = 1000
	maxWalk      = 200_000
)

// From linux/quota.h and linux/fs.h.
const (
	projectQuota   = 2
	qGetQuota      = 0x800007
	qSetQuota      = 0x800008
	qifBLimits     = 1
	xflagInherit   = 0x200
	ioctlGetXattr  = 0x801c581f
	ioctlSetXattr  = 0x401c5820
	quotaBlockSize = 1024
)

type dqblk struct {
	bHard, bSoft, curSpace uint64
	iHard, iSoft, curInode uint64
	bTime, iTime           uint64
	valid                  uint32
	_                      uint32
}

type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

// New returns a meter for the file system that dir is on.
func New(dir string) (*Meter, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening scratch: %w", err)
	}
	m := &Meter{root: f, next: firstProject, limit: maxWalk}
	var q dqblk
	if err := m.quota(qGetQuota, firstProject, &q); err != nil {
		m.root = nil
		_ = f.Close()
	}
	return m, nil
}

// Enforced reports whether limits have effect.
func (m *Meter) Enforced() bool { return m.root != nil }

func (m *Meter) quota(cmd, id uint32, q *dqblk) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, m.root.Fd(), uintptr(cmd<<8|projectQuota),
		uintptr(id), uintptr(unsafe.Pointer(q)), 0, 0)
	// A project nobody has used yet has no record.
	if errno != 0 && (errno != unix.ENOENT || cmd != qGetQuota) {
		return errno
	}
	return nil
}

// Track starts measuring an empty directory. limit is in bytes, 0 for none.
func (m *Meter) Track(dir string, limit uint64) (*Dir, error) {
	d := &Dir{meter: m, path: dir}
	if m.root == nil {
		return d, nil
	}
	m.mu.Lock()
	m.next++
	project := m.next
	m.mu.Unlock()
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("tracking usage: %w", err)
	}
	defer f.Close()
	var x fsxattr
	if err := ioctl(f, ioctlGetXattr, unsafe.Pointer(&x)); err != nil {
		return nil, fmt.Errorf("reading attributes of %s: %w", dir, err)
	}
	x.projid, x.xflags = project, x.xflags|xflagInherit
	if err := ioctl(f, ioctlSetXattr, unsafe.Pointer(&x)); err != nil {
		return nil, fmt.Errorf("setting project of %s: %w", dir, err)
	}
	if limit > 0 {
		q := dqblk{bHard: (limit + quotaBlockSize - 1) / quotaBlockSize, valid: qifBLimits}
		if err := m.quota(qSetQuota, project, &q); err != nil {
			return nil, fmt.Errorf("setting quota of %s: %w", dir, err)
		}
	}
	d.project = project
	return d, nil
}

func ioctl(f *os.File, req uintptr, p unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(p)); errno != 0 {
		return errno
	}
	return nil
}

// Usage is the current usage, or one that is at most a few seconds old.
func (d *Dir) Usage() (Usage, error) {
	if d.project != 0 {
		var q dqblk
		if err := d.meter.quota(qGetQuota, d.project, &q); err != nil {
			return Usage{}, fmt.Errorf("reading quota: %w", err)
		}
		return Usage{Bytes: q.curSpace, Inodes: q.curInode}, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	// A walk may take at most a twentieth of the time.
	if !d.measured.IsZero() && time.Since(d.measured) < max(5*time.Second, 20*d.took) {
		return d.last, nil
	}
	start := time.Now()
	u, err := walk(d.path, d.meter.limit)
	if err != nil {
		return d.last, fmt.Errorf("measuring %s: %w", d.path, err)
	}
	d.last, d.measured, d.took = u, time.Now(), time.Since(start)
	return u, nil
}

var errLimit = errors.New("too many entries")

// walk adds up the blocks below dir, of at most limit entries.
func walk(dir string, limit int) (Usage, error) {
	var u Usage
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if u.Inodes >= uint64(limit) {
			return errLimit
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return nil //nolint:nilerr // it went away while we looked
		}
		u.Inodes++
		u.Bytes += uint64(st.Blocks) * 512
		return nil
	})
	if errors.Is(err, errLimit) {
		err = nil
	}
	return u, err
}

// FileSystem is the usage of a whole file system (a tmpfs volume), with its size and what is free.
func FileSystem(dir string) (u Usage, size, free uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return u, 0, 0, fmt.Errorf("reading usage of %s: %w", dir, err)
	}
	block := uint64(st.Bsize)
	u = Usage{Bytes: (st.Blocks - st.Bfree) * block, Inodes: st.Files - st.Ffree}
	return u, st.Blocks * block, st.Bavail * block, nil
}
