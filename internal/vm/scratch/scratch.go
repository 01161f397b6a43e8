// Package scratch makes the scratch disks of micro-VMs: ext4 images that are formatted once and
// then copied for each machine.
//
// The copy is an unnamed file, so it disappears with the QEMU that holds it, whatever happens to
// the process that made it. Only the few blocks that mkfs wrote are copied; the rest are holes. The
// file system has no journal, since nobody reads it after a crash, all its tables are initialised,
// so that the guest starts no thread for that, and it has project quotas, by which the guest
// limits its containers and volumes.
//
// The package mounts nothing. The pool and the shim call it. It fails when the host's file system
// is full or has no holes in files (a copy would then be as large as the disk).
package scratch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Config describes the disk.
type Config struct {
	Dir   string // where images live; must exist, on a file system with O_TMPFILE
	Bytes int64  // size the guest sees, a multiple of 1 MiB, at least 16 MiB
	Mkfs  string // path of mkfs.ext4, "" to look it up
}

// Master is a formatted image to copy.
type Master struct {
	dir  string
	file *os.File
	size int64
	data []extent
}

// extent is a part of the image that is no hole.
type extent struct{ start, end int64 }

// Format makes the master image, unnamed like the copies. It takes some ten milliseconds.
func Format(ctx context.Context, cfg Config) (_ *Master, err error) {
	if cfg.Bytes < 16<<20 || cfg.Bytes%(1<<20) != 0 {
		return nil, fmt.Errorf("formatting a scratch disk: size %d is not at least 16 MiB in whole MiB", cfg.Bytes)
	}
	f, err := create(cfg.Dir, cfg.Bytes)
	if err != nil {
		return nil, fmt.Errorf("formatting a scratch disk: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	mkfs := cfg.Mkfs
	if mkfs == "" {
		mkfs = "mkfs.ext4"
	}
	cmd := exec.CommandContext(ctx, mkfs, mkfsArgs("/proc/self/fd/3")...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "LC_ALL=C", "MKE2FS_CONFIG=/dev/null"}
	if cfg.Mkfs == "" {
		if cmd.Path, err = lookup(mkfs); err != nil {
			return nil, fmt.Errorf("formatting a scratch disk: %w", err)
		}
		cmd.Err = nil
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("formatting a scratch disk: %w: %s", err, strings.TrimSpace(string(out)))
	}
	m := &Master{dir: cfg.Dir, file: f, size: cfg.Bytes}
	if m.data, err = extents(f, cfg.Bytes); err != nil {
		return nil, fmt.Errorf("formatting a scratch disk: %w", err)
	}
	return m, nil
}

// mkfsArgs is the whole format; MKE2FS_CONFIG keeps the host's own defaults out of it. There is no
// journal and no metadata_csum (uninit_bg keeps unused groups unwritten): the disk dies with its pod, and under emulation the checksums double
// the cost of a mkdir and of an overlay mount.
func mkfsArgs(image string) []string {
	return []string{
		"-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
		"-O", "none,extent,64bit,flex_bg,filetype,dir_index,dir_nlink,ext_attr,extra_isize,huge_file," +
			"large_file,uninit_bg,sparse_super2,quota,project",
		"-G", "4096", "-E", "discard,lazy_itable_init=0,packed_meta_blocks=1,num_backup_sb=0,quotatype=prjquota,root_owner=0:0",
		"-L", "scratch", image,
	}
}

// lookup finds a program also where a user's PATH does not reach.
func lookup(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (package e2fsprogs)", name)
}

// Bytes is the size of the disk.
func (m *Master) Bytes() int64 { return m.size }

// Copy makes a new disk. The file is open for reading and writing, has no name, and belongs to the
// caller.
func (m *Master) Copy() (_ *os.File, err error) {
	f, err := create(m.dir, m.size)
	if err != nil {
		return nil, fmt.Errorf("copying the scratch disk: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	// A reflink shares the blocks where the host's file system can.
	if err := unix.IoctlFileClone(int(f.Fd()), int(m.file.Fd())); err == nil {
		return f, nil
	}
	for _, e := range m.data {
		src, dst, left := e.start, e.start, e.end-e.start
		for left > 0 {
			n, err := unix.CopyFileRange(int(m.file.Fd()), &src, int(f.Fd()), &dst, int(left), 0)
			if err != nil || n == 0 {
				return nil, fmt.Errorf("copying the scratch disk: %w", orEOF(err))
			}
			left -= int64(n)
		}
	}
	return f, nil
}

func orEOF(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Close releases the master; copies live on.
func (m *Master) Close() error { return m.file.Close() }

// File is the master image, to be inherited by a process that copies. It stays owned by the master.
func (m *Master) File() *os.File { return m.file }

// Open makes a master from the file of another one, in this or another process. It takes over the
// file. Copies go to dir, which must be on the same file system.
func Open(dir string, f *os.File) (*Master, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("opening the scratch disk master: %w", err)
	}
	data, err := extents(f, st.Size())
	if err != nil {
		return nil, fmt.Errorf("opening the scratch disk master: %w", err)
	}
	return &Master{dir: dir, file: f, size: st.Size(), data: data}, nil
}

// create makes an empty unnamed file of that size.
func create(dir string, size int64) (*os.File, error) {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making an unnamed file in %s: %w", dir, err)
	}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// extents finds the parts of f that hold data.
func extents(f *os.File, size int64) ([]extent, error) {
	fd := int(f.Fd())
	var out []extent
	for pos := int64(0); pos < size; {
		start, err := unix.Seek(fd, pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("looking for data: %w", err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("looking for holes: %w", err)
		}
		out = append(out, extent{start, end})
		pos = end
	}
	return out, nil
}
