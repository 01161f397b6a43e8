package library

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// HTTP is a file on a web server.
type HTTP struct {
	URL string
	// CA are certificates in PEM: authorities, or the server's own. Empty is those of the host.
	CA string
}

// stall is how long nothing may come before the transfer is given up for now.
const stall = 60 * time.Second

// transfer is a file to get.
type transfer struct {
	client *http.Client
	url    string
	// fixed: what is at the URL never changes.
	fixed bool
	// into is the name of the file in the item's directory.
	into string
}

// part is what is known about a transfer under way.
type part struct {
	URL       string `json:"url"`
	Validator string `json:"validator,omitempty"`
	FileName  string `json:"fileName,omitempty"`
	Total     int64  `json:"total,omitempty"`
}

func decodePart(b []byte) part {
	var p part
	_ = json.Unmarshal(b, &p) // what cannot be read is as if it was not there
	return p
}

// fetchHTTP gets the file at a URL.
func (l *Library) fetchHTTP(ctx context.Context, id string, s Source, progress func(done, total int64)) (string, error) {
	u, err := url.Parse(s.HTTP.URL)
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: URL %.200q: %w", ErrSource, s.HTTP.URL, err)
	case u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("%w: URL %.200q: the scheme must be http or https", ErrSource, s.HTTP.URL)
	case u.Host == "":
		return "", fmt.Errorf("%w: URL %.200q: the host is missing", ErrSource, s.HTTP.URL)
	}
	transport, err := l.transport(s.HTTP.CA, s.Guarded)
	if err != nil {
		return "", err
	}
	defer transport.CloseIdleConnections()
	p, err := l.transfer(ctx, id, transfer{client: &http.Client{Transport: transport}, url: s.HTTP.URL, into: partFile}, progress)
	if err != nil {
		return "", err
	}
	return p.FileName, l.finish(id)
}

// transfer gets a file, going on where an earlier transfer of the same has ended.
func (l *Library) transfer(ctx context.Context, id string, t transfer, progress func(done, total int64)) (part, error) {
	info := l.path(id, t.into+".json")
	b, _ := os.ReadFile(info) // nothing to go on with
	p := decodePart(b)
	f, err := os.OpenFile(l.path(id, t.into), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return part{}, fmt.Errorf("receiving image %s: %w", id, full(err))
	}
	defer f.Close()
	at, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return part{}, fmt.Errorf("receiving image %s: %w", id, err)
	}
	if p.URL != t.url || !t.fixed && p.Validator == "" {
		at = 0
	}
	if at > 0 && at == p.Total {
		return p, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answer, err := t.request(ctx, at, p.Validator)
	if err != nil {
		return part{}, err
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusOK {
		at = 0
	}
	next := part{URL: t.url, Validator: validator(answer.Header), FileName: fileName(answer), Total: total(answer, at)}
	if at > 0 && next.Total != p.Total { // not what was begun
		return part{}, errors.Join(errors.New("the file at the URL has changed during the transfer, which begins anew"), os.Truncate(f.Name(), 0))
	}
	if err := f.Truncate(at); err != nil {
		return part{}, fmt.Errorf("receiving image %s: %w", id, full(err))
	}
	if b, err = json.Marshal(next); err == nil {
		err = atomicfile.Write(info, b, 0o600)
	}
	if err != nil {
		return part{}, fmt.Errorf("receiving image %s: %w", id, full(err))
	}
	if err := l.room(next.Total - at); err != nil {
		return part{}, err
	}
	return next, l.receive(ctx, cancel, id, f, answer.Body, at, next.Total, progress)
}

// receive writes what comes to the end of a file.
func (l *Library) receive(ctx context.Context, cancel context.CancelCauseFunc, id string, f *os.File, body io.Reader, at, total int64, progress func(done, total int64)) error {
	if _, err := f.Seek(at, io.SeekStart); err != nil {
		return fmt.Errorf("receiving image %s: %w", id, err)
	}
	watchdog := time.AfterFunc(stall, func() { cancel(fmt.Errorf("nothing has come for %v", stall)) })
	defer watchdog.Stop()
	done, last, checked := at, time.Time{}, at
	buf := make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(body, buf)
		watchdog.Reset(stall)
		if n > 0 {
			if _, err := f.Write(buf[:n]); err != nil {
				return fmt.Errorf("receiving image %s: %w", id, full(err))
			}
			done += int64(n)
		}
		if time.Since(last) > tellEvery || err != nil {
			last = time.Now()
			progress(done, total)
		}
		if total == 0 && done-checked > 256<<20 {
			checked = done
			if err := l.room(0); err != nil {
				return err
			}
		}
		switch {
		case err == nil:
			continue
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)) && (total == 0 || done == total):
			return full(f.Sync())
		case errors.Is(err, io.EOF):
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("receiving image %s: interrupted at %d of %d bytes: %w", id, done, total, err)
	}
}

