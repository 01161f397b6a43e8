package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"hash/fnv"
	"io"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"

	digestlib "github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"atoll.dev/atoll/internal/registry/store"
)

// serveManifest keeps tags that may not change, and says what distribution does not know.
func (r *Registry) serveManifest(w *explainer, req *http.Request, c *call) {
	switch req.Method {
	case http.MethodPut:
		r.putManifest(w, req, c)
	case http.MethodDelete:
		defer r.lockRepository(c.name)()
		kept, err := r.immutable(c, c.vars["reference"])
		if err != nil {
			r.broken(w, c.project, err)
			return
		}
		if kept != "" {
			writeError(w, http.StatusForbidden, codeDenied, "tag "+c.name+":"+kept+" is immutable (spec.registry.immutableTags of SupervisorNamespace "+c.project+") and cannot be deleted by hand")
			return
		}
		r.app.ServeHTTP(w, req)
		if w.status == http.StatusAccepted {
			r.cfg.Changed(c.project)
		}
	default:
		r.app.ServeHTTP(w, req)
	}
}

// putManifest takes a manifest. Manifests of a repository come one after the other, so that a tag that may not change
// is not pushed twice at the same moment.
func (r *Registry) putManifest(w *explainer, req *http.Request, c *call) {
	body, done := r.readManifest(w, req, c)
	if done == nil {
		r.linger(w, req)
		return
	}
	defer done()
	var m store.Manifest
	if err := json.Unmarshal(body, &m); err != nil {
		writeError(w, http.StatusBadRequest, codeManifest, "the manifest is no JSON")
		return
	}
	if elsewhere := m.Elsewhere(); elsewhere != "" {
		writeError(w, http.StatusBadRequest, codeManifest, elsewhere+" has urls: layers that are not in the registry are not taken; push an image that has its layers itself")
		return
	}
	defer r.lockRepository(c.name)()
	defer r.store.Hold()()
	ref := c.vars["reference"]
	before, ok, err := r.store.Tag(c.name, ref)
	if err != nil {
		r.broken(w, c.project, err)
		return
	}
	if ok && r.isImmutable(c, ref) && before.Digest != digestlib.FromBytes(body).String() {
		writeError(w, http.StatusForbidden, codeDenied, "tag "+c.name+":"+ref+" is immutable (spec.registry.immutableTags of SupervisorNamespace "+c.project+") and points to "+before.Digest+"; push another tag")
		return
	}
	release, err := r.store.Reserve(req.Context(), c.project, digestlib.FromBytes(body).String(), int64(len(body)))
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError) // which the reason replaces
		return
	}
	defer release()
	if m.Subject != nil {
		w.Header().Set("OCI-Subject", m.Subject.Digest)
	}
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	r.app.ServeHTTP(w, req)
	if w.status == http.StatusCreated {
		r.pushed(c, ref)
	}
}

// pushed applies retention to the repository and tells who waits for pushes.
func (r *Registry) pushed(c *call, ref string) {
	if strings.Contains(ref, ":") {
		return // by digest
	}
	if err := r.retain(c.project, c.name); err != nil {
		r.cfg.Logger.Warn("retention failed", "repository", c.name, "error", err)
	}
	r.cfg.Changed(c.project)
}

// lockRepository holds what manifests of a repository are changed under.
func (r *Registry) lockRepository(name string) (unlock func()) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	m := &r.repositories[h.Sum32()%uint32(len(r.repositories))]
	m.Lock()
	return m.Unlock
}

// short is REPOSITORY:TAG as the patterns of a SupervisorNamespace see it: without the project.
func short(project, name, tag string) string {
	return strings.TrimPrefix(name, project+"/") + ":" + tag
}

func matches(patterns []string, text string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, text)
		return ok && err == nil
	})
}

func (r *Registry) isImmutable(c *call, tag string) bool {
	return matches(r.settings(c.project).ImmutableTags, short(c.project, c.name, tag))
}

