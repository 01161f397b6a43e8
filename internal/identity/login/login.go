// Package login is what the portal serves to people: logging in and out, their namespaces, and the login of VMware's
// kubectl plug-in.
//
// Under /login/ are JSON documents for `atoll login`; under /wcp/ are those that `kubectl vsphere login` and VMware's
// own tests use, with the same names. It decides nothing: who somebody is comes from internal/identity, and what goes
// wrong becomes an HTTP status and one line of text. The portal bounds sizes and times and knows the source.
//
// A client's secret at a foreign issuer does not leave the server: what a client asks of the issuer's token and
// device endpoints goes through here when there is one (see oidc.go).
package login

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/providers"
)

// People is what this package needs of internal/identity.
type People interface {
	Login(ctx context.Context, name, password string, whole bool) (identity.Tokens, error)
	Refresh(ctx context.Context, refresh string) (identity.Tokens, error)
	Logout(ctx context.Context, token string) error
	Bearer(ctx context.Context, token string) (identity.Person, error)
	ChangePassword(ctx context.Context, name, old, wanted string) error
	Namespaces(ctx context.Context, p identity.Person) ([]identity.Access, error)
}

// Issuers is what it needs to know about foreign issuers.
type Issuers interface {
	Get(name string) (providers.Provider, bool)
	List() []providers.Provider
	Secret(ctx context.Context, p providers.Provider) (string, error)
}

// Config of a Handler.
type Config struct {
	People  People
	Issuers Issuers
	// Banner is what people are shown before they log in.
	Banner func(ctx context.Context) string
	// Host is the address of the node, Names what else its certificates say. APIPort and PortalPort are there.
	Host       string
	Names      []string
	APIPort    int
	PortalPort int
	// CA is the PEM of the authority of the API server's and the portal's certificates.
	CA      []byte
	Version string
	Logger  *slog.Logger
}

// Handler answers. Make one with New.
type Handler struct{ cfg Config }

// New makes a handler.
func New(cfg Config) *Handler { return &Handler{cfg: cfg} }

// Routes are patterns of http.ServeMux and what answers them.
func (h *Handler) Routes() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /wcp/loginbanner":               h.banner,
		"POST /wcp/login":                    h.wcpLogin,
		"GET /wcp/workloads":                 h.wcpWorkloads,
		"GET /login/info":                    h.info,
		"POST /login/session":                h.session,
		"POST /login/refresh":                h.refresh,
		"POST /login/logout":                 h.logout,
		"POST /login/password":               h.password,
		"GET /login/whoami":                  h.whoami,
		"GET /login/namespaces":              h.namespaces,
		"POST /login/oidc/{provider}/token":  h.oidcToken,
		"POST /login/oidc/{provider}/device": h.oidcDevice,
	}
}

// Session is the answer to a login.
type Session struct {
	User   string   `json:"user"`
	Groups []string `json:"groups"`
	// Token is for the API server until Expires, RefreshToken for new ones until SessionExpires.
	Token          string    `json:"token"`
	Expires        time.Time `json:"expires"`
	RefreshToken   string    `json:"refreshToken"`
	SessionExpires time.Time `json:"sessionExpires"`
}

// Info is what a client must know before it logs in.
type Info struct {
	Version   string `json:"version"`
	APIServer string `json:"apiServer"`
	// CA is the PEM of the authority of the API server's certificate.
	CA        string   `json:"ca"`
	Domain    string   `json:"domain"`
	Banner    string   `json:"banner,omitempty"`
	Providers []Issuer `json:"providers"`
}

// Issuer is a foreign issuer as a client needs it. Where Proxied is set, the token and device endpoints are to be
// asked through the portal.
type Issuer struct {
	Name          string   `json:"name"`
	DisplayName   string   `json:"displayName,omitempty"`
	Domain        string   `json:"domain"`
	Issuer        string   `json:"issuer"`
	ClientID      string   `json:"clientID"`
	Scopes        []string `json:"scopes"`
	CA            string   `json:"ca,omitempty"`
	Authorization string   `json:"authorizationEndpoint,omitempty"`
	Token         string   `json:"tokenEndpoint"`
	Device        string   `json:"deviceEndpoint,omitempty"`
	Proxied       bool     `json:"proxied,omitempty"`
}

// Who is the answer to whoami.
type Who struct {
	User    string    `json:"user"`
	Groups  []string  `json:"groups"`
	Expires time.Time `json:"expires,omitzero"`
}

// Failure is the answer to what does not work.
type Failure struct {
	Error string `json:"error"`
	// Code is set where a client can do something about it.
	Code string `json:"code,omitempty"`
}

// CodeMustChange is the code of a right password that must be changed.
const CodeMustChange = "mustChangePassword"

func (h *Handler) info(w http.ResponseWriter, r *http.Request) {
	out := Info{
		Version: h.cfg.Version, APIServer: "https://" + net.JoinHostPort(h.host(r), strconv.Itoa(h.cfg.APIPort)), CA: string(h.cfg.CA),
		Domain: "atoll.local", Banner: h.cfg.Banner(r.Context()), Providers: []Issuer{},
	}
	for _, p := range h.cfg.Issuers.List() {
		spec := p.Object.Spec
		out.Providers = append(out.Providers, Issuer{
			Name: p.Object.Name, DisplayName: spec.DisplayName, Domain: spec.Domain, Issuer: spec.IssuerURL, ClientID: spec.ClientID,
			Scopes: spec.Scopes, CA: spec.CertificateAuthority, Authorization: p.Endpoints.Authorization, Token: p.Endpoints.Token,
			Device: p.Endpoints.Device, Proxied: spec.ClientSecretRef != nil,
		})
	}
	h.answer(w, out)
}

