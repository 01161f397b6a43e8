// Package portal is the HTTPS listener for people and their tools: logging in, and the registry of images.
//
// It knows no service itself: what it serves is a list of routes that the server role makes. For every request it
// bounds the size of headers and body and the time, says where it comes from, and leaves one line in the log that
// never holds a query, a header or a body. A streaming route has no bound on size or total time, but each read and
// each write must get on within a minute. Connections are bounded in all and per source address, so that nobody keeps
// the others out. Forwarding headers mean nothing here: the source is the other end of the connection.
//
// The certificate is read again at each handshake, and its authority is sent along, so that a client that knows
// nothing yet can show a person what it is asked to trust. What can go wrong: the port is busy, which ends Run.
package portal

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"
)

// Route is one pattern of http.ServeMux and what answers it.
type Route struct {
	Pattern string
	Handler http.Handler
	// Stream lifts the bounds on the size of the body and on the time of the request.
	Stream bool
}

// Config of a portal.
type Config struct {
	// Address to listen at, host:port.
	Address string
	// CertFile, KeyFile and CAFile are PEM files: the certificate, its key and its authority.
	CertFile, KeyFile, CAFile string
	Routes                    []Route
	// Context, when set, is given the source of each request and returns what the handler gets.
	Context func(ctx context.Context, source netip.Addr) context.Context
	// Ready, when set, is called once when the portal listens.
	Ready  func()
	Logger *slog.Logger
}

const (
	maxHeader     = 32 << 10
	maxBody       = 64 << 10
	headerWithin  = 10 * time.Second
	requestWithin = 30 * time.Second
	idleWithin    = 2 * time.Minute
	stopWithin    = 10 * time.Second
	// progressWithin is how long a streaming route may wait for one read or write.
	progressWithin = time.Minute

	maxConnections          = 2048
	maxConnectionsPerSource = 256
	maxStreams              = 16 // of one connection
)

// Portal is one listener. Make one with New.
type Portal struct {
	cfg Config
	mux *http.ServeMux
}

// New checks the configuration.
func New(cfg Config) (*Portal, error) {
	if cfg.Address == "" || cfg.CertFile == "" || cfg.KeyFile == "" || cfg.CAFile == "" || cfg.Logger == nil {
		return nil, errors.New("portal: address, certificate, key, authority and logger must be set")
	}
	p := &Portal{cfg: cfg, mux: http.NewServeMux()}
	p.handle(Route{Pattern: "GET /healthz", Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok"))
	})})
	for _, r := range cfg.Routes {
		p.handle(r)
	}
	return p, nil
}

// Run serves until ctx ends; requests under way may end within a few seconds.
func (p *Portal) Run(ctx context.Context) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", p.cfg.Address)
	if err != nil {
		return fmt.Errorf("portal: %w", err)
	}
	return p.serve(ctx, l)
}

func (p *Portal) serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           p.mux,
		ReadHeaderTimeout: headerWithin,
		IdleTimeout:       idleWithin,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		// What strangers do wrong on the wire is not worth a warning.
		ErrorLog:  slog.NewLogLogger(p.cfg.Logger.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: p.certificate},
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		if err := srv.Shutdown(grace); err != nil {
			_ = srv.Close()
		}
	})
	if p.cfg.Ready != nil {
		p.cfg.Ready()
	}
	err := srv.ServeTLS(bound(l, maxConnections, maxConnectionsPerSource), "", "")
	if stop() {
		return fmt.Errorf("portal: %w", err) // ctx has not ended
	}
	<-done
	return nil
}

// certificate reads the certificate and adds its authority to the chain.
func (p *Portal) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(p.cfg.CertFile, p.cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(p.cfg.CAFile)
	if err != nil {
		return nil, err
	}
	if block, _ := pem.Decode(text); block != nil {
		pair.Certificate = append(pair.Certificate, block.Bytes)
	}
	return &pair, nil
}

// handle adds a route with the bounds around it.
func (p *Portal) handle(route Route) {
	p.mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		source := sourceOf(r)
		out := &answer{ResponseWriter: w, control: http.NewResponseController(w), stream: route.Stream}
		if route.Stream {
			out.extend()
			r.Body = &body{ReadCloser: r.Body, out: out}
		} else {
			// Not every connection has deadlines; those of the headers and of idling hold then.
			_ = out.control.SetReadDeadline(began.Add(requestWithin))
			_ = out.control.SetWriteDeadline(began.Add(requestWithin))
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			w.Header().Set("Cache-Control", "no-store")
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if p.cfg.Context != nil {
			r = r.WithContext(p.cfg.Context(r.Context(), source))
		}
		defer p.log(r, out, source, began)
		route.Handler.ServeHTTP(out, r)
	})
}

// log leaves a line about a request: what only looks and works is for debugging.
func (p *Portal) log(r *http.Request, out *answer, source netip.Addr, began time.Time) {
	level := slog.LevelInfo
	if (r.Method == http.MethodGet || r.Method == http.MethodHead) && out.status() < http.StatusBadRequest {
		level = slog.LevelDebug
	}
	path := r.URL.Path
	if len(path) > 256 {
		path = path[:256]
	}
	p.cfg.Logger.Log(r.Context(), level, "portal request", "method", r.Method, "path", path, "status", out.status(),
		"bytes", out.bytes, "source", source, "took", time.Since(began).Round(time.Millisecond))
}

// sourceOf is the address at the other end of the connection.
func sourceOf(r *http.Request) netip.Addr {
	addr, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return addr.Addr().Unmap().WithZone("")
}

// answer counts what is written and keeps streams going.
type answer struct {
	http.ResponseWriter
	control *http.ResponseController
	stream  bool
	code    int
	bytes   int64
	until   time.Time // what the handler has set as the end of reading; zero when it has not
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Flush implements http.Flusher.
func (a *answer) Flush() { _ = a.control.Flush() }

func (a *answer) status() int {
	if a.code == 0 {
		return http.StatusOK
	}
	return a.code
}

// extend gives a stream its time for what comes next, but for reading not more than the handler wants.
func (a *answer) extend() {
	until := time.Now().Add(progressWithin)
	_ = a.control.SetWriteDeadline(until)
	if !a.until.IsZero() && a.until.Before(until) {
		until = a.until
	}
	_ = a.control.SetReadDeadline(until)
}

// SetReadDeadline is for http.ResponseController.
func (a *answer) SetReadDeadline(t time.Time) error {
	a.until = t
	return a.control.SetReadDeadline(t)
}

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(code int) {
	if a.code == 0 && code >= http.StatusOK {
		a.code = code
	}
	a.ResponseWriter.WriteHeader(code)
}

// Write implements http.ResponseWriter.
func (a *answer) Write(b []byte) (int, error) {
	if a.stream {
		a.extend()
	}
	n, err := a.ResponseWriter.Write(b)
	a.bytes += int64(n)
	return n, err
}

// body gives each read of a stream its time.
type body struct {
	io.ReadCloser
	out *answer
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	b.out.extend()
	return b.ReadCloser.Read(p)
}
