package login

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/oauth2"

	wire "atoll.dev/atoll/internal/identity/login"
)

// Ways to log in at an issuer.
const (
	flowAuto    = "auto"
	flowDevice  = "device"
	flowBrowser = "browser"
)

// browserWithin is how long a person has in the browser.
const browserWithin = 5 * time.Minute

// foreign is a login at an issuer.
type foreign struct {
	issuer wire.Issuer
	portal *portal
}

// client is what the token endpoint is asked with, and its configuration. With a secret that stays on the server it
// is the portal that is asked.
func (f foreign) client() (*http.Client, *oauth2.Config, error) {
	config := &oauth2.Config{
		ClientID: f.issuer.ClientID, Scopes: f.issuer.Scopes,
		Endpoint: oauth2.Endpoint{
			AuthURL: f.issuer.Authorization, TokenURL: f.issuer.Token, DeviceAuthURL: f.issuer.Device, AuthStyle: oauth2.AuthStyleInParams,
		},
	}
	if f.issuer.Proxied {
		at := "https://" + f.portal.server + "/login/oidc/" + f.issuer.Name
		config.Endpoint.TokenURL = at + "/token"
		if f.issuer.Device != "" {
			config.Endpoint.DeviceAuthURL = at + "/device"
		}
		return f.portal.http, config, nil
	}
	client, err := newPortal("", trust{CA: f.issuer.CA})
	if err != nil {
		return nil, nil, err
	}
	return client.http, config, nil
}

// login gets tokens by the flow that was chosen, or the one that fits.
func (f foreign) login(ctx context.Context, c *commands, flow string, port int) (*oauth2.Token, error) {
	client, config, err := f.client()
	if err != nil {
		return nil, err
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, client)
	if flow == flowAuto {
		flow = flowBrowser
		if f.issuer.Device != "" && (c.Getenv("DISPLAY") == "" && c.Getenv("WAYLAND_DISPLAY") == "" || f.issuer.Authorization == "") {
			flow = flowDevice
		}
	}
	switch {
	case flow == flowDevice && f.issuer.Device == "":
		return nil, fmt.Errorf("%s has no device flow; use --flow browser", f.issuer.Name)
	case flow == flowDevice:
		return f.device(ctx, c, config)
	case f.issuer.Authorization == "":
		return nil, fmt.Errorf("%s has no browser flow; use --flow device", f.issuer.Name)
	}
	return f.browser(ctx, c, config, port)
}

// device shows a code to type at the issuer, on whatever machine.
func (f foreign) device(ctx context.Context, c *commands, config *oauth2.Config) (*oauth2.Token, error) {
	answer, err := config.DeviceAuth(ctx)
	if err != nil {
		return nil, fmt.Errorf("beginning the login at %s: %w", f.issuer.Name, err)
	}
	c.Tell("Open %s and type the code %s\n", answer.VerificationURI, answer.UserCode)
	if answer.VerificationURIComplete != "" {
		c.Tell("or open %s\n", answer.VerificationURIComplete)
	}
	token, err := config.DeviceAccessToken(ctx, answer)
	if err != nil {
		return nil, fmt.Errorf("logging in at %s: %w", f.issuer.Name, err)
	}
	return token, nil
}

// random is text that nobody guesses.
func random() string {
	var b [24]byte
	_, _ = rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// browser has the issuer send the code to a port of this machine (authorization code with PKCE).
func (f foreign) browser(ctx context.Context, c *commands, config *oauth2.Config, port int) (*oauth2.Token, error) {
	ctx, cancel := context.WithTimeout(ctx, browserWithin)
	defer cancel()
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("waiting for the browser: %w", err)
	}
	config.RedirectURL = fmt.Sprintf("http://%s/callback", l.Addr())
	state, nonce, verifier := random(), random(), oauth2.GenerateVerifier()
	codes := make(chan callback, 1)
	srv := &http.Server{Handler: f.callback(state, codes), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	at := config.AuthCodeURL(state, oauth2.S256ChallengeOption(verifier), oauth2.SetAuthURLParam("nonce", nonce))
	c.Tell("Log in with a browser on this machine at\n  %s\n", at)
	if !c.noBrowser {
		// Whether there is a browser or not, the address has been shown.
		_ = exec.CommandContext(ctx, "xdg-open", at).Start()
	}
	var got callback
	select {
	case got = <-codes:
	case <-ctx.Done():
		return nil, errors.New("nobody logged in with the browser; try again, or use --flow device")
	}
	if got.err != nil {
		return nil, fmt.Errorf("logging in at %s: %w", f.issuer.Name, got.err)
	}
	token, err := config.Exchange(ctx, got.code, oauth2.VerifierOption(verifier))
	if err != nil {
		return nil, fmt.Errorf("logging in at %s: %w", f.issuer.Name, err)
	}
	raw, err := idToken(token)
	if err != nil {
		return nil, err
	}
	claims, err := claimsOf(raw)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare([]byte(claims.Nonce), []byte(nonce)) != 1 {
		return nil, fmt.Errorf("%s answered with the token of another login", f.issuer.Name)
	}
	return token, nil
}

// callback is what the browser brings.
type callback struct {
	code string
	err  error
}

func (f foreign) callback(state string, codes chan<- callback) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /callback", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 {
			http.Error(w, "this is not the login that was begun", http.StatusBadRequest)
			return
		}
		got := callback{code: q.Get("code")}
		if reason := q.Get("error"); reason != "" || got.code == "" {
			got.err = fmt.Errorf("the issuer says: %q %q", reason, q.Get("error_description"))
		}
		text := "You are logged in. You may close this page."
		if got.err != nil {
			text = "You are not logged in: " + got.err.Error()
		}
		page := "<!doctype html><title>atoll</title><p>" + html.EscapeString(text)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(len(page)))
		_, _ = io.WriteString(w, page)
		_ = http.NewResponseController(w).Flush() // what waits for the code closes the server
		select {
		case codes <- got:
		default:
		}
	})
	return mux
}

// refresh gets a new token without the person.
func (f foreign) refresh(ctx context.Context, refresh string) (*oauth2.Token, error) {
	client, config, err := f.client()
	if err != nil {
		return nil, err
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, client)
	return config.TokenSource(ctx, &oauth2.Token{RefreshToken: refresh}).Token()
}

// idToken is the token for the API server.
func idToken(t *oauth2.Token) (string, error) {
	raw, _ := t.Extra("id_token").(string)
	if raw == "" {
		return "", errors.New("the issuer gave no ID token; its scopes must have openid")
	}
	return raw, nil
}

// claims are those of an ID token that matter here. The API server checks the token; here it is only read.
type claims struct {
	Expires int64  `json:"exp"`
	Nonce   string `json:"nonce"`
}

func claimsOf(raw string) (claims, error) {
	var c claims
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return c, errors.New("the issuer's ID token is none")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &c)
	}
	if err != nil {
		return c, fmt.Errorf("the issuer's ID token cannot be read: %w", err)
	}
	return c, nil
}
