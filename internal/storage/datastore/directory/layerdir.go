package directory

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/luks"
	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Names in the directory of images.
const (
	layersDir = "layers"
	imgSuffix = ".img"
	newSuffix = ".new"
)

// layerDir is images as files in a directory.
type layerDir struct {
	path string
	qemu *qemuimg.Tool
}

// file is the path of an image.
func (d *layerDir) file(l chain.Layer) string { return filepath.Join(d.path, chain.ImageName(l)) }

// Make makes an image under another name first, so that it is complete when it is there.
func (d *layerDir) Make(ctx context.Context, i chain.Image) error {
	final := d.file(i.Layer)
	if _, err := os.Lstat(final); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return chain.Unavailable(err)
	}
	half := final + newSuffix
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return chain.Unavailable(err)
	}
	f, err := os.OpenFile(half, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return chain.NoSpace(err)
	}
	err = d.fill(ctx, f, i)
	if err == nil {
		err = chain.NoSpace(f.Sync())
	}
	if closeErr := f.Close(); err == nil {
		err = chain.NoSpace(closeErr)
	}
	if err == nil {
		err = chain.NoSpace(os.Rename(half, final))
	}
	if err != nil {
		_ = os.Remove(half)
		return err
	}
	return syncDir(d.path)
}

// fill makes an empty file an image.
func (d *layerDir) fill(ctx context.Context, f *os.File, i chain.Image) error {
	if i.Format == handover.FormatRaw {
		if i.Provisioning == datastore.Thin {
			return chain.NoSpace(f.Truncate(i.Size))
		}
		if err := reserve(f, 0, i.Size, false); err != nil || i.Provisioning == datastore.Thick {
			return err
		}
		return writeZeros(ctx, f, i.Size, i.Progress)
	}
	empty := qcow2.Image{Size: i.Size, LUKS: i.LUKS}
	if i.Below != nil {
		empty.Backing, empty.BackingFormat = chain.ImageName(*i.Below), i.Below.Format
	}
	if err := empty.Write(f); err != nil {
		return chain.NoSpace(err)
	}
	if i.Provisioning == datastore.Thin {
		return nil
	}
	if err := reserve(f, 0, qcow2.Room(i.Size, len(i.LUKS)), true); err != nil || i.Provisioning == datastore.Thick || i.Below != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return chain.NoSpace(err)
	}
	node := d.Locate(i.Layer)
	node.File = f.Name()
	secrets := qemuimg.Secrets{}
	if i.Key != "" {
		secrets[i.Key] = i.Passphrase
	}
	return chain.FromTool(d.qemu.Fill(ctx, node, secrets, i.Progress))
}

// reserve takes room for a part of a file, beyond its end if beyond is set, that reads as zero.
func reserve(f *os.File, from, to int64, beyond bool) error {
	mode := uint32(0)
	if beyond {
		mode = unix.FALLOC_FL_KEEP_SIZE
	}
	switch err := unix.Fallocate(int(f.Fd()), mode, from, to-from); {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: thick chain.Volumes on this file system", datastore.ErrUnsupported)
	default:
		return chain.NoSpace(err)
	}
}

// writeZeros writes all of a file.
func writeZeros(ctx context.Context, f *os.File, size int64, progress func(done, total int64)) error {
	const chunk, flush = 4 << 20, 64 << 20
	zeros := make([]byte, chunk)
	for at := int64(0); at < size; at += chunk {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("writing zeros: %w", err)
		}
		if _, err := f.WriteAt(zeros[:min(chunk, size-at)], at); err != nil {
			return chain.NoSpace(err)
		}
		if (at+chunk)%flush == 0 { // keep the rest of the host's page cache
			if err := f.Sync(); err != nil {
				return chain.NoSpace(err)
			}
			_ = unix.Fadvise(int(f.Fd()), 0, at+chunk, unix.FADV_DONTNEED)
		}
		if progress != nil {
			progress(min(at+chunk, size), size)
		}
	}
	return nil
}