// request asks for the file from an offset on, or for all of it where the server has nothing from there.
func (t transfer) request(ctx context.Context, at int64, validator string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: URL %.200q: %w", ErrSource, t.url, err)
	}
	req.Header.Set("Accept-Encoding", "identity")
	if at > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", at))
		if validator != "" {
			req.Header.Set("If-Range", validator)
		}
	}
	answer, err := t.client.Do(req)
	if err != nil {
		if _, ok := errors.AsType[errGuarded](err); ok {
			return nil, fmt.Errorf("%w: %w", ErrSource, err)
		}
		return nil, fmt.Errorf("getting %w", err) // url.Error begins with the method
	}
	switch code := answer.StatusCode; {
	case code == http.StatusOK, code == http.StatusPartialContent && at > 0:
		return answer, nil
	case code == http.StatusRequestedRangeNotSatisfiable && at > 0: // shorter than it was, or a server without open ranges
		if err := answer.Body.Close(); err != nil {
			return nil, fmt.Errorf("getting %.200s: %w", t.url, err)
		}
		return t.request(ctx, 0, "")
	case code == http.StatusNotFound, code == http.StatusGone, code == http.StatusForbidden, code == http.StatusUnauthorized, code == http.StatusBadRequest:
		err = fmt.Errorf("%w: %.200s answers %s", ErrSource, t.url, answer.Status)
	default:
		err = fmt.Errorf("%.200s answers %s", t.url, answer.Status)
	}
	return nil, errors.Join(err, answer.Body.Close())
}

// validator is what says that a file is still the same.
func validator(h http.Header) string {
	if tag := h.Get("ETag"); tag != "" && !strings.HasPrefix(tag, "W/") {
		return tag
	}
	return h.Get("Last-Modified")
}

// total is the size of the whole file, or 0.
func total(r *http.Response, at int64) int64 {
	if r.StatusCode == http.StatusPartialContent {
		if _, size, ok := strings.Cut(r.Header.Get("Content-Range"), "/"); ok {
			if n, err := strconv.ParseInt(size, 10, 64); err == nil && n > 0 {
				return n
			}
		}
	}
	if r.ContentLength > 0 {
		return at + r.ContentLength
	}
	return 0
}

// fileName is the last part of the URL that was answered.
func fileName(r *http.Response) string {
	name := path.Base(r.Request.URL.Path)
	if name == "/" || name == "." || len(name) > 255 {
		return ""
	}
	return name
}

// errGuarded is for an address that somebody may not reach.
type errGuarded struct{ addr string }

func (e errGuarded) Error() string {
	return fmt.Sprintf("%s is an address of this host, its link or the cluster, which images of a namespace may not come from; let an administrator import it with --cluster", e.addr)
}

// transport connects, and only where it may.
func (l *Library) transport(ca string, guarded bool) (*http.Transport, error) {
	dialer := &net.Dialer{Timeout: 30 * time.Second}
	if guarded && !l.cfg.AllowLocal {
		dialer.Control = func(_, address string, _ syscall.RawConn) error {
			addr, err := netip.ParseAddrPort(address)
			if err != nil {
				return err
			}
			if ip := addr.Addr().Unmap(); !ip.IsGlobalUnicast() || ip.IsLoopback() || isOwn(ip) || l.inCluster(ip) {
				return errGuarded{address}
			}
			return nil
		}
	}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSHandshakeTimeout: 30 * time.Second,
		ResponseHeaderTimeout: stall, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 1 << 20,
	}
	if ca == "" {
		return t, nil
	}
	config, err := trust([]byte(ca))
	t.TLSClientConfig = config
	return t, err
}

// inCluster tells whether an address is of a pod, a Service or a load balancer.
func (l *Library) inCluster(ip netip.Addr) bool {
	return slices.ContainsFunc(l.cfg.Guarded, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// isOwn tells whether an address is one of this host's.
func isOwn(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == ip {
			return true
		}
	}
	return false
}

// trust accepts servers whose certificate is one of these, or was issued by one of them.
func trust(certificates []byte) (*tls.Config, error) {
	pool, own := x509.NewCertPool(), map[string]bool{}
	for block, rest := pem.Decode(certificates); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: sslCertificate: %w", ErrSource, err)
		}
		pool.AddCert(c)
		own[string(c.Raw)] = true
	}
	if len(own) == 0 {
		return nil, fmt.Errorf("%w: sslCertificate holds no certificate in PEM", ErrSource)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The library's own check knows nothing of a server's certificate as such; ours follows.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			leaf := s.PeerCertificates[0]
			if own[string(leaf.Raw)] {
				return nil
			}
			between := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				between.AddCert(c)
			}
			_, err := leaf.Verify(x509.VerifyOptions{DNSName: s.ServerName, Roots: pool, Intermediates: between})
			return err
		},
	}, nil
}
