// Package diskpush sends disks of virtual machines to the cluster's registry, as images that others understand: one layer
// that is a tar with the file disk/NAME.qcow2, as KubeVirt's containerDisk has it. The importer of images reads them
// (internal/storage/library), as do `oras`, `crane` and `docker`.
//
// The same disk makes the same bytes each time, and the tag is written when everything else is there: a push that was
// killed leaves no tag, and another one goes on with what the registry has. A tag that points to something else is left
// alone.
//
// The agent calls it. What can go wrong: the registry does not answer, which is worth another try; it refuses (ErrRefused:
// a quota, an immutable tag, a tag that is there), which is not.
package diskpush

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path"
	"runtime"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"atoll.dev/atoll/internal/storage/library"
)

// ErrRefused says that the registry does not take the disk, and will not.
var ErrRefused = errors.New("the registry refuses the disk")

// errElsewhere says that the registry leads out of the repository, or to a connection without TLS, which the library tries
// when a name ends in .local.
var errElsewhere = errors.New("the registry leads elsewhere")

// Disk is what is sent.
type Disk struct {
	// File is a disk image, all of it, and Name what it is called in the layer. Beside it a file .uploads is kept.
	File *os.File
	Name string
	// Annotations are those of the manifest; empty ones are left out.
	Annotations map[string]string
}

// Target is where it goes.
type Target struct {
	Registry *library.OwnRegistry
	// Reference is HOST/PROJECT/REPOSITORY:TAG.
	Reference string
}

// Push sends a disk, and returns the digest of its manifest. It tells how many bytes were sent, each time anew when the
// transfer begins again.
func Push(ctx context.Context, to Target, d Disk, progress func(done, total int64)) (string, error) {
	tag, err := name.NewTag(to.Reference, name.StrictValidation)
	if err != nil {
		return "", fmt.Errorf("%w: %q is no name of an image in a registry: %w", ErrRefused, to.Reference, err)
	}
	told := &guarded{tell: progress}
	defer told.end()
	if repository := tag.RepositoryStr(); path.Clean("/"+repository) != "/"+repository { // what a server would clean up is another one
		return "", fmt.Errorf("%w: %q is no name of a repository", ErrRefused, repository)
	}
	image, err := build(ctx, d, told.progress)
	if err != nil {
		return "", fmt.Errorf("pushing %s: %w", tag, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("pushing %s: %w", tag, err)
	}
	rt, err := to.Registry.Transport()
	if err != nil {
		return "", fmt.Errorf("pushing %s: %w", tag, err)
	}
	defer rt.CloseIdleConnections()
	up := &uploads{next: library.Only{Next: rt, Repository: tag.Repository, Push: true, Refused: errElsewhere}, file: d.File.Name() + ".uploads"}
	if err := up.end(ctx, tag.Repository, login{to.Registry}); err != nil {
		return "", explain(tag, err)
	}
	options := []remote.Option{
		remote.WithContext(ctx), remote.WithTransport(up), remote.WithUserAgent("atoll"), remote.WithAuth(login{to.Registry}), remote.WithJobs(1),
	}
	there, err := remote.Head(tag, options...)
	switch {
	case err == nil && there.Digest == digest:
		return digest.String(), nil
	case err == nil:
		return "", fmt.Errorf("%w: %s is there already and is %s; choose another name or tag, or delete it with `atoll registry rm`", ErrRefused, tag, there.Digest)
	case status(err) != http.StatusNotFound:
		return "", explain(tag, err)
	}
	if err := remote.Write(tag, image, options...); err != nil {
		return "", explain(tag, err)
	}
	up.done()
	return digest.String(), nil
}

// guarded tells progress until the push has ended: what sends the bytes may read on for a while after a refusal.
type guarded struct {
	tell func(done, total int64)

	mu    sync.Mutex // guards ended, and is held while tell runs
	ended bool
}

func (g *guarded) progress(done, total int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.ended && g.tell != nil {
		g.tell(done, total)
	}
}

func (g *guarded) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
}

// build makes the image of a disk. It reads the disk once, for the digest.
func build(ctx context.Context, d Disk, progress func(done, total int64)) (v1.Image, error) {
	l, err := newLayer(ctx, d, progress)
	if err != nil {
		return nil, err
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.ConfigFile(base, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		return nil, err
	}
	if image, err = mutate.AppendLayers(image, l); err != nil {
		return nil, err
	}
	said := map[string]string{}
	for key, value := range d.Annotations {
		if value != "" {
			said[key] = value
		}
	}
	annotated, ok := mutate.Annotations(image, said).(v1.Image)
	if !ok {
		return nil, errors.New("the image has lost its kind")
	}
	return annotated, nil
}

// login asks for credentials each time that the registry wants them: they do not live long.
type login struct{ registry *library.OwnRegistry }

// Authorization implements authn.Authenticator.
func (l login) Authorization() (*authn.AuthConfig, error) {
	return l.AuthorizationContext(context.Background())
}

// AuthorizationContext implements authn.ContextAuthenticator.
func (l login) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	user, password, err := l.registry.Login(ctx)
	if err != nil {
		return nil, fmt.Errorf("logging in at the cluster's registry: %w", err)
	}
	return &authn.AuthConfig{Username: user, Password: password}, nil
}

func status(err error) int {
	if answer, ok := errors.AsType[*transport.Error](err); ok {
		return answer.StatusCode
	}
	return 0
}

// explain tells refusals from what may go away. A registry that has just started knows nobody for a moment, which it
// says by 401.
func explain(tag name.Tag, err error) error {
	answer, ok := errors.AsType[*transport.Error](err)
	if !ok || answer.StatusCode != http.StatusForbidden && answer.StatusCode != http.StatusRequestEntityTooLarge {
		return fmt.Errorf("pushing %s: %w", tag, err)
	}
	var said []string
	for _, d := range answer.Errors {
		said = append(said, d.Message)
	}
	if text := strings.Join(said, "; "); strings.Contains(text, "quota") || strings.Contains(text, "immutable") {
		return fmt.Errorf("%w: %s: %s", ErrRefused, tag, text)
	}
	return fmt.Errorf("pushing %s: %w", tag, err)
}
