package login

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"atoll.dev/atoll/internal/identity"
	wire "atoll.dev/atoll/internal/identity/login"
)

const (
	defaultPort = 443
	askWithin   = time.Minute
	maxAnswer   = 4 << 20
)

// parseServer makes HOST:PORT of what a person typed: HOST, HOST:PORT or https://HOST[:PORT].
func parseServer(typed string) (string, error) {
	text := typed
	if scheme, rest, ok := strings.Cut(typed, "://"); ok {
		if scheme != "https" {
			return "", fmt.Errorf("--server %q: use the address of the supervisor, with https:// or without", typed)
		}
		text = rest
	}
	u, err := url.Parse("https://" + strings.TrimSuffix(text, "/"))
	if err != nil || u.Hostname() == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("--server %q: use the address of the supervisor, like 192.0.2.10 or supervisor.example:8443", typed)
	}
	port := defaultPort
	if u.Port() != "" {
		if port, err = strconv.Atoi(u.Port()); err != nil || port < 1 || port > 65535 {
			return "", fmt.Errorf("--server %q: %s is no port", typed, u.Port())
		}
	}
	return net.JoinHostPort(u.Hostname(), strconv.Itoa(port)), nil
}

// trust is how the certificate of a portal is checked.
type trust struct {
	// CA is the PEM of its authority; empty means the authorities of this machine.
	CA string `json:"ca,omitempty"`
	// Insecure checks nothing.
	Insecure bool `json:"insecure,omitempty"`
}

func (t trust) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: t.Insecure}
	if t.CA != "" && !t.Insecure {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(t.CA)) {
			return nil, errors.New("there is no PEM certificate in the authority of the server")
		}
	}
	return config, nil
}

// portal talks to the portal of a supervisor.
type portal struct {
	server string // HOST:PORT
	http   *http.Client
}

func newPortal(server string, t trust) (*portal, error) {
	config, err := t.tls()
	if err != nil {
		return nil, err
	}
	return &portal{server: server, http: &http.Client{
		Timeout:   askWithin,
		Transport: &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true},
		// Credentials go where they are sent and nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// refusal is what a portal answers when it does not do what it was asked.
type refusal struct {
	wire.Failure
	status int
}

func (r refusal) Error() string { return r.Failure.Error }

// isStatus tells whether an error is an answer with the status.
func isStatus(err error, status int) bool {
	r, ok := errors.AsType[refusal](err)
	return ok && r.status == status
}

// credentials are put into a request.
type credentials func(*http.Request)

func basic(user, password string) credentials {
	return func(r *http.Request) { r.SetBasicAuth(user, password) }
}

func bearer(token string) credentials {
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
}

// do sends body, if there is one, and reads the answer into out, if there is one.
func (p *portal) do(ctx context.Context, method, path string, who credentials, body, out any) error {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+p.server+path, content)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if who != nil {
		who(req)
	}
	resp, err := p.http.Do(req)
	if err != nil {
		return fmt.Errorf("asking the supervisor: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("reading the supervisor's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		r := refusal{status: resp.StatusCode}
		if json.Unmarshal(text, &r.Failure) != nil || r.Failure.Error == "" {
			r.Failure.Error = fmt.Sprintf("%s answers %s to %s %s; is this the portal of a supervisor?", p.server, resp.Status, method, path)
		}
		return r
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("%s%s does not answer as the portal of a supervisor does: %w", p.server, path, err)
	}
	return nil
}

func (p *portal) info(ctx context.Context) (wire.Info, error) {
	var out wire.Info
	err := p.do(ctx, http.MethodGet, "/login/info", nil, nil, &out)
	return out, err
}

func (p *portal) session(ctx context.Context, user, password string) (wire.Session, error) {
	var out wire.Session
	err := p.do(ctx, http.MethodPost, "/login/session", basic(user, password), nil, &out)
	return out, err
}

func (p *portal) refresh(ctx context.Context, token string) (wire.Session, error) {
	var out wire.Session
	err := p.do(ctx, http.MethodPost, "/login/refresh", bearer(token), nil, &out)
	return out, err
}

func (p *portal) logout(ctx context.Context, token string) error {
	return p.do(ctx, http.MethodPost, "/login/logout", bearer(token), nil, nil)
}

func (p *portal) changePassword(ctx context.Context, user, old, wanted string) error {
	return p.do(ctx, http.MethodPost, "/login/password", basic(user, old), map[string]string{"newPassword": wanted}, nil)
}

func (p *portal) whoami(ctx context.Context, token string) (wire.Who, error) {
	var out wire.Who
	err := p.do(ctx, http.MethodGet, "/login/whoami", bearer(token), nil, &out)
	return out, err
}

func (p *portal) namespaces(ctx context.Context, token string) ([]identity.Access, error) {
	var out []identity.Access
	err := p.do(ctx, http.MethodGet, "/login/namespaces", bearer(token), nil, &out)
	return out, err
}
