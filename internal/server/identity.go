package server

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"

	"k8s.io/client-go/tools/clientcmd"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/login"
	"atoll.dev/atoll/internal/kube/apiserver"
	"atoll.dev/atoll/internal/server/portal"
)

// newIdentity makes what knows people. The API server asks it, and it asks the API server, so it is made when the
// certificates are there and run when the API server is.
func (s *Server) newIdentity() (*identity.Service, error) {
	client, err := clientcmd.BuildConfigFromFlags("", s.files.Kubeconfig(pki.Identity))
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return identity.New(identity.Config{
		Client:             client,
		WebhookAddress:     net.JoinHostPort("127.0.0.1", strconv.Itoa(s.cfg.Ports.Identity)),
		CertFile:           s.files.Cert(pki.IdentityWebhook),
		KeyFile:            s.files.Key(pki.IdentityWebhook),
		AuthenticationFile: apiserver.AuthenticationFile(s.cfg.StateDir),
		AuthenticationBase: apiserver.AuthenticationConfig,
		Logger:             s.cfg.Logger,
	})
}

// identityRunner runs it and closes ready when people can log in.
func identityRunner(people *identity.Service, ready chan<- struct{}) func(context.Context) error {
	return func(ctx context.Context) error { return people.Run(ctx, func() { close(ready) }) }
}

// loginRoutes are what the portal serves to people.
func (s *Server) loginRoutes(people *identity.Service) ([]portal.Route, error) {
	authority, err := os.ReadFile(s.files.CACert(pki.ClusterCA))
	if err != nil {
		return nil, fmt.Errorf("portal: %w", err)
	}
	names := append([]string{s.cfg.NodeName, pki.RegistryHost, "localhost", "127.0.0.1"}, s.cfg.ExtraSANs...)
	addrs, err := hostAddrs()
	if err != nil {
		return nil, fmt.Errorf("portal: %w", err)
	}
	for _, a := range addrs {
		names = append(names, a.String())
	}
	handler := login.New(login.Config{
		People: people, Issuers: people.Issuers(), Banner: people.Banner,
		Host: s.cfg.NodeIP.String(), Names: names, APIPort: s.cfg.Ports.API, PortalPort: s.cfg.Ports.Portal,
		CA: authority, Version: s.cfg.Version, Logger: s.cfg.Logger,
	})
	var out []portal.Route
	for pattern, answer := range handler.Routes() {
		out = append(out, portal.Route{Pattern: pattern, Handler: answer})
	}
	return out, nil
}
