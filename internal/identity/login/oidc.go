package login

import (
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"atoll.dev/atoll/internal/identity/providers"
)

// maxIssuerAnswer is how much of an issuer's answer is passed on.
const maxIssuerAnswer = 256 << 10

// grants are what clients may ask of a token endpoint: what a person has approved at the issuer, never the client's
// own rights there.
func grants() []string {
	return []string{"authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"}
}

// oidcToken asks the token endpoint of an issuer in the name of the client.
func (h *Handler) oidcToken(w http.ResponseWriter, r *http.Request) {
	form, ok := h.form(w, r, "grant_type", "code", "redirect_uri", "code_verifier", "refresh_token", "device_code", "scope")
	if !ok {
		return
	}
	if !slices.Contains(grants(), form.Get("grant_type")) {
		h.write(w, http.StatusBadRequest, Failure{Error: "grant_type must be one of " + strings.Join(grants(), ", ")})
		return
	}
	if at := form.Get("redirect_uri"); at != "" && !isLoopback(at) {
		h.write(w, http.StatusBadRequest, Failure{Error: "redirect_uri must be http://127.0.0.1:PORT/..."})
		return
	}
	h.forward(w, r, form, func(p providers.Provider) string { return p.Endpoints.Token })
}

// oidcDevice begins the device flow at an issuer.
func (h *Handler) oidcDevice(w http.ResponseWriter, r *http.Request) {
	form, ok := h.form(w, r, "scope")
	if ok {
		h.forward(w, r, form, func(p providers.Provider) string { return p.Endpoints.Device })
	}
}

// form takes the named values of the body and no others.
func (h *Handler) form(w http.ResponseWriter, r *http.Request, names ...string) (url.Values, bool) {
	if err := r.ParseForm(); err != nil {
		h.write(w, http.StatusBadRequest, Failure{Error: "the body is not a form"})
		return nil, false
	}
	out := url.Values{}
	for _, name := range names {
		if value := r.PostForm.Get(name); value != "" {
			out.Set(name, value)
		}
	}
	return out, true
}

// forward adds who the client is and passes the issuer's answer on.
func (h *Handler) forward(w http.ResponseWriter, r *http.Request, form url.Values, endpoint func(providers.Provider) string) {
	p, ok := h.cfg.Issuers.Get(r.PathValue("provider"))
	if !ok || p.Object.Spec.ClientSecretRef == nil || endpoint(p) == "" {
		h.write(w, http.StatusNotFound, Failure{Error: "there is no such identity provider, or it has no such endpoint here"})
		return
	}
	secret, err := h.cfg.Issuers.Secret(r.Context(), p)
	if err != nil {
		h.fail(w, err)
		return
	}
	client, err := providers.HTTPClient(p.Object)
	if err != nil {
		h.fail(w, err)
		return
	}
	form.Set("client_id", p.Object.Spec.ClientID)
	form.Set("client_secret", secret)
	req, err := http.NewRequestWithContext(r.Context(), http.MethodPost, endpoint(p), strings.NewReader(form.Encode()))
	if err != nil {
		h.fail(w, err)
		return
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	// The secret goes to the endpoint and nowhere else.
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(req)
	if err != nil {
		h.cfg.Logger.Warn("an identity provider does not answer", "provider", p.Object.Name, "error", err)
		h.write(w, http.StatusBadGateway, Failure{Error: "the identity provider does not answer"})
		return
	}
	defer resp.Body.Close()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(w, io.LimitReader(resp.Body, maxIssuerAnswer)); err != nil {
		h.cfg.Logger.Debug("passing an issuer's answer on failed", "error", err)
	}
}

// isLoopback tells whether a code can only get to the machine of the person who logs in.
func isLoopback(at string) bool {
	u, err := url.Parse(at)
	return err == nil && u.Scheme == "http" && (u.Hostname() == "127.0.0.1" || u.Hostname() == "localhost") && u.User == nil
}
