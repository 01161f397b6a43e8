package providers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

const (
	probeWithin  = 10 * time.Second
	maxDiscovery = 1 << 20
)

// Endpoints are what an issuer says about itself.
type Endpoints struct {
	Issuer        string `json:"issuer"`
	Authorization string `json:"authorization_endpoint"`
	Token         string `json:"token_endpoint"`
	Device        string `json:"device_authorization_endpoint,omitempty"`
	Keys          string `json:"jwks_uri"`
}

// HTTPClient talks to the issuer of a provider, by HTTPS only.
func HTTPClient(p *api.IdentityProvider) (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca := p.Spec.CertificateAuthority; ca != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(ca)) {
			return nil, errors.New("spec.certificateAuthority: there is no certificate in it")
		}
	}
	return &http.Client{
		Timeout:   probeWithin,
		Transport: &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, ForceAttemptHTTP2: true},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if r.URL.Scheme != "https" || len(via) > 3 {
				return errors.New("the issuer redirects to something else than HTTPS, or too often")
			}
			return nil
		},
	}, nil
}

// discover asks an issuer for its endpoints.
func discover(ctx context.Context, p *api.IdentityProvider) (Endpoints, error) {
	var e Endpoints
	client, err := HTTPClient(p)
	if err != nil {
		return e, err
	}
	address := strings.TrimSuffix(p.Spec.IssuerURL, "/") + "/.well-known/openid-configuration"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return e, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return e, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return e, fmt.Errorf("%s answers %s", address, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxDiscovery)).Decode(&e); err != nil {
		return e, fmt.Errorf("%s is not what an OIDC issuer has there: %w", address, err)
	}
	if e.Issuer != p.Spec.IssuerURL {
		return e, fmt.Errorf("spec.issuerURL is %q, but the issuer calls itself %q; write it the same way", p.Spec.IssuerURL, e.Issuer)
	}
	for name, at := range map[string]string{"authorization_endpoint": e.Authorization, "token_endpoint": e.Token, "jwks_uri": e.Keys, "device_authorization_endpoint": e.Device} {
		if u, err := url.Parse(at); at != "" && (err != nil || u.Scheme != "https") {
			return e, fmt.Errorf("the issuer's %s %q is not HTTPS", name, at)
		}
	}
	if e.Token == "" || e.Keys == "" {
		return e, fmt.Errorf("%s names no token_endpoint or no jwks_uri", address)
	}
	return e, nil
}
