package server

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/tools/clientcmd"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/registry"
	"atoll.dev/atoll/internal/registry/cluster"
)

// imageRegistry is the registry of images and what it knows of the cluster.
type imageRegistry struct {
	*registry.Registry
	cluster *cluster.Cluster
}

// newRegistry opens the registry; it serves when run has filled its cache.
func (s *Server) newRegistry(authenticate func(ctx context.Context, name, password string) (registry.Identity, error)) (*imageRegistry, error) {
	s.quietDistribution()
	client, err := clientcmd.BuildConfigFromFlags("", s.files.Kubeconfig(pki.Registry))
	if err != nil {
		return nil, fmt.Errorf("configuring the registry: %w", err)
	}
	r := &imageRegistry{}
	if r.cluster, err = cluster.New(cluster.Config{Client: client, Gone: func(namespace string) {
		if err := r.Forget(namespace); err != nil {
			s.cfg.Logger.Error("images of a namespace that was deleted stay", "namespace", namespace, "error", err)
		}
	}}); err != nil {
		return nil, err
	}
	r.Registry, err = registry.New(registry.Config{
		Dir: s.cfg.RegistryDir, Authority: r.cluster, Directory: r.cluster, Authenticate: authenticate, Logger: s.cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// run holds until ctx ends, and closes ready when the registry can be asked.
func (r *imageRegistry) run(ready chan<- struct{}) func(context.Context) error {
	return func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		known := make(chan struct{})
		group.Go(func() error {
			return r.cluster.Run(ctx, func() {
				close(known)
				close(ready)
			})
		})
		group.Go(func() error {
			select {
			case <-known:
				return r.Run(ctx)
			case <-ctx.Done():
				return nil
			}
		})
		return group.Wait()
	}
}

// quietDistribution has distribution log what goes wrong only, and into the server's log.
func (s *Server) quietDistribution() {
	logrus.SetLevel(logrus.ErrorLevel)
	logrus.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	logrus.SetOutput(logWriter(func(line string) {
		level := slog.LevelDebug // what clients do wrong
		if strings.Contains(line, "err.code=unknown") || strings.Contains(line, "level=fatal") {
			level = slog.LevelWarn
		}
		s.cfg.Logger.Log(context.Background(), level, "distribution", "said", line)
	}))
}

// logWriter takes one line per call.
type logWriter func(line string)

// Write implements io.Writer.
func (w logWriter) Write(line []byte) (int, error) {
	w(strings.TrimSpace(string(line)))
	return len(line), nil
}
