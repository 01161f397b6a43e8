package portal

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir/pki"
)

// started is a portal that serves until the test ends.
func started(t *testing.T, routes ...Route) (address string, client *http.Client, log *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	p, err := pki.New(pki.Config{
		Dir: filepath.Join(dir, "pki"), KubeconfigDir: filepath.Join(dir, "kubeconfig"), AdminKubeconfig: filepath.Join(dir, "admin"),
		NodeName: "n", ServiceIP: netip.MustParseAddr("10.96.0.1"), Domain: "cluster.local", APIServer: "https://127.0.0.1", AdminURL: "https://127.0.0.1",
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Ensure(); err != nil {
		t.Fatal(err)
	}
	files := pki.Files{Dir: filepath.Join(dir, "pki")}
	log = new(bytes.Buffer)
	portal, err := New(Config{
		Address: "127.0.0.1:0", CertFile: files.Cert(pki.Portal), KeyFile: files.Key(pki.Portal), CAFile: files.CACert(pki.ClusterCA),
		Routes: routes, Logger: slog.New(slog.NewTextHandler(log, nil)),
		Context: func(ctx context.Context, source netip.Addr) context.Context {
			return context.WithValue(ctx, sourceKey{}, source)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- portal.serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	pem, err := os.ReadFile(files.CACert(pki.ClusterCA))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	return l.Addr().String(), &http.Client{Transport: transport}, log
}

type sourceKey struct{}

func TestServes(t *testing.T) {
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			code := http.StatusBadRequest
			if _, big := errors.AsType[*http.MaxBytesError](err); big {
				code = http.StatusRequestEntityTooLarge
			}
			http.Error(w, "too much", code)
			return
		}
		_, _ = w.Write([]byte(r.Context().Value(sourceKey{}).(netip.Addr).String()))
		_, _ = w.Write(b[:min(len(b), 8)])
	})
	address, client, log := started(t, Route{Pattern: "POST /small", Handler: echo}, Route{Pattern: "POST /stream", Handler: echo, Stream: true})
	for _, tt := range []struct {
		method, path string
		size         int
		want         int
	}{
		{"GET", "/healthz", 0, 200},
		{"GET", "/nothing", 0, 404},
		{"GET", "/small", 0, 405},
		{"POST", "/small", 1000, 200},
		{"POST", "/small", maxBody + 1, 413},
		{"POST", "/stream?password=geheim", 4 << 20, 200},
	} {
		req, err := http.NewRequest(tt.method, "https://"+address+tt.path, strings.NewReader(strings.Repeat("x", tt.size)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-For", "203.0.113.1")
		req.Header.Set("Authorization", "Basic Z2VoZWltOmdlaGVpbQ==")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s %s: %d %s", tt.method, tt.path, resp.StatusCode, text)
		}
		if tt.method == "POST" && tt.want == 200 && string(text) != "127.0.0.1xxxxxxxx" {
			t.Errorf("%s: %q", tt.path, text)
		}
	}
	if text := log.String(); !strings.Contains(text, "path=/small status=413") || strings.Contains(text, "geheim") || strings.Contains(text, "Z2Vo") {
		t.Errorf("log:\n%s", text)
	}
}

func TestChainAndVersion(t *testing.T) {
	address, _, _ := started(t)
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	chain := conn.ConnectionState().PeerCertificates
	_ = conn.Close()
	if len(chain) != 2 || !chain[1].IsCA || chain[0].VerifyHostname(pki.RegistryHost) != nil {
		t.Errorf("chain of %d", len(chain))
	}
	_, err = tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS11, MaxVersion: tls.VersionTLS11})
	if err == nil {
		t.Error("TLS 1.1 is spoken")
	}
}

func TestBoundedConnections(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := bound(l, 10, 2)
	accepted := make(chan net.Conn, 10)
	go func() {
		for {
			conn, err := b.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	defer l.Close()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	dial()
	dial()
	one, two := <-accepted, <-accepted
	third := dial()
	if err := third.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := third.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the third connection is open: %v", err)
	}
	_ = one.Close()
	_ = one.Close()
	dial()
	three := <-accepted
	_, _ = two.Close(), three.Close()
	if len(b.open) != 0 || b.total != 0 {
		t.Errorf("%d connections counted from %v", b.total, b.open)
	}
}

// TestSlowHeaders: who sends a header a byte at a time loses the connection.
func TestSlowHeaders(t *testing.T) {
	t.Parallel()
	address, _, _ := started(t)
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "POST /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(6 * headerWithin)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection stays open")
	}
}

// TestSmuggling: what two readers could take for two requests is one, or none.
func TestSmuggling(t *testing.T) {
	address, _, _ := started(t, Route{Pattern: "POST /small", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		_, _ = w.Write(b)
	})})
	for name, text := range map[string]string{
		"two lengths":         "POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 40\r\n\r\nabcd",
		"unknown encoding":    "POST /small HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
		"space before colon":  "POST /small HTTP/1.1\r\nHost: x\r\nContent-Length : 4\r\n\r\nabcd",
		"two hosts":           "POST /small HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
		"no host":             "POST /small HTTP/1.1\r\n\r\n",
		"control in the name": "POST /small HTTP/1.1\r\nHost: x\r\nX\x00Y: z\r\n\r\n",
	} {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 64)
		n, err := conn.Read(answer)
		if err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 4") && !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 5") {
			t.Errorf("%s: %q, %v", name, answer[:n], err)
		}
		_ = conn.Close()
	}
}

// TestDeadlineOfHandler: a stream's handler that wants to read for a short time only is not made to wait longer.
func TestDeadlineOfHandler(t *testing.T) {
	t.Parallel()
	ended := make(chan error, 1)
	address, _, _ := started(t, Route{Pattern: "POST /stream", Stream: true, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			ended <- err
			return
		}
		_, err := io.Copy(io.Discard, r.Body)
		ended <- err
	})})
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "POST /stream HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"); err != nil {
		t.Fatal(err)
	}
	const pause = 20 * time.Millisecond
	for range progressWithin / 2 / pause { // by looks: a host that stands still takes none
		select {
		case err := <-ended:
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("reading ended with %v", err)
			}
			return
		default:
			time.Sleep(pause)
		}
	}
	t.Error("reading goes on after the deadline")
}
