package library

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"atoll.dev/atoll/internal/storage/diskimage"
)

// OCI is an image or artifact in a registry. An image has the disk in a layer, below /disk (KubeVirt's
// containerDisk); an artifact has it as a blob of its own.
type OCI struct {
	// Reference is registry/repository:tag or @digest, perhaps with oci:// before it.
	Reference string
	// CA is as in HTTP.
	CA string
	// PlainHTTP talks to the registry without TLS; registries on this host are talked to like that anyway.
	PlainHTTP bool
	// Own, when set, is how the cluster's own registry is reached, which the reference is in.
	Own *OwnRegistry
}

// OwnRegistry is the cluster's registry.
type OwnRegistry struct {
	// Address that is connected to, host:port, whatever the reference says; CA is what it is trusted by, in PEM.
	Address, CA string
	// Login returns credentials.
	Login func(ctx context.Context) (user, password string, err error)
}

// Transport connects to the registry, whatever a reference says.
func (o *OwnRegistry) Transport() (*http.Transport, error) {
	t, err := (&Library{}).transport(o.CA, false)
	if err != nil {
		return nil, err
	}
	t.Proxy = nil
	t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, o.Address)
	}
	return t, nil
}

// titleAnnotation is the file name of a blob.
const titleAnnotation = "org.opencontainers.image.title"

// registry is one reference and how to get its blobs.
type registry struct {
	*Library
	id     string
	ref    name.Reference
	client *http.Client
	report func(done, total int64)
}

// fetchOCI gets the disk of an image or artifact.
func (l *Library) fetchOCI(ctx context.Context, id string, s Source, progress func(done, total int64)) (string, error) {
	ref, err := s.OCI.Parse()
	if err != nil {
		return "", err
	}
	connections, login, err := l.connect(ctx, s)
	if err != nil {
		return "", err
	}
	defer connections.CloseIdleConnections()
	var base http.RoundTripper = connections
	if s.OCI.Own != nil {
		base = Only{Next: base, Repository: ref.Context(), Refused: ErrSource}
	}
	image, err := manifest(ctx, ref, base, login)
	if err != nil {
		return "", err
	}
	repo := ref.Context()
	authorized, err := transport.NewWithContext(ctx, repo.Registry, login, base, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return "", fmt.Errorf("talking to registry %s: %w", repo.RegistryStr(), err)
	}
	r := registry{Library: l, id: id, ref: ref, client: &http.Client{Transport: authorized}, report: progress}
	if isImage(image) {
		return r.disk(ctx, image.Layers)
	}
	return r.artifact(ctx, image.Layers)
}

// Parse reads the reference.
func (o OCI) Parse() (name.Reference, error) {
	text := o.Reference
	for _, prefix := range []string{"oci://", "docker://"} {
		text = strings.TrimPrefix(text, prefix)
	}
	var options []name.Option
	if o.PlainHTTP {
		options = append(options, name.Insecure)
	}
	ref, err := name.ParseReference(text, options...)
	if err != nil {
		return nil, fmt.Errorf("%w: OCI reference %.200q: %w", ErrSource, o.Reference, err)
	}
	// What a server would clean up is another repository.
	if repository := ref.Context().RepositoryStr(); path.Clean("/"+repository) != "/"+repository {
		return nil, fmt.Errorf("%w: OCI reference %.200q: %q is no name of a repository", ErrSource, o.Reference, repository)
	}
	return ref, nil
}

// Only lets requests pass that are for one repository of one registry, and by TLS. Whose credentials are good for more
// than that must not be led elsewhere, by a redirect or a challenge.
type Only struct {
	Next       http.RoundTripper
	Repository name.Repository
	// Push lets what a push asks for pass as well: every action in the repository, and paths that end in a slash.
	Push bool
	// Refused is wrapped by refusals.
	Refused error
}

