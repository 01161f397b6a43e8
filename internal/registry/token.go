package registry

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

const (
	tokenPath = "/registry/token"
	// tokenLife is what Docker takes for the least there is. What is taken away ends sooner: see Registry.authorize.
	tokenLife   = time.Minute
	maxScopes   = 32
	maxTokenTry = 16 << 10 // bytes of a request for a token
	tokenKey    = 32       // bytes
)

// scope is what a client asks for: actions on a repository.
type scope struct {
	Type    string   `json:"type"`
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

// claims of a token.
type claims struct {
	jwt.Claims

	Identity Identity `json:"identity"`
	Access   []scope  `json:"access"`
	// Pushes are the repositories that its owner wanted to push to, whether it was granted or not.
	Pushes []string `json:"pushes,omitempty"`
}

// holds says whether a token was given for an action on a repository.
func (c *claims) holds(repository, action string) bool {
	return slices.ContainsFunc(c.Access, func(s scope) bool {
		return s.Type == "repository" && s.Name == repository && slices.Contains(s.Actions, action)
	})
}

// issuer makes and reads tokens. Its key lives as long as the process: a client whose token is of another one is asked
// to log in again, which it does by itself.
type issuer struct {
	key []byte
	now func() time.Time
}

func newIssuer(now func() time.Time) *issuer {
	key := make([]byte, tokenKey)
	_, _ = rand.Read(key) // never fails
	return &issuer{key: key, now: now}
}

func (i *issuer) sign(id Identity, access []scope, pushes []string) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: i.key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	now := i.now()
	return jwt.Signed(signer).Claims(claims{
		Claims: jwt.Claims{
			Issuer: atoll.RegistryHost, Audience: jwt.Audience{atoll.RegistryHost}, Subject: id.Name,
			IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(tokenLife)), ID: rand.Text(),
		},
		Identity: id, Access: access, Pushes: pushes,
	}).Serialize()
}

var errToken = errors.New("the token is not valid any more")

func (i *issuer) verify(token string) (*claims, error) {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.HS256})
	if err != nil {
		return nil, errToken
	}
	var c claims
	if err := parsed.Claims(i.key, &c); err != nil {
		return nil, errToken
	}
	expected := jwt.Expected{Issuer: atoll.RegistryHost, AnyAudience: jwt.Audience{atoll.RegistryHost}, Time: i.now()}
	if c.Expiry == nil || c.ValidateWithLeeway(expected, 0) != nil {
		return nil, errToken
	}
	return &c, nil
}

// parseScopes reads the scopes of a request; what is no repository of a project is left out.
func parseScopes(values []string) ([]scope, error) {
	var out []scope
	for _, v := range values {
		for field := range strings.FieldsSeq(v) {
			if len(out) == maxScopes {
				return nil, errors.New("too many scopes")
			}
			s, ok := parseScope(field)
			if ok {
				out = append(out, s)
			}
		}
	}
	return out, nil
}

func parseScope(text string) (scope, bool) {
	first, last := strings.Index(text, ":"), strings.LastIndex(text, ":")
	if first < 0 || first == last || text[:first] != "repository" {
		return scope{}, false
	}
	name := text[first+1 : last]
	if _, _, ok := splitName(name); !ok {
		return scope{}, false
	}
	s := scope{Type: "repository", Name: name}
	for a := range strings.SplitSeq(text[last+1:], ",") {
		switch a {
		case "*":
			s.Actions = append(s.Actions, actionPull, actionPush, actionDelete)
		case actionPull, actionPush, actionDelete:
			s.Actions = append(s.Actions, a)
		}
	}
	slices.Sort(s.Actions)
	s.Actions = slices.Compact(s.Actions)
	return s, true
}

// splitName takes the name of a repository apart; ok is false when it is none that there can be.
func splitName(name string) (project, rest string, ok bool) {
	if len(name) > maxName {
		return "", "", false
	}
	if _, err := reference.WithName(name); err != nil {
		return "", "", false
	}
	project, rest, ok = strings.Cut(name, "/")
	return project, rest, ok && projectName.MatchString(project)
}

