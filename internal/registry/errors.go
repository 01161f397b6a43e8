package registry

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"

	"atoll.dev/atoll/internal/registry/store"
)

// Codes of errors, as the distribution specification has them.
const (
	codeDenied       = "DENIED"
	codeUnauthorized = "UNAUTHORIZED"
	codeUnsupported  = "UNSUPPORTED"
	codeNameInvalid  = "NAME_INVALID"
	codeNameUnknown  = "NAME_UNKNOWN"
	codeManifest     = "MANIFEST_INVALID"
	codeUnknownTag   = "MANIFEST_UNKNOWN"
	codeDigest       = "DIGEST_INVALID"
	codeUnavailable  = "UNAVAILABLE"
	codeTooMany      = "TOOMANYREQUESTS"
	// codeUnknownUpload is for uploads that have ended.
	codeUnknownUpload = "BLOB_UPLOAD_UNKNOWN"
	codeBadUpload     = "BLOB_UPLOAD_INVALID"
)

// writeError answers with one error in the form of the specification. Its length is known, so that a client has all of
// it while the rest of what it sends is still read.
func writeError(w http.ResponseWriter, status int, code, message string) {
	body, _ := json.Marshal(map[string]any{"errors": []map[string]any{{"code": code, "message": message}}}) // strings only
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client is gone otherwise
}

// unavailable answers when the API server does not.
func (r *Registry) unavailable(w http.ResponseWriter, err error) {
	r.cfg.Logger.Warn("registry request failed", "error", err)
	w.Header().Set("Retry-After", "2")
	writeError(w, http.StatusServiceUnavailable, codeUnavailable, "the registry cannot ask the API server who may do what; try again")
}

// tooMany answers who is to try again in a moment.
func tooMany(w http.ResponseWriter, message string) {
	w.Header().Set("Retry-After", "1")
	writeError(w, http.StatusTooManyRequests, codeTooMany, message)
}

// refusal is how the store's reasons are told: status and code.
func refusal(err error) (status int, code string, ok bool) {
	if errors.As(err, new(*store.QuotaError)) {
		return http.StatusForbidden, codeDenied, true
	}
	if errors.As(err, new(*store.FullError)) {
		return http.StatusInsufficientStorage, codeUnavailable, true
	}
	return 0, "", false
}

// explainer replaces distribution's answer "unknown error" by the reason that the store had.
type explainer struct {
	http.ResponseWriter
	request *store.Request

	status   int
	replaced bool
}

// WriteHeader implements http.ResponseWriter.
func (e *explainer) WriteHeader(status int) {
	if e.status != 0 {
		return
	}
	e.status = status
	reason := e.request.Err()
	if code, name, ok := refusal(reason); ok && status >= http.StatusBadRequest {
		e.replaced, e.status = true, code
		writeError(e.ResponseWriter, code, name, reason.Error())
		return
	}
	e.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (e *explainer) Write(b []byte) (int, error) {
	if e.status == 0 {
		e.WriteHeader(http.StatusOK)
	}
	if e.replaced {
		return len(b), nil
	}
	return e.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (e *explainer) Unwrap() http.ResponseWriter { return e.ResponseWriter }

// ReadFrom lets files be sent without copying.
func (e *explainer) ReadFrom(src io.Reader) (int64, error) {
	if e.status == 0 {
		e.WriteHeader(http.StatusOK)
	}
	if e.replaced {
		return io.Copy(io.Discard, src)
	}
	return io.Copy(e.ResponseWriter, src)
}

const (
	lingerBytes  = 1 << 30
	lingerWithin = 5 * time.Second
)

// linger reads on for a while after an upload was refused, so that a client that only looks at the answer when it has
// sent everything sees it, and not a broken connection. HTTP/2 does not need it: an answer ends there without the end of
// the connection, and a client that has stopped sending waits for that.
func (r *Registry) linger(w http.ResponseWriter, req *http.Request) {
	if req.ProtoMajor >= 2 {
		return
	}
	control := http.NewResponseController(w)
	_ = control.Flush()
	_ = control.SetReadDeadline(time.Now().Add(r.lingerWithin)) // not every transport has one
	done := time.After(r.lingerWithin)
	buf := make([]byte, 64<<10)
	for n := 0; n < lingerBytes; {
		select {
		case <-done:
			return
		default:
		}
		m, err := req.Body.Read(buf)
		if n += m; err != nil {
			return
		}
	}
}