// RoundTrip implements http.RoundTripper.
func (o Only) RoundTrip(r *http.Request) (*http.Response, error) {
	at, root := r.URL.Path, "/v2/"+o.Repository.RepositoryStr()+"/"
	tidy := at == "/v2/" || at == path.Clean(at)
	if o.Push {
		tidy = strings.TrimSuffix(at, "/") == path.Clean(at)
	}
	switch {
	case r.URL.Scheme != "https" || r.URL.Host != o.Repository.RegistryStr():
	case !tidy:
	case strings.HasPrefix(at, "/v2/") && at != "/v2/" && !strings.HasPrefix(at, root):
	case slices.ContainsFunc(r.URL.Query()["scope"], o.elsewhere):
	default:
		return o.Next.RoundTrip(r)
	}
	return nil, fmt.Errorf("%w: %s is not part of %s", o.Refused, r.URL.Redacted(), o.Repository)
}

// elsewhere tells whether a scope is not one that is needed.
func (o Only) elsewhere(scope string) bool {
	if o.Push {
		return !strings.HasPrefix(scope, "repository:"+o.Repository.RepositoryStr()+":")
	}
	return scope != o.Repository.Scope(transport.PullScope)
}

// connect is how a registry is talked to, and as whom: the cluster's own at its address and with credentials, all others
// as nobody.
func (l *Library) connect(ctx context.Context, s Source) (*http.Transport, authn.Authenticator, error) {
	own := s.OCI.Own
	if own == nil {
		t, err := l.transport(s.OCI.CA, s.Guarded)
		return t, authn.Anonymous, err
	}
	t, err := own.Transport()
	if err != nil {
		return nil, nil, err
	}
	user, password, err := own.Login(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("logging in at the cluster's registry: %w", err)
	}
	return t, &authn.Basic{Username: user, Password: password}, nil
}

// manifest reads the manifest of a reference, for this architecture if there are several.
func manifest(ctx context.Context, ref name.Reference, base http.RoundTripper, login authn.Authenticator) (*v1.Manifest, error) {
	found, err := remote.Get(ref, remote.WithContext(ctx), remote.WithTransport(base), remote.WithAuth(login), remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	var failed *transport.Error
	if errors.As(err, &failed) && (failed.StatusCode == http.StatusNotFound || failed.StatusCode == http.StatusUnauthorized || failed.StatusCode == http.StatusForbidden) {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, ref, err)
	}
	if _, ok := errors.AsType[errGuarded](err); ok {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, ref, err)
	}
	if err != nil {
		return nil, fmt.Errorf("getting the manifest of %s: %w", ref, err)
	}
	image, err := found.Image()
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, ref, err)
	}
	m, err := image.Manifest()
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, ref, err)
	}
	if len(m.Layers) == 0 || len(m.Layers) > 500 {
		return nil, fmt.Errorf("%w: %s has %d layers", ErrSource, ref, len(m.Layers))
	}
	return m, nil
}

// isImage tells a container image from an artifact.
func isImage(m *v1.Manifest) bool {
	return (m.Config.MediaType == types.DockerConfigJSON || m.Config.MediaType == types.OCIConfigJSON) &&
		!slices.ContainsFunc(m.Layers, func(d v1.Descriptor) bool { return !d.MediaType.IsLayer() })
}

// artifact gets the blob that is the disk.
func (r registry) artifact(ctx context.Context, blobs []v1.Descriptor) (string, error) {
	if len(blobs) > 1 {
		named := slices.DeleteFunc(slices.Clone(blobs), func(d v1.Descriptor) bool {
			return !slices.Contains(extensions(), strings.ToLower(path.Ext(d.Annotations[titleAnnotation])))
		})
		if len(named) != 1 {
			return "", fmt.Errorf("%w: %s has %d blobs, and not exactly one whose title ends in one of %s", ErrSource, r.ref, len(blobs), strings.Join(extensions(), " "))
		}
		blobs = named
	}
	title := path.Base(blobs[0].Annotations[titleAnnotation])
	if title == "." || title == "/" || len(title) > 255 {
		title = ""
	}
	if err := r.blob(ctx, blobs[0], partFile); err != nil {
		return "", err
	}
	return title, r.finish(r.id)
}

