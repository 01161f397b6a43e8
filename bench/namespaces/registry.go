package namespaces

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/bench/rig"
)

// rounds is how often the image is pushed, pulled and copied.
const rounds = 3

// fileLayer is a layer that is a file.
type fileLayer struct {
	path string
	hash v1.Hash
	size int64
}

var _ v1.Layer = fileLayer{}

func (l fileLayer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l fileLayer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l fileLayer) Compressed() (io.ReadCloser, error)   { return os.Open(l.path) }
func (l fileLayer) Uncompressed() (io.ReadCloser, error) { return os.Open(l.path) }
func (l fileLayer) Size() (int64, error)                 { return l.size, nil }
func (l fileLayer) MediaType() (types.MediaType, error)  { return types.OCIUncompressedLayer, nil }

// newLayer writes a layer that cannot be compressed.
func newLayer(path string, size int64) (fileLayer, error) {
	f, err := os.Create(path)
	if err != nil {
		return fileLayer{}, err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(rand.Reader, size)); err != nil {
		return fileLayer{}, fmt.Errorf("writing %s: %w", path, err)
	}
	return fileLayer{path: path, size: size, hash: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}}, f.Sync()
}

// copyFile copies a file and has it on the disk when it returns.
func copyFile(to string, from io.Reader) (err error) {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.Copy(f, from); err != nil {
		return err
	}
	return f.Sync()
}

// RegistryThroughput pushes and pulls an image of 1 GiB as the owner of a namespace, and copies the same file beside the
// registry. A round is a new image, so that nothing is there already.
func RegistryThroughput(ctx context.Context, h *rig.Host) (rows []rig.Row, err error) {
	p, err := newPerson(ctx, h)
	if err != nil {
		return nil, err
	}
	c, err := objects(h)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(h.Options.DataDir, "bench-registry-")
	if err != nil {
		return nil, err
	}
	defer func() {
		end := context.WithoutCancel(ctx)
		err = errors.Join(err, removeNamespaces(end, c), removePerson(end, h), os.RemoveAll(dir))
	}()
	b := bounded(namespacePrefix + "images")
	b.Spec.AccessList = []atoll.NamespaceAccess{{SubjectType: "User", Subject: p.name, Domain: atoll.LocalDomain, Role: atoll.RoleOwner}}
	if err := readyNamespace(ctx, c, b); err != nil {
		return nil, err
	}
	address, transport, err := portal(ctx, h)
	if err != nil {
		return nil, err
	}
	var push, pull, copied []float64
	for i := range rounds {
		layer, err := newLayer(filepath.Join(dir, "layer"), rig.GiB)
		if err != nil {
			return nil, err
		}
		tag, err := name.NewTag(fmt.Sprintf("%s/%s/gib:%d", address, b.Name, i))
		if err != nil {
			return nil, err
		}
		t, err := oneImage(ctx, tag, transport, p, layer, filepath.Join(dir, "copy"))
		if err != nil {
			return nil, err
		}
		push, pull, copied = append(push, gibPerSecond(t.push)), append(pull, gibPerSecond(t.pull)), append(copied, gibPerSecond(t.copied))
	}
	pushed := rig.Versus("push of a 1 GiB image", "GiB/s", push, "copy of the file", copied)
	pulled := rig.Versus("pull of a 1 GiB image into a file", "GiB/s", pull, "copy of the file", copied)
	pushed.Note, pulled.Note = "as the owner of a namespace, with TLS", "as the owner of a namespace, with TLS"
	return []rig.Row{pushed, pulled}, nil
}

func gibPerSecond(d time.Duration) float64 { return 1 / d.Seconds() }

// moves are the times of one image.
type moves struct{ push, pull, copied time.Duration }

func oneImage(ctx context.Context, tag name.Tag, transport http.RoundTripper, p person, layer fileLayer, to string) (moves, error) {
	var m moves
	image, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layer)
	if err != nil {
		return m, err
	}
	options := []remote.Option{
		remote.WithContext(ctx), remote.WithTransport(transport), remote.WithAuth(&authn.Basic{Username: p.name, Password: p.password}),
	}
	begin := time.Now()
	if err := remote.Write(tag, image, options...); err != nil {
		return m, fmt.Errorf("pushing %s: %w", tag, err)
	}
	m.push = time.Since(begin)
	begin = time.Now()
	got, err := remote.Image(tag, options...)
	if err != nil {
		return m, fmt.Errorf("pulling %s: %w", tag, err)
	}
	layers, err := got.Layers()
	if err != nil {
		return m, fmt.Errorf("pulling %s: %w", tag, err)
	}
	for _, l := range layers {
		blob, err := l.Compressed() // checks the digest
		if err != nil {
			return m, fmt.Errorf("pulling %s: %w", tag, err)
		}
		if err := errors.Join(copyFile(to, blob), blob.Close()); err != nil {
			return m, fmt.Errorf("pulling %s: %w", tag, err)
		}
	}
	m.pull = time.Since(begin)
	from, err := layer.Compressed()
	if err != nil {
		return m, err
	}
	begin = time.Now()
	if err := errors.Join(copyFile(to, from), from.Close()); err != nil {
		return m, fmt.Errorf("copying the layer: %w", err)
	}
	m.copied = time.Since(begin)
	return m, nil
}