// projectName is what a namespace can be called.
var projectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// maxName is how long the name of a repository may be.
const maxName = 255

// grant asks what of the scopes an identity may have.
func (r *Registry) grant(ctx context.Context, id Identity, asked []scope) ([]scope, error) {
	granted := []scope{}
	for _, s := range asked {
		project, _, _ := splitName(s.Name)
		got := scope{Type: s.Type, Name: s.Name, Actions: []string{}}
		for _, a := range s.Actions {
			ok, err := r.allowed(ctx, id, project, a)
			if err != nil {
				return nil, err
			}
			if ok {
				got.Actions = append(got.Actions, a)
			}
		}
		if len(got.Actions) > 0 {
			granted = append(granted, got)
		}
	}
	return granted, nil
}

// serveToken is the token service: GET with Basic credentials, or POST as OAuth2 has it.
func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	name, password, scopes, ok := tokenRequest(w, req)
	if !ok {
		return
	}
	id, err := r.authenticate(req.Context(), sourceOf(req), name, password)
	if err != nil {
		r.refuseLogin(w, req, name, err)
		return
	}
	asked, err := parseScopes(scopes)
	if err != nil {
		writeError(w, http.StatusBadRequest, codeUnsupported, err.Error())
		return
	}
	granted, err := r.grant(req.Context(), id, asked)
	if err != nil {
		r.unavailable(w, err)
		return
	}
	// Who may nothing gets a token for nothing: many clients do not show what a token service says, but what the registry does.
	token, err := r.issuer.sign(id, granted, pushesTo(asked))
	if err != nil {
		r.unavailable(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client is gone otherwise
		"token": token, "access_token": token, "expires_in": int(tokenLife.Seconds()),
		"issued_at": r.now().UTC().Format(time.RFC3339), "scope": strings.Join(scopes, " "),
	})
}

// tokenRequest reads what a client sends for a token.
func tokenRequest(w http.ResponseWriter, req *http.Request) (name, password string, scopes []string, ok bool) {
	switch req.Method {
	case http.MethodGet:
		name, password, ok = credentials(req)
		if !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="Atoll registry"`)
			writeError(w, http.StatusUnauthorized, codeUnauthorized, "log in first; nothing is open to anonymous clients")
			return "", "", nil, false
		}
		return name, password, req.URL.Query()["scope"], true
	case http.MethodPost:
		req.Body = http.MaxBytesReader(w, req.Body, maxTokenTry)
		if err := req.ParseForm(); err != nil {
			writeError(w, http.StatusBadRequest, codeUnsupported, "the form cannot be read")
			return "", "", nil, false
		}
		if kind := req.PostForm.Get("grant_type"); kind != "password" {
			writeError(w, http.StatusBadRequest, codeUnsupported, "grant_type must be password")
			return "", "", nil, false
		}
		return req.PostForm.Get("username"), req.PostForm.Get("password"), req.PostForm["scope"], true
	default:
		w.Header().Set("Allow", "GET, POST")
		writeError(w, http.StatusMethodNotAllowed, codeUnsupported, "the token service knows GET and POST")
		return "", "", nil, false
	}
}

// credentials are a name and a password, or a token alone.
func credentials(req *http.Request) (name, password string, ok bool) {
	if name, password, ok = req.BasicAuth(); !ok {
		password, ok = strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	}
	return name, password, ok
}

// refuseLogin answers a login that failed, and tells apart whether it was the client or the API server.
func (r *Registry) refuseLogin(w http.ResponseWriter, req *http.Request, name string, err error) {
	if errors.Is(err, ErrBusy) {
		tooMany(w, ErrBusy.Error())
		return
	}
	if !errors.Is(err, errCredentials) {
		r.unavailable(w, err)
		return
	}
	r.cfg.Logger.Info("registry login refused", "user", r.loggable(req.Context(), name), "reason", err)
	w.Header().Set("WWW-Authenticate", `Basic realm="Atoll registry"`)
	writeError(w, http.StatusUnauthorized, codeUnauthorized, errCredentials.Error())
}