// immutable returns the tag that a reference is, or that needs what it names, and that may not be deleted.
func (r *Registry) immutable(c *call, ref string) (tag string, err error) {
	if !strings.Contains(ref, ":") {
		if r.isImmutable(c, ref) {
			return ref, nil
		}
		return "", nil
	}
	if len(r.settings(c.project).ImmutableTags) == 0 {
		return "", nil
	}
	tags, err := r.store.Tags(c.name)
	if err != nil {
		return "", err
	}
	for _, t := range tags {
		if !r.isImmutable(c, t.Name) {
			continue
		}
		if needs, err := r.store.Needs(c.name, t.Digest, ref); err != nil || needs {
			return t.Name, err
		}
	}
	return "", nil
}

// retain removes tags that are older than those a rule keeps. A tag that several rules match stays when one keeps it,
// and one that is immutable stays in any case.
func (r *Registry) retain(project, name string) error {
	rules, immutable := r.settings(project).Retention, r.settings(project).ImmutableTags
	if len(rules) == 0 {
		return nil
	}
	tags, err := r.store.Tags(name)
	if err != nil {
		return err
	}
	matched, kept := make(map[string]bool), make(map[string]bool)
	for _, rule := range rules {
		n := int32(0)
		for _, t := range tags {
			if !matches([]string{rule.Pattern}, short(project, name, t.Name)) {
				continue
			}
			matched[t.Name] = true
			if n++; n <= rule.KeepLast {
				kept[t.Name] = true
			}
		}
	}
	var errs []error
	for _, t := range tags {
		if matched[t.Name] && !kept[t.Name] && !matches(immutable, short(project, name, t.Name)) {
			errs = append(errs, r.store.Untag(name, t))
			defer r.cfg.Changed(project)
		}
	}
	return errors.Join(errs...)
}

// serveReferrers lists what has a manifest as its subject.
func (r *Registry) serveReferrers(w *explainer, req *http.Request, c *call) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		writeError(w, http.StatusMethodNotAllowed, codeUnsupported, "referrers are only read")
		return
	}
	if digestlib.Digest(c.vars["digest"]).Validate() != nil {
		writeError(w, http.StatusBadRequest, codeDigest, "the digest is none")
		return
	}
	list, err := r.store.Referrers(c.name, c.vars["digest"])
	if err != nil {
		r.cfg.Logger.Error("listing referrers failed", "repository", c.name, "error", err)
		writeError(w, http.StatusInternalServerError, codeUnavailable, "the repository cannot be read")
		return
	}
	if kind := req.URL.Query().Get("artifactType"); kind != "" {
		list = slices.DeleteFunc(list, func(d store.Descriptor) bool { return d.ArtifactType != kind })
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
	_ = json.NewEncoder(w).Encode(map[string]any{"schemaVersion": 2, "mediaType": v1.MediaTypeImageIndex, "manifests": list}) // the client is gone otherwise
}

// serveCatalog lists the repositories of the projects that the sender may list.
func (r *Registry) serveCatalog(w http.ResponseWriter, req *http.Request) {
	token, ok := r.bearer(w, req, nil)
	if !ok {
		return
	}
	projects, err := r.listable(req.Context(), token.Identity)
	if err != nil {
		r.unavailable(w, err)
		return
	}
	names := []string{}
	for _, p := range projects {
		list, err := r.store.Repositories(p)
		if err != nil {
			r.unavailable(w, err)
			return
		}
		for _, repo := range list {
			names = append(names, repo.Name)
		}
	}
	slices.Sort(names)
	query := req.URL.Query()
	if last := query.Get("last"); last != "" {
		names = slices.DeleteFunc(names, func(n string) bool { return n <= last })
	}
	if n, err := strconv.Atoi(query.Get("n")); err == nil && n >= 0 && n < len(names) {
		names = names[:n]
		if n > 0 {
			w.Header().Set("Link", `</v2/_catalog?n=`+strconv.Itoa(n)+`&last=`+names[n-1]+`>; rel="next"`)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"repositories": names}) // the client is gone otherwise
}
