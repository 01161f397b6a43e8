package registry

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/registry/store"
)

// managePath is below which `atoll registry` finds what the distribution specification has no words for.
const managePath = "/registry/v1/"

// Usage is what one project takes.
type Usage struct {
	Project      string `json:"project"`
	Used         int64  `json:"used"`
	Quota        *int64 `json:"quota,omitempty"`
	Repositories int    `json:"repositories"`
	Tags         int    `json:"tags"`
}

// serveManage answers `atoll registry`. Credentials are those of the token service, as Basic or, for a token, as Bearer.
func (r *Registry) serveManage(w http.ResponseWriter, req *http.Request) {
	name, password, ok := credentials(req)
	if !ok {
		w.Header().Set("WWW-Authenticate", `Basic realm="Atoll registry"`)
		writeError(w, http.StatusUnauthorized, codeUnauthorized, "log in first; nothing is open to anonymous clients")
		return
	}
	id, err := r.authenticate(req.Context(), sourceOf(req), name, password)
	if err != nil {
		r.refuseLogin(w, req, name, err)
		return
	}
	switch what := strings.TrimPrefix(req.URL.Path, managePath); {
	case what == "usage" && req.Method == http.MethodGet:
		r.serveUsage(w, req, id)
	case what == "repositories" && req.Method == http.MethodGet:
		r.serveRepositories(w, req, id)
	case what == "gc" && req.Method == http.MethodPost:
		r.serveCollect(w, req, id)
	default:
		writeError(w, http.StatusNotFound, codeUnsupported, "there is nothing at "+req.Method+" "+req.URL.Path)
	}
}

// asked are the projects a request is about: the one it names, or all that may be listed.
func (r *Registry) asked(w http.ResponseWriter, req *http.Request, id Identity) ([]string, bool) {
	projects, err := r.listable(req.Context(), id)
	if err != nil {
		r.unavailable(w, err)
		return nil, false
	}
	want := req.URL.Query().Get("project")
	if want == "" {
		return projects, true
	}
	if slices.Contains(projects, want) {
		return []string{want}, true
	}
	ok, err := r.allowed(req.Context(), id, want, actionList)
	if err != nil {
		r.unavailable(w, err)
		return nil, false
	}
	if !ok {
		writeError(w, http.StatusForbidden, codeDenied, id.Name+" may not list the repositories of project "+want)
		return nil, false
	}
	return nil, true // nothing was pushed to it yet
}

func (r *Registry) serveUsage(w http.ResponseWriter, req *http.Request, id Identity) {
	projects, ok := r.asked(w, req, id)
	if !ok {
		return
	}
	if want := req.URL.Query().Get("project"); want != "" {
		projects = []string{want}
	}
	out := []Usage{}
	for _, p := range projects {
		u, err := r.usage(p)
		if err != nil {
			r.broken(w, p, err)
			return
		}
		out = append(out, u)
	}
	writeJSON(w, out)
}

func (r *Registry) usage(project string) (Usage, error) {
	used, err := r.store.Usage(project)
	if err != nil {
		return Usage{}, err
	}
	u := Usage{Project: project, Used: used}
	if limit, ok := r.quota(project); ok {
		u.Quota = &limit
	}
	list, err := r.store.Repositories(project)
	if err != nil {
		return Usage{}, err
	}
	u.Repositories = len(list)
	for _, repo := range list {
		u.Tags += len(repo.Tags)
	}
	return u, nil
}

func (r *Registry) serveRepositories(w http.ResponseWriter, req *http.Request, id Identity) {
	projects, ok := r.asked(w, req, id)
	if !ok {
		return
	}
	out := []store.Repository{}
	for _, p := range projects {
		list, err := r.store.Repositories(p)
		if err != nil {
			r.broken(w, p, err)
			return
		}
		out = append(out, list...)
	}
	writeJSON(w, out)
}

// serveCollect is for administrators: who may delete the repositories of all namespaces.
func (r *Registry) serveCollect(w http.ResponseWriter, req *http.Request, id Identity) {
	ok, err := false, error(nil)
	if id.Robot == nil {
		ok, err = r.rights.allowed(req.Context(), id, actionDelete, "")
	}
	if err != nil {
		r.unavailable(w, err)
		return
	}
	if !ok {
		writeError(w, http.StatusForbidden, codeDenied, id.Name+" may not collect what is unused: it takes the right to delete repositories."+atoll.RegistryGroup+" in all namespaces")
		return
	}
	// A client that goes away does not end it.
	report, err := r.Collect(context.WithoutCancel(req.Context()), req.URL.Query().Get("dryRun") == "true")
	switch {
	case errors.Is(err, store.ErrCollecting):
		writeError(w, http.StatusConflict, codeUnavailable, err.Error())
	case err != nil:
		r.cfg.Logger.Error("registry collection failed", "error", err)
		writeError(w, http.StatusInternalServerError, codeUnavailable, "the collection failed; the server's log says why")
	default:
		writeJSON(w, report)
	}
}

func (r *Registry) broken(w http.ResponseWriter, project string, err error) {
	r.cfg.Logger.Error("registry project cannot be read", "project", project, "error", err)
	writeError(w, http.StatusInternalServerError, codeUnavailable, "project "+project+" cannot be read; the server's log says why")
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone otherwise
}