// extensions are those of files that are images.
func extensions() []string {
	return []string{".qcow2", ".qcow", ".img", ".raw", ".iso", ".vmdk", ".vhd", ".vhdx", ".ova", ".gz", ".xz", ".zst"}
}

// disk finds the disk in the layers of an image, from the top down.
func (r registry) disk(ctx context.Context, layers []v1.Descriptor) (string, error) {
	for n, layer := range slices.Backward(layers) {
		file := fmt.Sprintf("layer-%d", n)
		if err := r.blob(ctx, layer, file); err != nil {
			return "", err
		}
		found, err := r.inLayer(ctx, file)
		if err != nil {
			return "", fmt.Errorf("looking for the disk in a layer of %s: %w", r.ref, err)
		}
		if found != "" {
			if err := r.finish(r.id); err != nil {
				return "", err
			}
			for k := n; k < len(layers); k++ {
				file := r.path(r.id, fmt.Sprintf("layer-%d", k))
				if err := errors.Join(os.Remove(file), os.Remove(file+".json")); err != nil {
					return "", fmt.Errorf("removing a layer of %s: %w", r.ref, err)
				}
			}
			return found, nil
		}
	}
	return "", fmt.Errorf("%w: image %s has no file below /disk; a disk image in a container image is at /disk/<name>.qcow2 (or .img)", ErrSource, r.ref)
}

// inLayer copies the file below disk/ of a layer to part, and returns its name.
func (r registry) inLayer(ctx context.Context, file string) (string, error) {
	f, err := os.Open(r.path(r.id, file))
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 512)
	n, _ := f.ReadAt(head, 0) // a short file is none of these
	plain, err := unpacker(ctxReader{ctx, f}, diskimage.Packed(head[:n]))
	if err != nil {
		return "", err
	}
	defer plain.Close()
	archive := tar.NewReader(plain)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return "", nil
		}
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrContent, err)
		}
		dir, base := path.Split(path.Clean("/" + h.Name))
		if h.Typeflag != tar.TypeReg || dir != "/disk/" || h.Size == 0 || strings.HasPrefix(base, ".") {
			continue
		}
		if err := r.room(h.Size); err != nil {
			return "", err
		}
		return base, r.write(partFile, archive, h.Size)
	}
}

// write writes a file of an item, leaving out zeros.
func (r registry) write(file string, from io.Reader, bytes int64) error {
	out, err := os.OpenFile(r.path(r.id, file), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return full(err)
	}
	w := &sparse{f: out, limit: bytes, room: r.room}
	_, err = io.CopyBuffer(w, from, make([]byte, 1<<20))
	return errors.Join(err, w.finish(), out.Close())
}

// blob gets a blob into a file, and verifies it.
func (r registry) blob(ctx context.Context, d v1.Descriptor, file string) error {
	if d.Digest.Algorithm != "sha256" {
		return fmt.Errorf("%w: %s has a blob with a digest of %.40q", ErrSource, r.ref, d.Digest.Algorithm)
	}
	repo := r.ref.Context()
	from := fmt.Sprintf("%s://%s/v2/%s/blobs/%s", repo.Registry.Scheme(), repo.RegistryStr(), repo.RepositoryStr(), d.Digest)
	if _, err := r.transfer(ctx, r.id, transfer{client: r.client, url: from, fixed: true, into: file}, r.report); err != nil {
		return err
	}
	f, err := os.Open(r.path(r.id, file))
	if err != nil {
		return fmt.Errorf("verifying a blob of %s: %w", r.ref, err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.CopyBuffer(sum, ctxReader{ctx, f}, make([]byte, 1<<20)); err != nil {
		return fmt.Errorf("verifying a blob of %s: %w", r.ref, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != d.Digest.Hex {
		err := fmt.Errorf("%w: a blob of %s has the SHA256 checksum %s, and %s was expected; it was deleted", ErrChecksum, r.ref, got, d.Digest.Hex)
		return errors.Join(err, os.Remove(f.Name()), os.Remove(f.Name()+".json"))
	}
	return nil
}
