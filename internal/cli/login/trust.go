package login

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// trustOptions are what a person says about the server's certificate.
type trustOptions struct {
	caFile      string
	fingerprint string
	insecure    bool
}

// fingerprint is how the authority of a server is shown, as ssh shows keys.
func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// knownFile is where the authority of a server is kept that a person has confirmed.
func (c *commands) knownFile(server string) string {
	return filepath.Join(c.dir(), "known", fileName(server)+".pem")
}

// trust decides how the certificate of a server is checked: as the flags say, as it was confirmed before, by the
// authorities of this machine, or by asking the person.
func (c *commands) trust(ctx context.Context, server string, o trustOptions) (trust, error) {
	switch {
	case o.insecure:
		c.Tell("warning: the certificate of %s is not checked; whoever is in between reads your password\n", server)
		return trust{Insecure: true}, nil
	case o.caFile != "":
		b, err := os.ReadFile(o.caFile)
		if err != nil {
			return trust{}, fmt.Errorf("--ca-file: %w", err)
		}
		return trust{CA: string(b)}, nil
	}
	known, err := os.ReadFile(c.knownFile(server))
	if err == nil {
		return c.checkKnown(ctx, server, string(known), o)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return trust{}, fmt.Errorf("reading what is known about the server: %w", err)
	}
	chain, err := peerChain(ctx, server)
	if err != nil {
		return trust{}, err
	}
	host, _, _ := net.SplitHostPort(server)
	if _, err := chain[0].Verify(x509.VerifyOptions{DNSName: host, Intermediates: pool(chain[1:])}); err == nil && o.fingerprint == "" {
		return trust{}, nil // this machine trusts it already
	}
	return c.confirm(server, host, chain, o.fingerprint)
}

// checkKnown refuses a server that shows something else than what was confirmed.
func (c *commands) checkKnown(ctx context.Context, server, known string, o trustOptions) (trust, error) {
	chain, err := peerChain(ctx, server)
	if err != nil {
		return trust{}, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(known))
	host, _, _ := net.SplitHostPort(server)
	if _, err := chain[0].Verify(x509.VerifyOptions{DNSName: host, Roots: roots}); err != nil {
		return trust{}, fmt.Errorf("%s shows another certificate than before: either it was installed anew, or somebody is in between (%w). "+
			"If you know why, remove %s and log in again", server, err, c.knownFile(server))
	}
	if block, _ := pem.Decode([]byte(known)); o.fingerprint != "" && block != nil {
		if cert, err := x509.ParseCertificate(block.Bytes); err != nil || fingerprint(cert) != o.fingerprint {
			return trust{}, fmt.Errorf("--fingerprint: the authority of %s is another", server)
		}
	}
	return trust{CA: known}, nil
}

// confirm asks whether the authority at the end of the chain is that of the server, and remembers it.
func (c *commands) confirm(server, host string, chain []*x509.Certificate, wanted string) (trust, error) {
	authority := chain[len(chain)-1]
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	if _, err := chain[0].Verify(x509.VerifyOptions{DNSName: host, Roots: roots, Intermediates: pool(chain[1:])}); err != nil {
		return trust{}, fmt.Errorf("the certificate of %s cannot be used: %w", server, err)
	}
	shown := fingerprint(authority)
	switch {
	case wanted != "" && wanted != shown:
		return trust{}, fmt.Errorf("--fingerprint: the authority of %s is %s", server, shown)
	case wanted == "" && c.Terminal() == nil:
		return trust{}, fmt.Errorf("nobody vouches for the certificate of %s: give its authority with --ca-file (on the host it is pki/cluster-ca.crt in the data directory), or --fingerprint %s if that is right", server, shown)
	case wanted == "":
		c.Tell("Nobody vouches for the certificate of %s.\nIts authority has the fingerprint %s.\n"+
			"On the host, this shows the right one: atoll login fingerprint\n", server, shown)
		answer, err := c.ask("Is it the right one (yes/no)? ")
		if err != nil {
			return trust{}, err
		}
		if strings.ToLower(strings.TrimSpace(answer)) != "yes" {
			return trust{}, errors.New("not logged in")
		}
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Raw}))
	file := c.knownFile(server)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return trust{}, fmt.Errorf("remembering the server: %w", err)
	}
	if err := atomicfile.Write(file, []byte(text), 0o600); err != nil {
		return trust{}, fmt.Errorf("remembering the server: %w", err)
	}
	return trust{CA: text}, nil
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, cert := range certs {
		p.AddCert(cert)
	}
	return p
}

// peerChain is what a server shows, unchecked.
func peerChain(ctx context.Context, server string) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}} // only looked at
	conn, err := dialer.DialContext(ctx, "tcp", server)
	if err != nil {
		return nil, fmt.Errorf("connecting to the supervisor: %w", err)
	}
	defer conn.Close()
	chain := conn.(*tls.Conn).ConnectionState().PeerCertificates
	if len(chain) == 0 {
		return nil, fmt.Errorf("%s shows no certificate", server)
	}
	return chain, nil
}
