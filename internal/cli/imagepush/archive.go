package imagepush

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// maxDocument bounds index.json, manifests and configurations of an archive: they are read into memory.
const maxDocument = 4 << 20

// nameAnnotation is how containerd notes the full name of an image in an index.
const nameAnnotation = "io.containerd.image.name"

// archive is an OCI layout in a tar file that is not compressed.
type archive struct {
	file  *os.File
	parts map[string]part // by cleaned path
}

// part is where a member's bytes are.
type part struct{ offset, size int64 }

// openImage opens the image of an archive; which one, if it has several, says the name. The returned function closes it.
func openImage(file, image string) (v1.Image, func() error, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, fmt.Errorf("opening the archive: %w", err)
	}
	img, err := imageOf(f, image)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", file, err), f.Close())
	}
	return img, f.Close, nil
}

func imageOf(f *os.File, image string) (v1.Image, error) {
	a := archive{file: f, parts: map[string]part{}}
	whole, err := a.scan()
	if err != nil {
		return nil, err
	}
	if _, ok := a.parts["index.json"]; !ok {
		if _, ok := a.parts["manifest.json"]; !ok {
			if !whole {
				return nil, errors.New("reading the archive: it is cut off")
			}
			return nil, errors.New(`it is no image archive: it has neither index.json (OCI layout) nor manifest.json ("docker save")`)
		}
		return a.dockerSave(image)
	}
	b, err := a.read("index.json")
	if err != nil {
		return nil, err
	}
	d, err := a.choose(b, image)
	if err != nil {
		return nil, err
	}
	return a.image(d)
}

// scan finds the members, and tells whether the archive is whole: two empty blocks end it. One that is cut off between
// two members has no other sign of it.
func (a archive) scan() (whole bool, err error) {
	var magic [4]byte
	if _, err := a.file.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("reading the archive: %w", err)
	}
	if bytes.HasPrefix(magic[:], []byte{0x1f, 0x8b}) || bytes.HasPrefix(magic[:], []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return false, errors.New("the archive is compressed; decompress it first (gunzip, zstd -d)")
	}
	const block = 512
	in := tar.NewReader(a.file)
	end := int64(0)
	for {
		h, err := in.Next()
		if err != nil && !errors.Is(err, io.EOF) {
			return false, fmt.Errorf("reading the archive: %w", err)
		}
		// The reader is at the first byte of the member, or behind the end: it reads from the file without buffering.
		offset, failed := a.file.Seek(0, io.SeekCurrent)
		if failed != nil {
			return false, fmt.Errorf("reading the archive: %w", failed)
		}
		if err != nil {
			return offset-end >= 2*block, nil
		}
		end = offset + (h.Size+block-1)/block*block
		if h.Typeflag == tar.TypeReg {
			a.parts[path.Clean(h.Name)] = part{offset: offset, size: h.Size}
		}
	}
}

func (a archive) section(name string) (*io.SectionReader, error) {
	p, ok := a.parts[name]
	if !ok {
		return nil, fmt.Errorf("the archive has no %s; it is incomplete", name)
	}
	return io.NewSectionReader(a.file, p.offset, p.size), nil
}

func (a archive) read(name string) ([]byte, error) {
	s, err := a.section(name)
	if err != nil {
		return nil, err
	}
	if s.Size() > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes, which is too much for what it should be", name, s.Size())
	}
	return io.ReadAll(s)
}

func blob(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

// choose picks a manifest of an index: by name, or the first; in a list of platforms the one for x86-64.
func (a archive) choose(index []byte, image string) (v1.Descriptor, error) {
	for depth := 0; ; depth++ {
		m, err := v1.ParseIndexManifest(bytes.NewReader(index))
		if err != nil {
			return v1.Descriptor{}, fmt.Errorf("reading its index: %w", err)
		}
		d, err := pick(m.Manifests, image)
		if err != nil {
			return v1.Descriptor{}, err
		}
		if !d.MediaType.IsIndex() {
			return d, nil
		}
		if depth == 3 {
			return v1.Descriptor{}, errors.New("its index is too deep")
		}
		if index, err = a.read(blob(d.Digest)); err != nil {
			return v1.Descriptor{}, err
		}
		image = ""
	}
}

func pick(all []v1.Descriptor, image string) (v1.Descriptor, error) {
	if image != "" {
		var names []string
		for _, d := range all {
			full, tag := d.Annotations[nameAnnotation], d.Annotations["org.opencontainers.image.ref.name"]
			if image == full || image == tag {
				return d, nil
			}
			names = append(names, full)
		}
		return v1.Descriptor{}, fmt.Errorf("it has no image %q; it has %s", image, strings.Join(names, ", "))
	}
	ours := slices.IndexFunc(all, func(d v1.Descriptor) bool {
		return (d.MediaType.IsImage() || d.MediaType.IsIndex()) &&
			(d.Platform == nil || d.Platform.OS == "linux" && d.Platform.Architecture == "amd64")
	})
	if ours < 0 {
		return v1.Descriptor{}, errors.New("it has no image for linux/amd64")
	}
	return all[ours], nil
}

// image is one image of the layout.
func (a archive) image(d v1.Descriptor) (v1.Image, error) {
	raw, err := a.read(blob(d.Digest))
	if err != nil {
		return nil, err
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("reading its manifest: %w", err)
	}
	return partial.CompressedToImage(layoutImage{archive: a, mediaType: d.MediaType, raw: raw, manifest: m})
}

// layoutImage implements partial.CompressedImageCore.
type layoutImage struct {
	archive   archive
	mediaType types.MediaType
	raw       []byte
	manifest  *v1.Manifest
}

func (i layoutImage) RawConfigFile() ([]byte, error) {
	return i.archive.read(blob(i.manifest.Config.Digest))
}
func (i layoutImage) MediaType() (types.MediaType, error) { return i.mediaType, nil }
func (i layoutImage) RawManifest() ([]byte, error)        { return i.raw, nil }

func (i layoutImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, d := range append(slices.Clone(i.manifest.Layers), i.manifest.Config) {
		if d.Digest == h {
			return layoutLayer{archive: i.archive, descriptor: d}, nil
		}
	}
	return nil, fmt.Errorf("the image has no layer %s", h)
}

// layoutLayer implements partial.CompressedLayer.
type layoutLayer struct {
	archive    archive
	descriptor v1.Descriptor
}

func (l layoutLayer) Digest() (v1.Hash, error) { return l.descriptor.Digest, nil }
func (l layoutLayer) Size() (int64, error)     { return l.descriptor.Size, nil }

func (l layoutLayer) MediaType() (types.MediaType, error) { return l.descriptor.MediaType, nil }

func (l layoutLayer) Compressed() (io.ReadCloser, error) {
	s, err := l.archive.section(blob(l.descriptor.Digest))
	if err != nil {
		return nil, err
	}
	return io.NopCloser(s), nil
}

// dockerSave is the image of an archive as older versions of `docker save` write it.
func (a archive) dockerSave(image string) (v1.Image, error) {
	var tag *name.Tag
	if image != "" {
		t, err := name.NewTag(image)
		if err != nil {
			return nil, fmt.Errorf("%q is no name of an image: %w", image, err)
		}
		tag = &t
	}
	img, err := tarball.Image(func() (io.ReadCloser, error) {
		info, err := a.file.Stat()
		if err != nil {
			return nil, err
		}
		return io.NopCloser(io.NewSectionReader(a.file, 0, info.Size())), nil
	}, tag)
	if err != nil {
		return nil, fmt.Errorf("reading its image: %w", err)
	}
	return img, nil
}
