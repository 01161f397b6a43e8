package up

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/supervise"
)

// Report is the answer to a status request.
type Report struct {
	Version  string    `json:"version"`
	DataDir  string    `json:"dataDir"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Settings Settings  `json:"settings"`
	Node     Node      `json:"node"`
	Services []Service `json:"services"`
	// Pool is what the warm pool says about itself, null when it does not
	// answer.
	Pool *wire.Status `json:"pool"`
	// NetworkPolicy is what the agent says about network policies, null when it has not said anything.
	NetworkPolicy *policyv1.Status `json:"networkPolicy"`
}

// Service is a child process with what it uses.
type Service struct {
	supervise.Status
	process.Memory
}

// serveControl answers requests on the control socket. Only root can connect.
func (u *Up) serveControl(ctx context.Context) error {
	path := u.cfg.Tree.Control()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the old control socket: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("listening for control requests: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(fmt.Errorf("closing the control socket to others: %w", err), l.Close())
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(u.snapshot(r.Context())); err != nil {
			u.cfg.Logger.Warn("answering a status request failed", "error", err)
		}
	})
	mux.HandleFunc("POST /stop/{service}", func(w http.ResponseWriter, r *http.Request) {
		if err := u.children.Stop(r.Context(), r.PathValue("service")); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	mux.HandleFunc("POST /stop", func(http.ResponseWriter, *http.Request) { u.stop() })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving control requests: %w", err)
	}
	return nil
}

// snapshot gathers the status of everything.
func (u *Up) snapshot(ctx context.Context) Report {
	r := Report{
		Version: u.cfg.Version, DataDir: u.cfg.Tree.Root(), PID: os.Getpid(), Started: u.began,
		Settings: u.cfg.Settings, Pool: askPool(ctx, u.cfg.Tree.PoolSocket()), NetworkPolicy: readPolicies(u.cfg.Tree.PolicyStatus()),
	}
	r.Node, _ = u.node.Get()
	self := Service{Status: supervise.Status{
		Name: "up", State: supervise.Ready, PID: os.Getpid(), Since: u.began, Started: u.began, LogFile: u.cfg.Tree.Log("up"),
	}}
	list := []Service{self}
	for _, st := range u.children.Snapshot() {
		list = append(list, Service{Status: st})
	}
	for i := range list {
		if list[i].PID == 0 {
			continue
		}
		if m, err := (process.Info{PID: list[i].PID}).Memory(); err == nil {
			list[i].Memory = m
		}
	}
	r.Services = list
	return r
}

// readPolicies returns what the agent has written about network policies, without the names of counters, or nil.
func readPolicies(path string) *policyv1.Status {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	s := new(policyv1.Status)
	if err := json.Unmarshal(b, s); err != nil {
		return nil
	}
	s.Counters = nil
	return s
}

// askPool returns the pool's own status, or nil.
func askPool(ctx context.Context, socket string) *wire.Status {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	status, err := wire.GetStatus(ctx, socket)
	if err != nil {
		return nil
	}
	return &status
}

// ErrNotRunning says that no supervisor answers for a data directory.
var ErrNotRunning = errors.New("atoll is not running on this data directory")

// Client talks to the supervisor of a data directory.
type Client struct {
	http *http.Client
}

// NewClient returns a client for the supervisor of t, which need not run.
func NewClient(t datadir.Tree) *Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", t.Control())
		},
		DisableKeepAlives: true,
	}
	return &Client{http: &http.Client{Transport: transport}}
}

// Status asks for the status of everything.
func (c *Client) Status(ctx context.Context) (Report, error) {
	var r Report
	err := c.do(ctx, http.MethodGet, "/status", &r)
	return r, err
}

// StopService ends one child for good and waits until it has ended.
func (c *Client) StopService(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/stop/"+name, nil)
}

// Stop tells the supervisor to stop everything but pods. It does not wait.
func (c *Client) Stop(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/stop", nil)
}

func (c *Client) do(ctx context.Context, method, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://atoll"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
			return ErrNotRunning
		case errors.Is(err, os.ErrPermission):
			return errors.New("only root may ask the supervisor; use sudo")
		}
		return fmt.Errorf("asking the supervisor: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return fmt.Errorf("reading the supervisor's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the supervisor answers: %s", body)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("reading the supervisor's answer: %w", err)
	}
	return nil
}
