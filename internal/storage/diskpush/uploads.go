package diskpush

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// uploads notes beside the disk which uploads a push has begun, so that the next one ends them: the registry keeps what
// has come of an upload for an hour, and counts it in the project's quota.
type uploads struct {
	next http.RoundTripper
	file string

	mu    sync.Mutex // guards begun
	begun []string
}

// RoundTrip implements http.RoundTripper.
func (u *uploads) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := u.next.RoundTrip(r)
	if err != nil || r.Method != http.MethodPost || resp.StatusCode != http.StatusAccepted {
		return resp, err
	}
	at, err := resp.Location()
	if err != nil {
		return resp, nil //nolint:nilerr // who asked for the upload will tell
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.begun = append(u.begun, at.RequestURI())
	if err := atomicfile.Write(u.file, []byte(strings.Join(u.begun, "\n")), 0o600); err != nil {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("noting an upload: %w", err)
	}
	return resp, nil
}

// done forgets the uploads, which are complete.
func (u *uploads) done() { _ = os.Remove(u.file) } // at worst they are looked for once more

// end cancels what an earlier push has begun. One that the registry does not know any more is none.
func (u *uploads) end(ctx context.Context, repo name.Repository, auth login) error {
	b, err := os.ReadFile(u.file)
	if err != nil {
		return nil //nolint:nilerr // there is nothing to end
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, u.next, []string{repo.Scope(transport.PushScope)})
	if err != nil {
		return err
	}
	below := "/v2/" + repo.RepositoryStr() + "/blobs/uploads/"
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		at, err := url.Parse(lines.Text())
		if err != nil || !strings.HasPrefix(at.Path, below) {
			continue
		}
		at.Scheme, at.Host = "https", repo.RegistryStr()
		req, err := http.NewRequestWithContext(ctx, http.MethodDelete, at.String(), nil)
		if err != nil {
			return err
		}
		resp, err := (&http.Client{Transport: rt}).Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
	}
	u.done()
	return nil
}
