package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/tools/clientcmd"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/projectlibrary"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/registry"
	"atoll.dev/atoll/internal/registry/cluster"
	"atoll.dev/atoll/internal/server/portal"
)

// imageRegistry is the registry of images and what it knows of the cluster.
type imageRegistry struct {
	*registry.Registry
	cluster *cluster.Cluster
	changes projectlibrary.Changes
}

// newRegistry opens the registry. It knows nobody before it runs.
func (s *Server) newRegistry(people *identity.Service) (*imageRegistry, error) {
	registry.BridgeLogs(s.cfg.Logger)
	client, err := clientcmd.BuildConfigFromFlags("", s.files.Kubeconfig(pki.Registry))
	if err != nil {
		return nil, fmt.Errorf("configuring the registry: %w", err)
	}
	r := &imageRegistry{}
	r.cluster, err = cluster.New(cluster.Config{Client: client, Gone: func(namespace, uid string) {
		if err := r.Deleted(namespace, uid); err != nil {
			s.cfg.Logger.Error("images of a namespace that was deleted stay", "namespace", namespace, "error", err)
		}
	}})
	if err != nil {
		return nil, err
	}
	r.Registry, err = registry.New(registry.Config{
		Dir: s.cfg.RegistryDir, Authority: r.cluster, Directory: r.cluster, Logger: s.cfg.Logger, Changed: r.changes.Tell,
		People: registryPeople{people},
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// projects are the registry's projects as the controller of their libraries sees them.
type projects struct{ *registry.Registry }

// Disks implements projectlibrary.Registry.
func (p projects) Disks(ctx context.Context, project string) ([]projectlibrary.Disk, int, error) {
	found, unseen, err := p.Registry.Disks(ctx, project)
	if errors.Is(err, registry.ErrExternal) {
		err = projectlibrary.ErrExternal
	}
	out := make([]projectlibrary.Disk, 0, len(found))
	for _, d := range found {
		out = append(out, projectlibrary.Disk{
			Repository: d.Repository, Tag: d.Tag, Digest: d.Digest, Pushed: d.Pushed, Firmware: d.Firmware, Description: d.Description,
			OS: imageregistry.OSInfo{ID: d.OSID, Type: d.OSType, Version: d.OSVersion},
		})
	}
	return out, unseen, err
}

// registryPeople are people as the registry knows them.
type registryPeople struct{ people *identity.Service }

// Authenticate implements registry.People.
func (r registryPeople) Authenticate(ctx context.Context, name, password string) (registry.Identity, error) {
	p, err := r.people.Authenticate(ctx, name, password)
	switch {
	case err == nil:
		return registry.Identity{Name: p.Name, UID: p.UID, Groups: p.Groups, Session: p.Session, Generation: p.Generation}, nil
	case errors.Is(err, identity.ErrBusy):
		err = registry.ErrBusy
	case !errors.Is(err, identity.ErrRefused) && !errors.Is(err, identity.ErrNoSession) && !errors.Is(err, identity.ErrMustChange) && !errors.As(err, new(identity.LockedError)):
		err = errors.Join(registry.ErrUnavailable, err)
	}
	return registry.Identity{}, err
}

// Stands implements registry.People.
func (r registryPeople) Stands(ctx context.Context, id registry.Identity) (registry.Identity, bool, error) {
	p, err := r.people.Stands(ctx, identity.Person{Name: id.Name, UID: id.UID, Groups: id.Groups, Session: id.Session, Generation: id.Generation})
	if errors.Is(err, identity.ErrNoSession) {
		return id, false, nil
	}
	id.Groups = p.Groups
	return id, err == nil, err
}

// Known implements registry.People.
func (r registryPeople) Known(ctx context.Context, name string) bool {
	known, err := r.people.Exists(ctx, name)
	return known && err == nil
}

// run holds until ctx ends.
func (r *imageRegistry) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	known := make(chan struct{})
	group.Go(func() error { return r.cluster.Run(ctx, func() { close(known) }) })
	group.Go(func() error {
		select {
		case <-known:
			return r.Registry.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	return group.Wait()
}

// registryRoutes are what the portal serves of the registry.
func (s *Server) registryRoutes() []portal.Route {
	return []portal.Route{
		{Pattern: "/v2/", Handler: s.images, Stream: true},
		{Pattern: "/registry/", Handler: s.images, Stream: true},
	}
}

// registryAddress is what images name the registry by, beside registry.atoll.local.
func (s *Server) registryAddress() string {
	if s.cfg.Ports.Portal == 443 {
		return s.cfg.NodeIP.String()
	}
	return net.JoinHostPort(s.cfg.NodeIP.String(), strconv.Itoa(s.cfg.Ports.Portal))
}
