package server

import (
	"context"
	"net"
	"strconv"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/server/portal"
)

// routes are all that the portal serves. Patterns are those of http.ServeMux; what is most specific answers.
func (s *Server) routes(people *identity.Service) ([]portal.Route, error) {
	routes, err := s.loginRoutes(people)
	return append(routes, s.registryRoutes()...), err
}

// portalRunner serves people and their tools at the node's addresses.
func (s *Server) portalRunner(people *identity.Service) func(context.Context) error {
	return func(ctx context.Context) error { return s.runPortal(ctx, people) }
}

func (s *Server) runPortal(ctx context.Context, people *identity.Service) error {
	routes, err := s.routes(people)
	if err != nil {
		return err
	}
	p, err := portal.New(portal.Config{
		Address:  net.JoinHostPort(s.cfg.BindAddress.String(), strconv.Itoa(s.cfg.Ports.Portal)),
		CertFile: s.files.Cert(pki.Portal),
		KeyFile:  s.files.Key(pki.Portal),
		CAFile:   s.files.CACert(pki.ClusterCA),
		Routes:   routes,
		Context:  identity.WithSource,
		Logger:   s.cfg.Logger,
	})
	if err != nil {
		return err
	}
	return p.Run(ctx)
}
