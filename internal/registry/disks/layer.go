package disks

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
)

const (
	// maxHeaders and maxRead are how many entries and unpacked bytes of a layer are looked at.
	maxHeaders = 64
	maxRead    = 1 << 20
	// maxWindow bounds the memory that a zstd frame can ask for.
	maxWindow = 8 << 20
)

// hasDisk tells whether the first file of a layer is a disk: below /disk, and not hidden.
func hasDisk(layer io.Reader) (bool, error) {
	packed := bufio.NewReader(layer)
	head, err := packed.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	plain := io.Reader(packed)
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(packed)
		if err != nil {
			return false, err
		}
		plain = z
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return false, err
		}
		defer z.Close()
		plain = z
	}
	archive := tar.NewReader(io.LimitReader(plain, maxRead))
	for range maxHeaders {
		h, err := archive.Next()
		if err != nil {
			return false, err
		}
		dir, base := path.Split(path.Clean("/" + h.Name))
		switch {
		case h.Typeflag == tar.TypeDir, h.Typeflag == tar.TypeXGlobalHeader:
		case dir == "/disk/" && strings.HasPrefix(base, "."):
		default:
			return h.Typeflag == tar.TypeReg && dir == "/disk/" && h.Size > 0, nil
		}
	}
	return false, nil
}
