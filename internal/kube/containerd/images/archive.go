package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// decompress returns the tar in r, whatever it is compressed with.
func decompress(r io.Reader) (io.ReadCloser, error) {
	s, err := compression.DecompressStream(r)
	if err != nil {
		return nil, fmt.Errorf("not an image archive: %w", err)
	}
	return s, nil
}

// readArchive stores the blobs of an archive and returns its index. The walk
// over what refers to what is the caller's.
func (c *Client) readArchive(ctx context.Context, r io.Reader) (*ocispec.Index, error) {
	desc, err := archive.ImportIndex(ctx, c.client.ContentStore(), r)
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("the archive is cut short: %w", err)
		}
		return nil, err
	}
	b, err := content.ReadBlob(ctx, c.client.ContentStore(), desc)
	if err != nil {
		return nil, fmt.Errorf("reading the archive's index: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, fmt.Errorf("reading the archive's index: %w", err)
	}
	if images.IsManifestType(desc.MediaType) {
		index.Manifests = []ocispec.Descriptor{desc}
	}
	return &index, nil
}
