package library

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/klauspost/compress/zstd"

	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/diskimage"
)

// maxWindow bounds the memory that a compressed file can ask for.
const maxWindow = 128 << 20

// unpack finds the disks in the original, and unpacks what is compressed.
func (l *Library) unpack(ctx context.Context, i *Item, progress func(Progress)) error {
	name, fileName := originalFile, i.FileName
	packing, err := l.packing(i.ID, name)
	if err != nil {
		return err
	}
	switch packing {
	case diskimage.Gzip, diskimage.XZ, diskimage.Zstd:
		name, fileName = "disk-0", strings.TrimSuffix(fileName, filepath.Ext(fileName))
		if err := l.decompress(ctx, i.ID, span{file: originalFile}, packing, name, progress); err != nil {
			return err
		}
		if packing, err = l.packing(i.ID, name); err != nil {
			return err
		}
		if packing != diskimage.Unpacked && packing != diskimage.Tar {
			return fmt.Errorf("%w: it is compressed twice", ErrContent)
		}
	default:
	}
	if packing == diskimage.Tar {
		return l.appliance(ctx, i, name, progress)
	}
	d, err := l.detect(i.ID, span{file: name}, fileName)
	if err != nil {
		return err
	}
	d.Name = "disk-0"
	i.Kind = KindOVF
	if d.Info.Format == diskimage.ISO {
		i.Kind = KindISO
	}
	i.Disks = []Disk{d}
	return nil
}

// span is a part of a file of an item; length 0 is all of it.
type span struct {
	file           string
	offset, length int64
}

// open opens a span.
func (l *Library) open(id string, s span) (*os.File, *io.SectionReader, error) {
	f, err := os.Open(l.path(id, s.file))
	if err != nil {
		return nil, nil, fmt.Errorf("opening image %s: %w", id, err)
	}
	length := s.length
	if length == 0 {
		info, err := f.Stat()
		if err != nil {
			return nil, nil, errors.Join(err, f.Close())
		}
		length = info.Size() - s.offset
	}
	return f, io.NewSectionReader(f, s.offset, length), nil
}

// packing tells how a file is packed.
func (l *Library) packing(id, file string) (diskimage.Packing, error) {
	f, r, err := l.open(id, span{file: file})
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 512)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("reading image %s: %w", id, err)
	}
	return diskimage.Packed(head[:n]), nil
}

// detect tells what a disk is.
func (l *Library) detect(id string, s span, fileName string) (Disk, error) {
	f, r, err := l.open(id, s)
	if err != nil {
		return Disk{}, err
	}
	defer f.Close()
	ext := strings.ToLower(filepath.Ext(fileName))
	info, err := diskimage.Detect(r, r.Size(), ext == ".raw" || ext == ".img")
	if err != nil {
		return Disk{}, fmt.Errorf("%w: %w", ErrContent, err)
	}
	return Disk{File: s.file, Offset: s.offset, Length: s.length, Info: info, Size: info.Size}, nil
}

// decompress unpacks a span into a file.
func (l *Library) decompress(ctx context.Context, id string, from span, packing diskimage.Packing, to string, progress func(Progress)) error {
	f, r, err := l.open(id, from)
	if err != nil {
		return err
	}
	defer f.Close()
	out, err := os.OpenFile(l.path(id, to), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("unpacking image %s: %w", id, full(err))
	}
	w := &sparse{f: out, limit: l.cfg.MaxUnpacked, room: l.room}
	if packing == diskimage.XZ { // which wants more memory than it can be trusted with here
		to := &counter{Writer: w, tell: func(n int64) { progress(Progress{PhaseUnpack, n, 0}) }}
		err = convert.UnpackXZ(ctx, f, to)
	} else {
		read := &readCounter{Reader: ctxReader{ctx, r}, tell: func(n int64) { progress(Progress{PhaseUnpack, n, r.Size()}) }}
		err = copyPlain(w, read, packing)
	}
	if ctx.Err() == nil && err != nil && !errors.Is(err, ErrFull) && !errors.Is(err, ErrContent) && !isPathError(err) {
		err = fmt.Errorf("%w: unpacking by %s at %d bytes: %w; was the transfer interrupted?", ErrContent, packing, w.at, err)
	}
	if err = errors.Join(err, w.finish(), out.Chmod(0o444), out.Sync(), out.Close()); err != nil {
		return fmt.Errorf("unpacking image %s: %w", id, full(err))
	}
	return nil
}

// copyPlain copies what is in a compressed file.
func copyPlain(w io.Writer, r io.Reader, packing diskimage.Packing) error {
	plain, err := unpacker(r, packing)
	if err != nil {
		return err
	}
	defer plain.Close()
	_, err = io.CopyBuffer(w, plain, make([]byte, 1<<20))
	return err
}

func isPathError(err error) bool {
	var p *fs.PathError
	return errors.As(err, &p)
}

// unpacker reads what is compressed, with bounded memory.
func unpacker(r io.Reader, packing diskimage.Packing) (io.ReadCloser, error) {
	switch packing {
	case diskimage.Gzip:
		return gzip.NewReader(r)
	case diskimage.XZ:
		return nil, errors.New("xz is for whole files only")
	case diskimage.Zstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	default:
		return io.NopCloser(r), nil
	}
}

// readCounter tells now and then how much was read.
type readCounter struct {
	io.Reader
	tell func(n int64)
	c    counter
}

func (r *readCounter) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.c.Writer, r.c.tell = io.Discard, r.tell
	_, _ = r.c.Write(p[:n]) // counts only
	return n, err
}

// sparse writes a file and leaves holes where there are zeros.
type sparse struct {
	f       *os.File
	limit   int64
	room    func(bytes int64) error
	at      int64
	written int64
	checked int64
}

// hole is the least that is left out.
const hole = 64 << 10

func (s *sparse) Write(p []byte) (int, error) {
	if s.at+int64(len(p)) > s.limit {
		return 0, fmt.Errorf("%w: it is larger than %d bytes", ErrContent, s.limit)
	}
	for done := 0; done < len(p); {
		n := min(len(p)-done, hole-int(s.at%hole))
		block := p[done : done+n]
		if !bytes.Equal(block, zeros[:n]) {
			if _, err := s.f.WriteAt(block, s.at); err != nil {
				return done, full(err)
			}
			s.written += int64(n)
		}
		done, s.at = done+n, s.at+int64(n)
	}
	if s.written-s.checked > 64<<20 {
		s.checked = s.written
		if err := s.room(0); err != nil {
			return len(p), err
		}
	}
	return len(p), nil
}

// finish gives the file its length.
func (s *sparse) finish() error { return full(s.f.Truncate(s.at)) }

// zeros is a block of them.
var zeros = make([]byte, hole)

// allocated is what a file takes on disk.
func allocated(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}