// host is how the client reaches this server: what it asked for, if a certificate says so, and else the node's address.
func (h *Handler) host(r *http.Request) string {
	asked := r.Host
	if host, _, err := net.SplitHostPort(asked); err == nil {
		asked = host
	}
	asked = strings.Trim(asked, "[]")
	if slices.Contains(h.cfg.Names, asked) {
		return asked
	}
	return h.cfg.Host
}

func (h *Handler) session(w http.ResponseWriter, r *http.Request) {
	name, password, ok := r.BasicAuth()
	if !ok {
		h.fail(w, identity.ErrRefused)
		return
	}
	t, err := h.cfg.People.Login(r.Context(), name, password, false)
	h.tokens(w, t, err)
}

func (h *Handler) refresh(w http.ResponseWriter, r *http.Request) {
	t, err := h.cfg.People.Refresh(r.Context(), bearer(r))
	h.tokens(w, t, err)
}

func (h *Handler) tokens(w http.ResponseWriter, t identity.Tokens, err error) {
	if err != nil {
		h.fail(w, err)
		return
	}
	h.answer(w, Session{
		User: t.Person.Name, Groups: list(t.Person.Groups), Token: t.Access, Expires: t.Expires.UTC(),
		RefreshToken: t.Refresh, SessionExpires: t.SessionExpires.UTC(),
	})
}

func (h *Handler) logout(w http.ResponseWriter, r *http.Request) {
	if err := h.cfg.People.Logout(r.Context(), bearer(r)); err != nil {
		h.fail(w, err)
		return
	}
	h.answer(w, struct{}{})
}

func (h *Handler) password(w http.ResponseWriter, r *http.Request) {
	var wanted struct {
		NewPassword string `json:"newPassword"`
	}
	name, old, ok := r.BasicAuth()
	if !ok {
		h.fail(w, identity.ErrRefused)
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&wanted); err != nil {
		h.write(w, http.StatusBadRequest, Failure{Error: `the body must be {"newPassword": "..."}`})
		return
	}
	if err := h.cfg.People.ChangePassword(r.Context(), name, old, wanted.NewPassword); err != nil {
		h.fail(w, err)
		return
	}
	h.answer(w, struct{}{})
}

func (h *Handler) whoami(w http.ResponseWriter, r *http.Request) {
	p, err := h.cfg.People.Bearer(r.Context(), bearer(r))
	if err != nil {
		h.fail(w, err)
		return
	}
	h.answer(w, Who{User: p.Name, Groups: list(p.Groups), Expires: p.Expires.UTC()})
}

func (h *Handler) namespaces(w http.ResponseWriter, r *http.Request) {
	p, err := h.cfg.People.Bearer(r.Context(), bearer(r))
	if err != nil {
		h.fail(w, err)
		return
	}
	all, err := h.cfg.People.Namespaces(r.Context(), p)
	if err != nil {
		h.fail(w, err)
		return
	}
	h.answer(w, all)
}

// list is never null in JSON.
func list(in []string) []string {
	if in == nil {
		return []string{}
	}
	return in
}

// bearer is the token of a request, "" when there is none.
func bearer(r *http.Request) string {
	scheme, text, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(text)
}

func (h *Handler) answer(w http.ResponseWriter, v any) { h.write(w, http.StatusOK, v) }

func (h *Handler) write(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(v); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		h.cfg.Logger.Debug("answering a login request failed", "error", err)
	}
}

// fail turns an error into a status and a text. What is wrong inside is logged and not told.
func (h *Handler) fail(w http.ResponseWriter, err error) {
	code, text := status(err)
	if code == http.StatusInternalServerError {
		h.cfg.Logger.Error("a login request failed", "error", err)
	}
	if locked, ok := errors.AsType[identity.LockedError](err); ok {
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(time.Until(locked.Until).Seconds()))))
	}
	failure := Failure{Error: text}
	if errors.Is(err, identity.ErrMustChange) {
		failure.Code = CodeMustChange
	}
	h.write(w, code, failure)
}

func status(err error) (int, string) {
	if _, ok := errors.AsType[identity.LockedError](err); ok {
		return http.StatusTooManyRequests, err.Error()
	}
	if _, ok := errors.AsType[identity.PasswordError](err); ok {
		return http.StatusUnprocessableEntity, err.Error()
	}
	switch {
	case errors.Is(err, identity.ErrRefused), errors.Is(err, identity.ErrNoSession):
		return http.StatusUnauthorized, err.Error()
	case errors.Is(err, identity.ErrMustChange):
		return http.StatusForbidden, err.Error()
	case errors.Is(err, identity.ErrBusy), errors.Is(err, identity.ErrNotReady):
		return http.StatusServiceUnavailable, err.Error()
	}
	return http.StatusInternalServerError, "the server could not answer; its log says why"
}
