// Package containerd runs the containerd daemon inside this process.
//
// It holds the configuration, the choice of plugins and the start and stop of
// the daemon behind `atoll containerd`; the rest is upstream's. Micro-VM pods
// use our snapshotter (package storage/layers) and our shim, pods in the
// host's kernel use overlayfs and runc. It is not a client: package images
// beside it and the kubelet talk to the daemon over its socket.
//
// The `containerd` role of cmd/atoll calls it. What can go wrong: another
// daemon on the same root (New of the database times out after 10 s), a
// missing shim, a full disk. containerd's plugin registry and logger are
// global, so a process can run one daemon, once. Shims and their pods outlive
// the daemon; a new one finds them again.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/cmd/containerd/server"
	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"google.golang.org/grpc/grpclog"

	"atoll.dev/atoll/internal/kube/containerd/images"
	"atoll.dev/atoll/internal/linux/textpages"
	"atoll.dev/atoll/internal/storage/layers"
)

// A Daemon is containerd in this process.
type Daemon struct {
	config Config
	log    *slog.Logger
	ready  chan struct{}
}

// New returns a daemon that is not running. It checks the configuration and
// touches nothing.
func New(c Config, logger *slog.Logger) (*Daemon, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	return &Daemon{config: c, log: logger, ready: make(chan struct{})}, nil
}

// Ready is closed when the daemon answers CRI calls and the images that are
// never pulled are there.
func (d *Daemon) Ready() <-chan struct{} { return d.ready }

// Run runs the daemon until ctx ends, which returns nil, or until it fails. It
// can be called once per process.
func (d *Daemon) Run(ctx context.Context) error {
	start := time.Now()
	if err := d.prepare(); err != nil {
		return err
	}
	bridgeLogs(d.log)
	layers.Register()
	var db *metadata.DB
	saver := newCheckpoint(d.config.Root, d.log)
	saver.register(func(m *metadata.DB) { db = m })
	if err := saver.restore(); err != nil {
		return err
	}
	conf, err := d.load(ctx)
	if err != nil {
		return err
	}
	if err := server.CreateTopLevelDirectories(conf); err != nil {
		return fmt.Errorf("making containerd directories: %w", err)
	}
	if err := d.cleanTempMounts(); err != nil {
		return err
	}
	srv, err := server.New(ctx, conf)
	if err != nil {
		return fmt.Errorf("starting containerd: %w", err)
	}
	defer srv.Stop()
	var background sync.WaitGroup
	defer background.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	background.Go(func() { saver.run(ctx, db) })
	background.Go(func() { _ = textpages.Run(ctx) })
	if err := srv.Start(ctx); err != nil {
		return fmt.Errorf("serving containerd: %w", err)
	}
	for _, socket := range []string{d.config.Address, d.config.ttrpcAddress()} {
		if err := os.Chmod(socket, 0o600); err != nil {
			return fmt.Errorf("restricting access to a socket: %w", err)
		}
	}
	srv.Wait()
	if err := d.importImages(ctx); err != nil {
		return err
	}
	d.log.Info("containerd is ready", "address", d.config.Address, "duration", time.Since(start))
	close(d.ready)
	<-ctx.Done()
	return nil
}

// prepare makes the directories and writes the configuration file.
func (d *Daemon) prepare() error {
	c := &d.config
	for _, dir := range []string{c.Root, c.State, c.SocketDir, c.CNIConfDir, c.RegistryDir, filepath.Dir(c.ConfigFile), filepath.Dir(c.Address)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making directories: %w", err)
		}
	}
	// After a restart containerd looks up the shim of a runc container by name:
	// it records the path for sandboxes only. Not finding it, it declares the
	// running container dead.
	if err := os.Setenv("PATH", c.BinDir+":"+os.Getenv("PATH")); err != nil {
		return fmt.Errorf("setting PATH: %w", err)
	}
	text, err := c.TOML()
	if err != nil {
		return err
	}
	tmp := c.ConfigFile + ".new"
	if err := os.WriteFile(tmp, text, 0o600); err != nil {
		return fmt.Errorf("writing containerd configuration: %w", err)
	}
	if err := os.Rename(tmp, c.ConfigFile); err != nil {
		return fmt.Errorf("writing containerd configuration: %w", err)
	}
	return nil
}

// load reads the configuration file as containerd's own command does.
func (d *Daemon) load(ctx context.Context) (*srvconfig.Config, error) {
	conf := &srvconfig.Config{}
	graph := registry.Graph(func(*plugin.Registration) bool { return false })
	all := func() iter.Seq[plugin.Registration] { return slices.Values(graph) }
	if err := srvconfig.LoadConfigWithPlugins(ctx, d.config.ConfigFile, all, conf); err != nil {
		return nil, fmt.Errorf("loading containerd configuration: %w", err)
	}
	if err := log.SetLevel(conf.Debug.Level); err != nil {
		return nil, fmt.Errorf("setting containerd log level: %w", err)
	}
	return conf, nil
}

// cleanTempMounts removes mounts a killed daemon left behind.
func (d *Daemon) cleanTempMounts() error {
	if err := mount.SetTempMountLocation(filepath.Join(d.config.Root, "tmpmounts")); err != nil {
		return fmt.Errorf("making the place for temporary mounts: %w", err)
	}
	warnings, err := mount.CleanupTempMounts(0)
	for _, w := range append(warnings, err) {
		if w != nil {
			d.log.Warn("could not clean up a temporary mount", "error", w)
		}
	}
	return nil
}

// importImages loads the images of runc sandboxes and of virtual machines if they are missing.
func (d *Daemon) importImages(ctx context.Context) error {
	client, err := images.New(images.Config{Address: d.config.Address})
	if err != nil {
		return err
	}
	defer client.Close()
	if err := d.importMachine(ctx, client); err != nil {
		return fmt.Errorf("loading the image of virtual machines: %w", err)
	}
	if d.config.PauseArchive == "" {
		return nil
	}
	switch _, err := client.Status(ctx, PauseImage); {
	case err == nil:
		return nil
	case !errors.Is(err, images.ErrNotFound):
		return fmt.Errorf("looking for the pause image: %w", err)
	}
	f, err := os.Open(d.config.PauseArchive)
	if err != nil {
		return fmt.Errorf("loading the pause image: %w", err)
	}
	defer f.Close()
	if _, err := client.Load(ctx, f, images.LoadOptions{Source: d.config.PauseArchive}); err != nil {
		return fmt.Errorf("loading the pause image: %w", err)
	}
	if _, err := client.Status(ctx, PauseImage); err != nil {
		return fmt.Errorf("%s does not hold %s: %w", d.config.PauseArchive, PauseImage, err)
	}
	return nil
}

// discardGRPC silences gRPC's own logger, as containerd's command does.
func discardGRPC() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
}