func (d *layerDir) Remove(layers []chain.Layer) error {
	removed := false
	for _, l := range layers {
		for _, path := range []string{d.file(l) + newSuffix, d.file(l)} {
			switch err := os.Remove(path); {
			case err == nil:
				removed = true
			case !errors.Is(err, fs.ErrNotExist):
				return chain.Unavailable(err)
			}
		}
	}
	if !removed {
		return nil
	}
	return syncDir(d.path)
}

// osFile is an image in a file.
type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, chain.Unavailable(err)
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("%w: %s is not a file", datastore.ErrCorrupt, f.Name())
	}
	return info.Size(), nil
}

func (d *layerDir) Open(l chain.Layer, write bool) (chain.File, error) {
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(d.file(l), mode|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		return osFile{f}, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, err
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%w: %s is a symbolic link", datastore.ErrCorrupt, d.file(l))
	}
	return nil, chain.Unavailable(err)
}

func (d *layerDir) Grow(ctx context.Context, l chain.Layer, bytes int64, thick bool, unlock func() (qemuimg.Secrets, error)) error {
	f, err := os.OpenFile(d.file(l), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return chain.Unavailable(err)
	}
	defer f.Close()
	if l.Format == handover.FormatRaw {
		info, err := f.Stat()
		if err != nil {
			return chain.Unavailable(err)
		}
		switch {
		case info.Size() >= bytes:
		case thick:
			err = reserve(f, info.Size(), bytes, false)
		default:
			err = chain.NoSpace(f.Truncate(bytes))
		}
		if err != nil {
			return err
		}
		return chain.NoSpace(f.Sync())
	}
	if thick {
		if err := reserve(f, 0, roomOf(l, bytes), true); err != nil {
			return err
		}
	}
	h, err := qcow2.Read(f)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", datastore.ErrCorrupt, f.Name(), err)
	}
	if h.Size >= bytes {
		return nil
	}
	switch ok, err := qcow2.Grow(f, bytes); {
	case err != nil:
		return chain.NoSpace(err)
	case ok:
		return chain.NoSpace(f.Sync())
	}
	secrets, err := unlock() // the table of the image has to move, which is QEMU's
	if err != nil {
		return err
	}
	return chain.FromTool(d.qemu.Resize(ctx, d.Locate(l), secrets, bytes))
}

// roomOf is what a full qcow2 image takes.
func roomOf(l chain.Layer, bytes int64) int64 {
	if l.Key != "" {
		return qcow2.Room(bytes, luks.Size)
	}
	return qcow2.Room(bytes, 0)
}

// Reserve takes room without a change of what is in the image, or of its length.
func (d *layerDir) Reserve(l chain.Layer, bytes int64) error {
	f, err := os.OpenFile(d.file(l), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return chain.Unavailable(err)
	}
	defer f.Close()
	if l.Format == handover.FormatQCOW2 {
		bytes = roomOf(l, bytes)
	}
	return reserve(f, 0, bytes, true)
}

func (d *layerDir) Used(l chain.Layer) (int64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(d.file(l), &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		return 0, chain.Unavailable(err)
	}
	return st.Blocks * 512, nil
}

func (d *layerDir) Locate(l chain.Layer) handover.Layer {
	return handover.Layer{ID: l.ID, File: d.file(l), Format: l.Format, Size: l.Size, ReadOnly: true, Key: l.Key}
}

func (d *layerDir) Strays(known map[string]chain.Layer) (map[string]int64, error) {
	found, err := os.ReadDir(d.path)
	if err != nil {
		return nil, chain.Unavailable(err)
	}
	out := map[string]int64{}
	for _, e := range found {
		id := strings.TrimSuffix(strings.TrimSuffix(e.Name(), newSuffix), imgSuffix)
		if l, ok := known[id]; ok && (e.Name() == chain.ImageName(l) || e.Name() == chain.ImageName(l)+newSuffix) {
			continue
		}
		path := filepath.Join(d.path, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err == nil {
			out[path] = st.Blocks * 512
		}
	}
	return out, nil
}
