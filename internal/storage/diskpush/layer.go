package diskpush

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"path"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// qemuUser is whose files disks are in images of KubeVirt's.
const qemuUser = 107

// layer is a tar with one disk: what comes before the disk's bytes, and after them.
type layer struct {
	ctx        context.Context
	disk       io.ReaderAt
	bytes      int64
	head, tail []byte
	digest     v1.Hash
	progress   func(done, total int64)
}

// newLayer makes the layer of a disk and reads it for its digest.
func newLayer(ctx context.Context, d Disk, progress func(done, total int64)) (*layer, error) {
	info, err := d.File.Stat()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "disk/", Mode: 0o555},
		{Typeflag: tar.TypeReg, Name: "disk/" + path.Base(d.Name), Mode: 0o440, Size: info.Size()},
	} {
		h.Uid, h.Gid = qemuUser, qemuUser
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("describing the disk: %w", err)
		}
	}
	const block = 512
	l := &layer{ctx: ctx, disk: d.File, bytes: info.Size(), head: b.Bytes()}
	l.tail = make([]byte, (block-info.Size()%block)%block+2*block)
	content := l.open()
	if l.digest, _, err = v1.SHA256(content); err != nil {
		return nil, fmt.Errorf("reading the disk: %w", err)
	}
	l.progress = progress
	return l, nil
}

func (l *layer) total() int64 { return int64(len(l.head)) + l.bytes + int64(len(l.tail)) }

// open reads the layer from its beginning.
func (l *layer) open() io.ReadCloser {
	return &reader{l: l, from: io.MultiReader(bytes.NewReader(l.head), io.NewSectionReader(l.disk, 0, l.bytes), bytes.NewReader(l.tail))}
}

// reader ends with the context, and tells how far it is.
type reader struct {
	l    *layer
	from io.Reader
	done int64
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.l.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.from.Read(p)
	if r.done += int64(n); r.l.progress != nil {
		r.l.progress(r.done, r.l.total())
	}
	return n, err
}

func (r *reader) Close() error { return nil }

// Digest implements v1.Layer.
func (l *layer) Digest() (v1.Hash, error) { return l.digest, nil }

// DiffID implements v1.Layer: nothing is compressed, a qcow2 is so inside.
func (l *layer) DiffID() (v1.Hash, error) { return l.digest, nil }

// Compressed implements v1.Layer.
func (l *layer) Compressed() (io.ReadCloser, error) { return l.open(), nil }

// Uncompressed implements v1.Layer.
func (l *layer) Uncompressed() (io.ReadCloser, error) { return l.open(), nil }

// Size implements v1.Layer.
func (l *layer) Size() (int64, error) { return l.total(), nil }

// MediaType implements v1.Layer.
func (l *layer) MediaType() (types.MediaType, error) { return types.OCIUncompressedLayer, nil }
