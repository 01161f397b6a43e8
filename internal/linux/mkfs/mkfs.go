// Package mkfs makes the file systems of persistent volumes with the programs of the host (mkfs.ext4,
// mkfs.xfs).
//
// For a micro-VM the file system is made in an unnamed file as large as the volume, of which only the few
// blocks that are not zero are then sent to the guest and written on its blank disk (New, Each): the guest has
// no such program, and the volume is never mounted or opened here. For a pod of the host it is made on a
// device (On).
//
// The shim and the CSI node service call it. What can go wrong: the program is missing (ErrMissing says what
// to install), the size is too small for the file system, the directory is full.
package mkfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The file systems.
const (
	Ext4 = "ext4"
	XFS  = "xfs"
)

// ErrMissing is wrapped when the host lacks the program.
var ErrMissing = errors.New("program is not installed")

// timeout bounds the making of a file system.
const timeout = 2 * time.Minute

// Image is a new file system.
type Image struct{ file *os.File }

// New makes a file system of that size in an unnamed file in dir.
func New(ctx context.Context, fsType string, bytes int64, dir string) (_ *Image, err error) {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a file system: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	if err := f.Truncate(bytes); err != nil {
		return nil, fmt.Errorf("making a file system: %w", err)
	}
	return &Image{file: f}, run(ctx, fsType, f)
}

// On makes a file system on a blank device.
func On(ctx context.Context, fsType string, device *os.File) error { return run(ctx, fsType, device) }

func run(ctx context.Context, fsType string, f *os.File) error {
	const target = "/proc/self/fd/3"
	program, args, err := command(fsType, target)
	if err != nil {
		return err
	}
	path, err := lookup(program)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "MKE2FS_CONFIG=/dev/null"}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("making a file system: %s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// command is the whole format; MKE2FS_CONFIG keeps the host's own defaults out of ext4. The disk is blank, so
// nothing needs to be cleared now or later. There is no resize_inode, which would take megabytes: the kernel
// grows such a file system, too, by placing tables in the new groups.
func command(fsType, target string) (program string, args []string, err error) {
	switch fsType {
	case Ext4:
		return "mkfs.ext4", []string{
			"-q", "-F", "-b", "4096", "-I", "256", "-m", "0",
			"-O", "has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize,dir_index,ext_attr," +
				"filetype,large_file,sparse_super,^resize_inode",
			"-E", "nodiscard,assume_storage_prezeroed=1,root_owner=0:0",
			target,
		}, nil
	case XFS:
		return "mkfs.xfs", []string{"-q", "-f", "-K", target}, nil
	}
	return "", nil, fmt.Errorf("making a file system: type %q is not supported; use ext4 or xfs", fsType)
}

// lookup finds a program also where a user's PATH does not reach.
func lookup(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	pkg, instead := "e2fsprogs", ""
	if name == "mkfs.xfs" {
		pkg, instead = "xfsprogs", ", or use ext4"
	}
	return "", fmt.Errorf("making a file system: %s: %w; install the package %s on this host%s", name, ErrMissing, pkg, instead)
}

// chunk is what is looked at for zeros, in bytes.
const chunk = 4096

// Each calls f for every part of the file system that is not zero, in order, with at most limit bytes of data,
// which are valid until it returns.
func (i *Image) Each(limit int, f func(offset int64, data []byte) error) error {
	st, err := i.file.Stat()
	if err != nil {
		return fmt.Errorf("reading the new file system: %w", err)
	}
	buf := make([]byte, max(limit/chunk, 1)*chunk)
	for pos := int64(0); pos < st.Size(); {
		start, end, err := extent(i.file, pos)
		if err != nil {
			return err
		}
		if start < 0 {
			return nil
		}
		if err := i.extent(start, end, buf, f); err != nil {
			return err
		}
		pos = end
	}
	return nil
}

// extent finds the next part that is no hole; start is negative at the end.
func extent(f *os.File, pos int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return -1, 0, nil
	}
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("reading the new file system: %w", err)
	}
	return start, end, nil
}

// extent calls f for what is not zero in one part of the file.
func (i *Image) extent(start, end int64, buf []byte, f func(int64, []byte) error) error {
	for start < end {
		n, err := i.file.ReadAt(buf[:min(int64(len(buf)), end-start)], start)
		if err != nil && (n == 0 || !errors.Is(err, io.EOF)) {
			return fmt.Errorf("reading the new file system: %w", err)
		}
		for from := 0; from < n; {
			size, blank := span(buf[from:n])
			if !blank {
				if err := f(start+int64(from), buf[from:from+size]); err != nil {
					return err
				}
			}
			from += size
		}
		start += int64(n)
	}
	return nil
}

// span is how far b is all zero chunks, or none.
func span(b []byte) (size int, blank bool) {
	blank = isZero(b[:min(chunk, len(b))])
	for size < len(b) && isZero(b[size:min(size+chunk, len(b))]) == blank {
		size = min(size+chunk, len(b))
	}
	return size, blank
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// Close releases the file.
func (i *Image) Close() error { return i.file.Close() }
