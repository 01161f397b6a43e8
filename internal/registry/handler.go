package registry

import (
	"context"
	"net/http"
	"regexp"
	"slices"
	"strings"

	v2 "github.com/distribution/distribution/v3/registry/api/v2"
	"github.com/distribution/reference"
	"github.com/gorilla/mux"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/registry/store"
)

// call is one request to a repository that its sender may make.
type call struct {
	id      Identity
	route   string
	name    string // of the repository
	project string
	vars    map[string]string
	request *store.Request
}

// routes of the specification that distribution does not have.
var referrersRoute = regexp.MustCompile(`^/v2/(` + reference.NameRegexp.String() + `)/referrers/([a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-fA-F]+)$`)

const routeReferrers = "referrers"

// ServeHTTP implements http.Handler for /v2/... and /registry/...
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	switch path := req.URL.Path; {
	case path == tokenPath:
		r.serveToken(w, req)
	case strings.HasPrefix(path, managePath):
		r.serveManage(w, req)
	case path == "/v2" || strings.HasPrefix(path, "/v2/"):
		r.serveV2(w, req)
	default:
		writeError(w, http.StatusNotFound, codeUnsupported, "there is nothing at "+path)
	}
}

func (r *Registry) serveV2(w http.ResponseWriter, req *http.Request) {
	if external := r.cfg.Directory.Configuration().External; external != nil {
		writeError(w, http.StatusNotFound, codeUnsupported, "this cluster uses the registry "+string(external.URL)+" in place of its own")
		return
	}
	route, vars, ok := r.match(req)
	if !ok {
		writeError(w, http.StatusNotFound, codeNameUnknown, "no such path in the distribution specification: "+req.URL.Path)
		return
	}
	switch route {
	case v2.RouteNameBase:
		if _, ok := r.bearer(w, req, nil); ok {
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte("{}"))
		}
		return
	case v2.RouteNameCatalog:
		r.serveCatalog(w, req)
		return
	}
	c := &call{route: route, name: vars["name"], vars: vars}
	var rest string
	if c.project, rest, ok = splitName(c.name); !ok || rest == "" {
		refuseName(w, req, c.name)
		return
	}
	if c.id, ok = r.authorize(w, req, c); !ok {
		return
	}
	if !r.own(w, c.project) {
		return
	}
	ctx, request := store.WithRequest(req.Context())
	c.request = request
	r.dispatch(&explainer{ResponseWriter: w, request: request}, req.WithContext(ctx), c)
}

// match finds the route of a request by the router that distribution uses itself.
func (r *Registry) match(req *http.Request) (route string, vars map[string]string, ok bool) {
	if m := referrersRoute.FindStringSubmatch(req.URL.Path); m != nil {
		return routeReferrers, map[string]string{"name": m[1], "digest": m[2]}, true
	}
	var found mux.RouteMatch
	if !r.router.Match(req, &found) || found.Route == nil || found.MatchErr != nil {
		return "", nil, false
	}
	return found.Route.GetName(), found.Vars, true
}

// needs are the actions that a request takes.
func needs(route, method string) []string {
	switch {
	case route == v2.RouteNameBlobUpload || route == v2.RouteNameBlobUploadChunk:
		return []string{actionPull, actionPush}
	case method == http.MethodGet || method == http.MethodHead:
		return []string{actionPull}
	case method == http.MethodDelete:
		return []string{actionDelete}
	default:
		return []string{actionPull, actionPush}
	}
}

// authorize wants a token that was given for what the request does, and that its owner still may.
func (r *Registry) authorize(w http.ResponseWriter, req *http.Request, c *call) (Identity, bool) {
	actions := needs(c.route, req.Method)
	wanted := &scope{Type: "repository", Name: c.name, Actions: actions}
	token, ok := r.bearer(w, req, wanted)
	if !ok {
		return Identity{}, false
	}
	for _, a := range slices.Backward(actions) { // who may not push is told that first
		allowed, err := r.allowed(req.Context(), token.Identity, c.project, a)
		if err != nil {
			r.unavailable(w, err)
			return Identity{}, false
		}
		if !allowed {
			r.deny(w, req, c, token, a)
			return Identity{}, false
		}
		if !token.holds(c.name, a) {
			r.challenge(w, req, wanted, "insufficient_scope", "the token is not for "+a+" of "+c.name+"; ask for one that is")
			return Identity{}, false
		}
	}
	return token.Identity, true
}

// bearer reads the token of a request, or asks for one.
func (r *Registry) bearer(w http.ResponseWriter, req *http.Request, wanted *scope) (*claims, bool) {
	text, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	if !ok {
		r.challenge(w, req, wanted, "", "log in first; nothing is open to anonymous clients")
		return nil, false
	}
	token, err := r.issuer.verify(text)
	if err == nil {
		var stands bool
		var unknown error
		if token.Identity, stands, unknown = r.stands(req.Context(), token.Identity); unknown != nil {
			r.unavailable(w, unknown)
			return nil, false
		}
		if !stands {
			err = errToken
		}
	}
	if err != nil {
		r.challenge(w, req, wanted, "invalid_token", errToken.Error())
		return nil, false
	}
	return token, true
}

// challenge tells a client where it gets the token it needs.
func (r *Registry) challenge(w http.ResponseWriter, req *http.Request, wanted *scope, reason, message string) {
	parts := []string{`Bearer realm="https://` + safeHost(req.Host) + tokenPath + `"`, `service="` + atoll.RegistryHost + `"`}
	if wanted != nil {
		parts = append(parts, `scope="`+wanted.Type+":"+wanted.Name+":"+strings.Join(wanted.Actions, ",")+`"`)
	}
	if reason != "" {
		parts = append(parts, `error="`+reason+`"`)
	}
	w.Header().Set("WWW-Authenticate", strings.Join(parts, ","))
	writeError(w, http.StatusUnauthorized, codeUnauthorized, message)
}

