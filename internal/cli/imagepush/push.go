// Package imagepush is `atoll image push`: it sends an image from an archive to a project of the cluster's registry, as
// the person who has logged in. Nothing has to be installed for it, and the computer needs no entry for the
// registry's name: the name registry.atoll.local is looked for where the cluster's portal is.
//
// It does not build images and does not talk to containerd. What can go wrong: nobody is logged in or the session
// has ended (the registry refuses, and the error says how to log in), the person has no right to push to the project,
// the project's quota is full.
package imagepush

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// RegistryHost is the name of the registry that images are known by in the cluster.
const RegistryHost = "registry.atoll.local"

// Session is who pushes and where to.
type Session struct {
	// Portal is HOST:PORT of the cluster's portal.
	Portal string
	// CA is what its certificate is checked by, in PEM; nil for what the system trusts.
	CA []byte
	// User and Password are the registry's: a person and a session, or a robot account and its secret.
	User, Password string
}

// Options say what is pushed.
type Options struct {
	// Archive is a file: an OCI layout or what `docker save` writes.
	Archive string
	// Image of the archive by name, if there are several; empty is the first.
	Image string
	// Target is HOST/PROJECT/REPOSITORY:TAG.
	Target string
}

// Push sends the image and returns the digest that it has in the registry.
func Push(ctx context.Context, s Session, o Options) (digest string, err error) {
	target, err := ParseTarget(o.Target)
	if err != nil {
		return "", err
	}
	img, done, err := openImage(o.Archive, o.Image)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, done()) }()
	h, err := img.Digest()
	if err != nil {
		return "", fmt.Errorf("reading the image: %w", err)
	}
	rt, err := s.transport()
	if err != nil {
		return "", err
	}
	defer rt.CloseIdleConnections()
	err = remote.Write(target, img, remote.WithContext(ctx), remote.WithTransport(onlyTLS{rt}), remote.WithUserAgent("atoll"),
		remote.WithAuth(&authn.Basic{Username: s.User, Password: s.Password}))
	if err != nil {
		return "", explain(err, o.Target, s.User)
	}
	return h.String(), nil
}

// ParseTarget checks the name that an image is to have.
func ParseTarget(target string) (name.Reference, error) {
	ref, err := name.ParseReference(target, name.WithDefaultRegistry(""))
	if err != nil {
		return nil, fmt.Errorf("%q is no name of an image: %w", target, err)
	}
	if ref.Context().RegistryStr() == "" {
		return nil, fmt.Errorf("%q does not say which registry; say %s/PROJECT/REPOSITORY:TAG, the project being a namespace", target, RegistryHost)
	}
	if _, tag := ref.(name.Tag); !tag {
		return nil, fmt.Errorf("%q names a digest; an image is pushed under a tag", target)
	}
	return ref, nil
}

// transport finds the registry where the portal is.
func (s Session) transport() (*http.Transport, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.CA != nil {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(s.CA) {
			return nil, errors.New("the certificate authority of the kubeconfig is no certificate in PEM; log in again")
		}
	}
	dialer := net.Dialer{Timeout: time.Minute}
	return &http.Transport{
		Proxy:           http.ProxyFromEnvironment,
		TLSClientConfig: config,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if host, _, err := net.SplitHostPort(address); err == nil && host == RegistryHost && s.Portal != "" {
				address = s.Portal
			}
			return dialer.DialContext(ctx, network, address)
		},
		TLSHandshakeTimeout:   time.Minute,
		ResponseHeaderTimeout: 2 * time.Minute,
		MaxIdleConnsPerHost:   8,
	}, nil
}

// onlyTLS never sends anything in the clear: the library tries that when HTTPS fails and the registry's name ends in
// .local.
type onlyTLS struct{ next http.RoundTripper }

func (o onlyTLS) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fmt.Errorf("%s is not asked without TLS", r.URL.Host)
	}
	return o.next.RoundTrip(r)
}

// explain says what to do about a refusal.
func explain(err error, target, user string) error {
	refusal, ok := errors.AsType[*transport.Error](err)
	if !ok {
		return fmt.Errorf("pushing %s: %w", target, err)
	}
	// The protocol of tokens has one answer for who is not known and for whose token is not for this.
	known := strings.Contains(err.Error(), " may not ")
	switch status := refusal.StatusCode; {
	case status == http.StatusUnauthorized && !known:
		return fmt.Errorf("pushing %s: the registry does not accept the credentials of %s (%w); log in again with `atoll login`", target, user, err)
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return fmt.Errorf("pushing %s: %w; owners and administrators of the namespace can give %s the role Edit", target, err, user)
	}
	return fmt.Errorf("pushing %s: %w", target, err)
}
