package identity

import (
	"context"

	"atoll.dev/atoll/internal/identity/providers"
)

// Issuers are the foreign issuers that people may log in at.
type Issuers struct{ service *Service }

// Issuers returns them; there are none until Run has called ready.
func (s *Service) Issuers() Issuers { return Issuers{s} }

// Get returns one by name.
func (i Issuers) Get(name string) (providers.Provider, bool) {
	if !i.service.isStarted() {
		return providers.Provider{}, false
	}
	return i.service.providers.Get(name)
}

// List returns all, sorted by name.
func (i Issuers) List() []providers.Provider {
	if !i.service.isStarted() {
		return nil
	}
	return i.service.providers.List()
}

// Secret is that of the client at an issuer.
func (i Issuers) Secret(ctx context.Context, p providers.Provider) (string, error) {
	return i.service.providers.ClientSecret(ctx, p.Object)
}