// safeHost is the host a client has asked for, which it is sent to for a token, without what does not belong there.
func safeHost(host string) string {
	for _, c := range host {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-:[]", c) {
			return atoll.RegistryHost
		}
	}
	return host
}

// own sees to it that a project belongs to the namespace that has its name now.
func (r *Registry) own(w http.ResponseWriter, project string) bool {
	owner, err := r.owner(project)
	if err != nil {
		writeError(w, http.StatusNotFound, codeNameUnknown, "there is no namespace "+project+", or it is being deleted")
		return false
	}
	if err := r.store.Own(project, owner); err != nil {
		r.cfg.Logger.Error("registry project cannot be used", "project", project, "error", err)
		writeError(w, http.StatusInternalServerError, codeUnavailable, "project "+project+" cannot be used; the server's log says why")
		return false
	}
	return true
}

// dispatch serves a request that was let in.
func (r *Registry) dispatch(w *explainer, req *http.Request, c *call) {
	switch c.route {
	case routeReferrers:
		r.serveReferrers(w, req, c)
	case v2.RouteNameManifest:
		r.serveManifest(w, req, c)
	case v2.RouteNameBlob:
		if req.Method == http.MethodDelete {
			w.Header().Set("Allow", "GET, HEAD")
			writeError(w, http.StatusMethodNotAllowed, codeUnsupported, "blobs are removed by themselves when no manifest refers to them; delete manifests or tags")
			return
		}
		r.app.ServeHTTP(w, req)
	case v2.RouteNameBlobUpload, v2.RouteNameBlobUploadChunk:
		r.serveUpload(w, req, c)
	default:
		r.app.ServeHTTP(w, req)
	}
}

// serveUpload takes care of what an upload may not do.
func (r *Registry) serveUpload(w *explainer, req *http.Request, c *call) {
	// The body is bytes, whatever a client calls it: as a form it could name a source that was not looked at.
	req.Header.Set("Content-Type", "application/octet-stream")
	if req.Method == http.MethodDelete && c.route == v2.RouteNameBlobUploadChunk {
		r.cancelUpload(w, c)
		return
	}
	if req.Method == http.MethodPost {
		r.checkMount(req, c)
	}
	defer c.request.Done()
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		c.request.ReadOnly()
	} else if req.Method != http.MethodDelete {
		if c.route == v2.RouteNameBlobUploadChunk && r.store.Writing(c.name, c.vars["uuid"]) {
			writeError(w, http.StatusConflict, codeBadUpload, "another request writes this upload; wait until it has ended, or begin another upload")
			r.linger(w, req)
			return
		}
		if err := r.store.Check(req.Context(), c.project, max(req.ContentLength, 0)); err != nil {
			w.WriteHeader(http.StatusInternalServerError) // which the reason replaces
			r.abandon(c)
			r.linger(w, req)
			return
		}
	}
	r.app.ServeHTTP(w, req)
	if w.replaced {
		r.abandon(c)
	}
	if w.status >= http.StatusBadRequest {
		c.request.Done() // who tries again need not wait
		r.linger(w, req)
	}
}

// cancelUpload removes what has come of an upload. Distribution would want to be told how much that is, which a client
// whose upload broke does not know, and it would not know uploads from before the server was restarted.
func (r *Registry) cancelUpload(w http.ResponseWriter, c *call) {
	there, err := r.store.CancelUpload(c.name, c.vars["uuid"])
	switch {
	case err != nil:
		r.broken(w, c.project, err)
	case !there:
		writeError(w, http.StatusNotFound, codeUnknownUpload, "there is no such upload to "+c.name)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// abandon removes an upload that was refused: what has come of it would count, and no client goes on with it.
func (r *Registry) abandon(c *call) {
	if c.route != v2.RouteNameBlobUploadChunk {
		return
	}
	c.request.Done()
	if _, err := r.store.CancelUpload(c.name, c.vars["uuid"]); err != nil {
		r.cfg.Logger.Warn("an upload that was refused cannot be removed", "repository", c.name, "error", err)
	}
}

// checkMount takes the wish to mount a blob of another repository off a request whose sender may not pull from there.
// It becomes an ordinary upload then, as the specification wants.
func (r *Registry) checkMount(req *http.Request, c *call) {
	query := req.URL.Query()
	sources := query["from"]
	if len(sources) == 1 && r.mayMount(req, c, sources[0]) {
		return
	}
	query.Del("from")
	query.Del("mount")
	req.URL.RawQuery = query.Encode()
	req.Form = nil
}

func (r *Registry) mayMount(req *http.Request, c *call, source string) bool {
	project, _, ok := splitName(source)
	if !ok {
		return false
	}
	token, err := r.issuer.verify(strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer "))
	if err != nil || (source != c.name && !token.holds(source, actionPull)) {
		return false
	}
	allowed, err := r.allowed(req.Context(), c.id, project, actionPull)
	if err != nil || !allowed {
		return false
	}
	owner, err := r.owner(project)
	return err == nil && r.store.Own(project, owner) == nil
}

// listable are the projects whose repositories an identity may list.
func (r *Registry) listable(ctx context.Context, id Identity) ([]string, error) {
	projects, err := r.store.Projects()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range projects {
		action := actionList
		if id.Robot != nil || p == atoll.RegistryLibrary {
			action = actionPull
		}
		ok, err := r.allowed(ctx, id, p, action)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, p)
		}
	}
	return out, nil
}
