package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"atoll.dev/atoll/internal/registry/store"
)

const (
	// manifestWithin is how long a client may take to send a manifest, and stallWithin how long nothing of it may come.
	manifestWithin = time.Minute
	stallWithin    = 10 * time.Second
	// firstBody is the room that a manifest gets before anything of it has come; most are smaller.
	firstBody = 64 << 10
)

// errNoRoom says that others have all the memory that there is for manifests, errTooLong that one is none.
var (
	errNoRoom  = errors.New("too many manifests are being pushed to this project, by this user, or in all; try again in a moment")
	errTooLong = errors.New("a manifest may have at most " + strconv.Itoa(store.MaxManifest) + " bytes")
)

// readManifest reads a manifest. Those that come at the same time have a bound, of a project, of a user and of all, and a
// client that does not go on loses its place. done, which is nil when an error was answered, ends its use.
func (r *Registry) readManifest(w http.ResponseWriter, req *http.Request, c *call) (body []byte, done func()) {
	room := &bodyRoom{ctx: req.Context(), of: map[*budget]string{r.bodies: c.project, r.senders: c.id.key()}}
	control := http.NewResponseController(w)
	body, err := r.receive(req, control, room)
	_ = control.SetReadDeadline(time.Time{})
	if err == nil {
		return body, room.give
	}
	room.give()
	switch {
	case errors.Is(err, errNoRoom):
		tooMany(w, err.Error())
	case errors.Is(err, errTooLong):
		writeError(w, http.StatusRequestEntityTooLarge, codeManifest, err.Error())
	case errors.Is(err, os.ErrDeadlineExceeded):
		writeError(w, http.StatusRequestTimeout, codeManifest, "the manifest did not come within "+r.manifestWithin.String()+", or nothing of it for "+r.stallWithin.String())
	default:
		writeError(w, http.StatusBadRequest, codeManifest, "the manifest cannot be read")
	}
	return nil, nil
}

// receive reads the body of a request, and takes room as it comes: what a client announces costs it nothing.
func (r *Registry) receive(req *http.Request, control *http.ResponseController, room *bodyRoom) ([]byte, error) {
	limit := int64(store.MaxManifest + 1)
	if n := req.ContentLength; n >= limit {
		return nil, errTooLong
	} else if n >= 0 {
		limit = n + 1 // to see its end
	}
	until := time.Now().Add(r.manifestWithin)
	var body []byte
	for {
		if have := int64(cap(body)); int64(len(body)) == have {
			more := min(max(have, firstBody), limit-have)
			if more == 0 {
				return nil, errTooLong
			}
			if !room.take(more) {
				return nil, errNoRoom
			}
			body = append(make([]byte, 0, have+more), body...)
		}
		now := time.Now()
		if !now.Before(until) {
			return nil, os.ErrDeadlineExceeded
		}
		at := now.Add(r.stallWithin)
		if at.After(until) {
			at = until
		}
		_ = control.SetReadDeadline(at) // not every transport has one
		n, err := req.Body.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if errors.Is(err, io.EOF) {
			if len(body) > store.MaxManifest {
				return nil, errTooLong
			}
			return body, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// bodyRoom is what one body has of several budgets.
type bodyRoom struct {
	ctx   context.Context
	of    map[*budget]string // the key in each
	given []func()
}

// take gets n bytes more of each.
func (b *bodyRoom) take(n int64) bool {
	for budget, key := range b.of {
		give, ok := budget.take(b.ctx, key, n)
		if !ok {
			return false
		}
		b.given = append(b.given, give)
	}
	return true
}

func (b *bodyRoom) give() {
	for _, give := range b.given {
		give()
	}
	b.given = nil
}

// key tells identities apart.
func (i Identity) key() string {
	if i.Robot != nil {
		return "robot/" + i.Robot.UID
	}
	return "user/" + i.Name
}
