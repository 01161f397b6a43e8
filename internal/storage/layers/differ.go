package layers

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"atoll.dev/atoll/internal/storage/layers/changeset"
	"atoll.dev/atoll/internal/storage/layers/erofs"
)

// A Differ unpacks layers into snapshots of the atoll snapshotter. For mounts
// of any other it returns errdefs.ErrNotImplemented, upon which containerd
// asks the next differ.
type Differ struct {
	content content.Provider
	limits  changeset.Limits
}

// NewDiffer returns a Differ that reads layers from content.
func NewDiffer(content content.Provider) *Differ {
	return &Differ{content, changeset.DefaultLimits}
}

// Compare is not supported: the writable layer of a container is inside its
// virtual machine.
func (d *Differ) Compare(context.Context, []mount.Mount, []mount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, errdefs.ErrNotImplemented
}

// Apply unpacks the layer desc and returns the descriptor of its uncompressed
// tar, whose digest the caller compares with the image configuration's.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	none := ocispec.Descriptor{}
	if len(mounts) != 1 || mounts[0].Type != layerMount {
		return none, errdefs.ErrNotImplemented
	}
	if _, err := images.DiffCompression(ctx, desc.MediaType); err != nil {
		return none, fmt.Errorf("layer %s: media type %q: %w", desc.Digest, desc.MediaType, errdefs.ErrInvalidArgument)
	}
	var config diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &config); err != nil {
			return none, fmt.Errorf("applying differ option: %w", err)
		}
	}
	ra, err := d.content.ReaderAt(ctx, desc)
	if err != nil {
		return none, fmt.Errorf("opening layer %s: %w", desc.Digest, err)
	}
	defer ra.Close()
	blob := content.NewReader(ra)
	if config.Progress != nil {
		blob = &progressReader{r: blob, report: config.Progress}
	}
	tar, err := decompress(ctx, desc.MediaType, io.NopCloser(blob), config)
	if err != nil {
		return none, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	defer tar.Close()

	sum := digest.Canonical.Digester()
	count := &progressReader{r: io.TeeReader(tar, sum.Hash())}
	err = replaceFile(filepath.Join(mounts[0].Source, layerFile), func(f *os.File) error {
		return d.unpack(ctx, f, count, sha256.Sum256([]byte(desc.Digest)))
	})
	if err == nil {
		err = tar.Err()
	}
	if err != nil {
		return none, fmt.Errorf("unpacking layer %s: %w", desc.Digest, err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: count.n, Digest: sum.Digest()}, nil
}

// unpack writes the image of the layer tar r to f and reads r to its end.
func (d *Differ) unpack(ctx context.Context, f *os.File, r io.Reader, id [sha256.Size]byte) error {
	w, err := erofs.NewWriter(f, filepath.Dir(f.Name()), [16]byte(id[:16]))
	if err != nil {
		return err
	}
	defer w.Close()
	root, err := changeset.FromTar(ctx, r, w, d.limits)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, contextReader{ctx, r}); err != nil {
		return err
	}
	return w.Finish(root)
}

// tarStream is the end of a chain of stream processors.
type tarStream struct {
	io.ReadCloser
	chain []diff.StreamProcessor
}

// decompress runs a layer through containerd's stream processors until it is a
// plain tar.
func decompress(ctx context.Context, mediaType string, r io.ReadCloser, config diff.ApplyConfig) (*tarStream, error) {
	s := &tarStream{}
	processor := diff.NewProcessorChain(mediaType, r)
	for {
		var err error
		if processor, err = diff.GetProcessor(ctx, processor, config.ProcessorPayloads); err != nil {
			for _, p := range s.chain {
				p.Close()
			}
			return nil, fmt.Errorf("no way to read media type %q: %w", mediaType, err)
		}
		s.chain = append(s.chain, processor)
		if processor.MediaType() == ocispec.MediaTypeImageLayer {
			s.ReadCloser = processor
			return s, nil
		}
	}
}

// Err returns what a processor reports after the stream has ended.
func (s *tarStream) Err() error {
	for _, p := range s.chain {
		if e, ok := p.(interface{ Err() error }); ok && e.Err() != nil {
			return e.Err()
		}
	}
	return nil
}

// progressReader counts what is read.
type progressReader struct {
	r      io.Reader
	n      int64
	report func(int64)
}

func (p *progressReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.n += int64(n)
	if p.report != nil {
		p.report(p.n)
	}
	return n, err
}

// contextReader stops a long copy when its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
