// Package etcd runs the embedded etcd of a server.
//
// One member, listening on 127.0.0.1 only, TLS with client certificates on both
// ports. The server role calls it; the API server is its only client. It is not
// a general etcd launcher: clustering several members comes with several
// servers.
//
// What can go wrong: a busy port; a full disk; damaged data. Data is checked
// before etcd opens it, because etcd itself starts an empty cluster beside an
// old database when its log is gone, and skips writes when its log is shorter
// than its database. Damage ends Run with ErrDamaged; nothing is ever deleted.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"atoll.dev/atoll/internal/kube/logging"
)

// Config of an embedded etcd. File names are absolute.
type Config struct {
	// Dir is the data directory, made when missing (0700).
	Dir string
	// MarkerFile is written when the member was created. When it exists and the
	// data does not, the data was lost.
	MarkerFile string
	Name       string
	ClientPort int
	PeerPort   int
	// QuotaBytes bounds the database; writes fail beyond it.
	QuotaBytes int64

	CACert     string
	ServerCert string
	ServerKey  string
	PeerCert   string
	PeerKey    string

	Logger *slog.Logger
}

// Etcd is one embedded member.
type Etcd struct {
	cfg    Config
	server *embed.Config
	ready  chan struct{}
}

// New checks the configuration and touches nothing.
func New(cfg Config) (*Etcd, error) {
	ec := serverConfig(cfg)
	if err := ec.Validate(); err != nil {
		return nil, fmt.Errorf("etcd configuration: %w", err)
	}
	return &Etcd{cfg: cfg, server: ec, ready: make(chan struct{})}, nil
}

// serverConfig translates to etcd's own configuration.
func serverConfig(cfg Config) *embed.Config {
	client := loopbackURL(cfg.ClientPort)
	peer := loopbackURL(cfg.PeerPort)
	ec := embed.NewConfig()
	ec.Name = cfg.Name
	ec.Dir = cfg.Dir
	ec.ListenClientUrls, ec.AdvertiseClientUrls = client, client
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = peer, peer
	ec.InitialCluster = cfg.Name + "=" + peer[0].String()
	ec.ClientTLSInfo = transport.TLSInfo{
		CertFile: cfg.ServerCert, KeyFile: cfg.ServerKey, TrustedCAFile: cfg.CACert, ClientCertAuth: true,
	}
	ec.PeerTLSInfo = transport.TLSInfo{
		CertFile: cfg.PeerCert, KeyFile: cfg.PeerKey, TrustedCAFile: cfg.CACert, ClientCertAuth: true,
	}
	ec.TlsMinVersion = "TLS1.2"
	ec.EnableGRPCGateway = false
	ec.QuotaBackendBytes = cfg.QuotaBytes
	// The API server compacts every five minutes; this is the backstop.
	ec.AutoCompactionMode = embed.CompactorModePeriodic
	ec.AutoCompactionRetention = "1h"
	ec.BootstrapDefragThresholdMegabytes = 64
	// There are no followers to keep log entries in memory for.
	ec.SnapshotCount = 2000
	ec.SnapshotCatchUpEntries = 100
	ec.WarningUnaryRequestDuration = time.Second
	ec.Logger = "zap"
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logging.NewZap(cfg.Logger).WithOptions(zap.IncreaseLevel(zap.WarnLevel)))
	return ec
}

func loopbackURL(port int) []url.URL {
	return []url.URL{{Scheme: "https", Host: fmt.Sprintf("127.0.0.1:%d", port)}}
}

// Ready is closed when the member serves clients.
func (e *Etcd) Ready() <-chan struct{} { return e.ready }

// Run checks the data, starts the member and holds until ctx ends or the member
// fails. It returns nil when ctx ended and the member stopped in order.
func (e *Etcd) Run(ctx context.Context) error {
	if err := os.MkdirAll(e.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("making etcd directory: %w", err)
	}
	if err := checkData(e.cfg.Dir, e.cfg.MarkerFile); err != nil {
		return fmt.Errorf("checking etcd data in %s: %w", e.cfg.Dir, err)
	}
	member, err := start(e.server)
	if err != nil {
		return fmt.Errorf("starting etcd: %w", err)
	}
	defer member.Close()
	select {
	case <-member.Server.ReadyNotify():
	case err := <-member.Err():
		return fmt.Errorf("starting etcd: %w", err)
	case <-member.Server.StopNotify():
		return errors.New("starting etcd: it stopped by itself")
	case <-ctx.Done():
		return nil
	}
	if err := writeMarker(e.cfg.MarkerFile); err != nil {
		return err
	}
	close(e.ready)
	select {
	case err := <-member.Err():
		return fmt.Errorf("running etcd: %w", err)
	case <-member.Server.StopNotify():
		return errors.New("running etcd: it stopped by itself")
	case <-ctx.Done():
		return nil
	}
}

// start starts the member. etcd panics on data it does not understand; that
// becomes an error here.
func start(ec *embed.Config) (member *embed.Etcd, err error) {
	defer func() {
		if r := recover(); r != nil {
			member, err = nil, fmt.Errorf("%w: etcd cannot use its data: %v", ErrDamaged, r)
		}
	}()
	return embed.StartEtcd(ec)
}

// writeMarker records once that the member exists.
func writeMarker(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("recording that etcd has data: %w", err)
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, time.Now().UTC().Format(time.RFC3339)); err != nil {
		return fmt.Errorf("recording that etcd has data: %w", err)
	}
	return f.Sync()
}
