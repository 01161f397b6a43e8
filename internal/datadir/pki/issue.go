package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// ErrDamaged is in the chain of errors about an authority or a signing key that
// exists but cannot be used. The way out is to restore the file from a backup,
// or to start over with an empty data directory.
var ErrDamaged = errors.New("damaged")

// authority is a loaded certificate authority.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

// ensureAuthority loads an authority, or makes it when neither of its files
// exists.
func (p *PKI) ensureAuthority(name Authority) (*authority, error) {
	certFile, keyFile := p.files.CACert(name), p.files.CAKey(name)
	certPEM, certErr := os.ReadFile(certFile)
	keyPEM, keyErr := os.ReadFile(keyFile)
	switch {
	case errors.Is(certErr, fs.ErrNotExist):
		// The certificate is written last: without it the authority has never
		// been used, so a key left by a crash is of no value.
		return p.makeAuthority(name)
	case certErr != nil:
		return nil, fmt.Errorf("authority %s: %w", name, certErr)
	case keyErr != nil:
		return nil, fmt.Errorf("authority %s: %w: %s exists but its key cannot be read: %w", name, ErrDamaged, certFile, keyErr)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("authority %s: %w: %s and %s: %w", name, ErrDamaged, certFile, keyFile, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("authority %s: %w: %s is not an authority", name, ErrDamaged, certFile)
	}
	if left := pair.Leaf.NotAfter.Sub(p.cfg.Now()); left < leafLife {
		p.cfg.Logger.Warn("certificate authority ends soon and must be replaced by hand", "authority", name, "notAfter", pair.Leaf.NotAfter)
	}
	return &authority{cert: pair.Leaf, key: signer, pem: certPEM}, nil
}

func (p *PKI) makeAuthority(name Authority) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("authority %s: generating key: %w", name, err)
	}
	now := p.cfg.Now()
	template := &x509.Certificate{
		SerialNumber:          nil, // chosen at random by CreateCertificate
		Subject:               pkix.Name{CommonName: "atoll " + string(name)},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("authority %s: signing: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("authority %s: reading it back: %w", name, err)
	}
	if err := writeKey(p.files.CAKey(name), key); err != nil {
		return nil, fmt.Errorf("authority %s: %w", name, err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := atomicfile.Write(p.files.CACert(name), certPEM, 0o644); err != nil {
		return nil, fmt.Errorf("authority %s: %w", name, err)
	}
	return &authority{cert: cert, key: key, pem: certPEM}, nil
}

// ensureLeaf keeps the certificate of s, or makes it anew. It reports whether it
// made one.
func (p *PKI) ensureLeaf(a *authority, s spec) (bool, error) {
	pair, err := tls.LoadX509KeyPair(p.files.Cert(s.name), p.files.Key(s.name))
	if err == nil && s.covers(pair.Leaf) && signedBy(pair.Leaf, a) && !p.due(pair.Leaf) {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.cfg.Logger.Warn("certificate cannot be read and is replaced", "name", s.name, "error", err)
	}
	return true, p.issue(a, s)
}

// due reports whether a certificate must be renewed at this time.
func (p *PKI) due(cert *x509.Certificate) bool {
	now := p.cfg.Now()
	life := cert.NotAfter.Sub(cert.NotBefore)
	left := cert.NotAfter.Sub(now)
	return now.Before(cert.NotBefore) || left < time.Duration(renewAt*float64(life))
}

// signedBy reports whether cert is of this authority, key included.
func signedBy(cert *x509.Certificate, a *authority) bool {
	return bytes.Equal(cert.RawIssuer, a.cert.RawSubject) && cert.CheckSignatureFrom(a.cert) == nil
}

// issue signs a new certificate with a new key and writes both, the key first.
// A crash between the two writes leaves a pair that does not match, which the
// next ensureLeaf replaces.
func (p *PKI) issue(a *authority, s spec) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("generating key: %w", err)
	}
	now := p.cfg.Now()
	notAfter := now.Add(leafLife)
	if notAfter.After(a.cert.NotAfter) {
		notAfter = a.cert.NotAfter
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: s.user, Organization: slices.Clone(s.groups)},
		NotBefore:   now.Add(-backdate),
		NotAfter:    notAfter,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: s.extKeyUsage(),
		DNSNames:    slices.Clone(s.dns),
		IPAddresses: s.ips(),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return fmt.Errorf("signing: %w", err)
	}
	if err := writeKey(p.files.Key(s.name), key); err != nil {
		return err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return atomicfile.Write(p.files.Cert(s.name), certPEM, 0o644)
}

// ensureServiceAccountKey makes the key of service account tokens once. It is
// never renewed: that would end every token in use.
func (p *PKI) ensureServiceAccountKey() error {
	path := p.files.ServiceAccountKey()
	data, err := os.ReadFile(path)
	var key *rsa.PrivateKey
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return fmt.Errorf("service account key: generating: %w", err)
		}
		if err := writeKey(path, key); err != nil {
			return fmt.Errorf("service account key: %w", err)
		}
	case err != nil:
		return fmt.Errorf("service account key: %w", err)
	default:
		if key, err = parseRSAKey(data); err != nil {
			return fmt.Errorf("service account key: %w: %s: %w", ErrDamaged, path, err)
		}
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("service account key: encoding: %w", err)
	}
	pub := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	if _, err := atomicfile.WriteIfChanged(p.files.ServiceAccountPub(), pub, 0o644); err != nil {
		return fmt.Errorf("service account key: %w", err)
	}
	return nil
}

func parseRSAKey(data []byte) (*rsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("want an RSA key, got %T", parsed)
	}
	return key, nil
}

func writeKey(path string, key crypto.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding key: %w", err)
	}
	return atomicfile.Write(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}
