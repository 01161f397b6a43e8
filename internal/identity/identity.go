// Package identity knows the people who use a cluster: it checks passwords, keeps sessions, tells the API server who
// a token belongs to, and hands foreign issuers (IdentityProvider) to it.
//
// To Kubernetes a local user is sso:NAME@atoll.local in groups sso:GROUP@atoll.local, whatever the objects are
// called, so that no User or Group can be one of Kubernetes' own. The API server asks it by a webhook on 127.0.0.1
// about each token that it does not know itself; the answer comes from memory, which watches keep up to date, so that
// a user who is disabled, deleted, revoked or taken out of a group is so within seconds. Rights are none of its
// business: those are RoleBindings.
//
// Guessing passwords is bounded in four ways: each user is locked for a growing time after some failures (kept in the
// User's status), each source address likewise (kept in memory), few passwords are compared at a time, and a refusal
// takes half a second, known user or not. What is refused is refused with one text.
//
// The server role runs it and serves internal/identity/login at the portal; the registry calls Authenticate, and
// Stands at each request. Its own identity is system:atoll:identity, the only one besides administrators that may read the
// Secrets in atoll-system.
//
// What can go wrong: the API server does not answer, so nobody can log in, while sessions go on; the webhook's port
// is busy, which ends Run.
package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/attempts"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
	"atoll.dev/atoll/internal/identity/providers"
	"atoll.dev/atoll/internal/identity/sessions"
	"atoll.dev/atoll/internal/identity/token"
)

// Config of a Service.
type Config struct {
	// Client is how it reaches the API server, as itself.
	Client *rest.Config
	// WebhookAddress on 127.0.0.1, with the PEM files of its certificate.
	WebhookAddress    string
	CertFile, KeyFile string
	// AuthenticationFile is what the API server reads IdentityProviders from, AuthenticationBase what is in it
	// without any.
	AuthenticationFile string
	AuthenticationBase string
	Logger             *slog.Logger
	// Now is the clock, time.Now when nil.
	Now func() time.Time
}

const (
	servedWithin = time.Minute
	retryEvery   = 200 * time.Millisecond
	sweepEvery   = time.Minute

	// maxSources and maxStrangers bound what is remembered of failures.
	maxSources   = 10000
	maxStrangers = 10000
	// stripes is how many users can log in at the same time; attempts for one user come one after the other.
	stripes = 64
)

// sourceRule locks addresses. Many people may share one.
func sourceRule() attempts.Rule {
	return attempts.Rule{After: 20, First: 30 * time.Second, Most: 15 * time.Minute}
}

// Service knows people. Make one with New.
type Service struct {
	cfg       Config
	client    client.Client
	cache     cache.Cache
	directory *directory.Directory
	sessions  *sessions.Store
	providers *providers.Controller
	comparer  *password.Comparer
	// sources are addresses, strangers names without a User.
	sources   *attempts.Table
	strangers *attempts.Table
	gate      attempts.Gate
	turns     [stripes]chan struct{}
	// signer is set when started is closed.
	signer  *token.Signer
	started chan struct{}
}

// New makes a service and talks to nobody.
func New(cfg Config) (*Service, error) {
	if cfg.Client == nil || cfg.Logger == nil || cfg.WebhookAddress == "" || cfg.AuthenticationFile == "" {
		return nil, errors.New("identity: client, logger, address of the webhook and authentication file must be set")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	comparer, err := password.NewComparer(runtime.GOMAXPROCS(0) / 2)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	s := &Service{
		cfg: cfg, comparer: comparer, started: make(chan struct{}),
		sources:   attempts.New(sourceRule(), maxSources, cfg.Now),
		strangers: attempts.New(userRule(policy{}), maxStrangers, cfg.Now),
	}
	for i := range s.turns {
		s.turns[i] = make(chan struct{}, 1)
	}
	return s, nil
}

// Run works until ctx ends. ready is called when people can log in.
func (s *Service) Run(ctx context.Context, ready func()) error {
	if err := s.prepare(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("identity: %w", err)
	}
	running, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, 3)
	for _, run := range []func(context.Context) error{s.cache.Start, s.begin(ready), s.providers.Run} {
		go func() { failed <- run(running) }()
	}
	var first error
	for range cap(failed) {
		if err := <-failed; err != nil && first == nil && ctx.Err() == nil {
			first = fmt.Errorf("identity: %w", err)
		}
		stop()
	}
	return first
}

// prepare makes client and cache when the API server serves our kinds.
func (s *Service) prepare(ctx context.Context) error {
	kinds := apiruntime.NewScheme()
	for _, add := range []func(*apiruntime.Scheme) error{scheme.AddToScheme, api.AddToScheme} {
		if err := add(kinds); err != nil {
			return err
		}
	}
	config := rest.CopyConfig(s.cfg.Client)
	config.QPS, config.UserAgent = -1, "atoll-identity"
	c, err := client.New(config, client.Options{Scheme: kinds})
	if err != nil {
		return err
	}
	if err := waitServed(ctx, c); err != nil {
		return err
	}
	labelled, err := labels.NewRequirement(sessions.Label, selection.Exists, nil)
	if err != nil {
		return err
	}
	s.cache, err = cache.New(config, cache.Options{
		Scheme: kinds, Mapper: c.RESTMapper(), DefaultTransform: cache.TransformStripManagedFields(), ReaderFailOnMissingInformer: true,
		ByObject: map[client.Object]cache.ByObject{&corev1.Secret{}: {
			Namespaces: map[string]cache.Config{api.IdentityNamespace: {}}, Label: labels.NewSelector().Add(*labelled),
		}},
	})
	if err != nil {
		return err
	}
	s.client = c
	s.directory = directory.New(s.cache)
	s.sessions = sessions.New(c, s.cfg.Now, s.cfg.Logger)
	s.providers = providers.New(providers.Config{
		Client: c, Reader: s.cache, File: s.cfg.AuthenticationFile, Base: s.cfg.AuthenticationBase, Logger: s.cfg.Logger,
	})
	return s.watch(ctx)
}

// watch adds the informers. They are filled when the cache has started.
func (s *Service) watch(ctx context.Context) error {
	for _, object := range []client.Object{&api.User{}, &api.Group{}, &api.IdentityProvider{}, &corev1.Secret{}} {
		informer, err := s.cache.GetInformer(ctx, object, cache.BlockUntilSynced(false))
		if err != nil {
			return err
		}
		switch object.(type) {
		case *corev1.Secret:
			_, err = informer.AddEventHandler(s.sessions.Handler())
		case *api.IdentityProvider:
			_, err = informer.AddEventHandler(s.providers.Handler())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// begin returns what waits for the caches, gets the key and answers the webhook.
func (s *Service) begin(ready func()) func(context.Context) error {
	return func(ctx context.Context) error {
		if !s.cache.WaitForCacheSync(ctx) {
			return nil
		}
		key, err := s.key(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if s.signer, err = token.NewSigner(key); err != nil {
			return fmt.Errorf("Secret %s/%s: %w; delete it and start the server again, everybody must log in anew then", api.IdentityNamespace, keySecret, err)
		}
		close(s.started)
		go s.sweep(ctx)
		return s.serveWebhook(ctx, ready)
	}
}

// sweep removes expired sessions.
func (s *Service) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			s.sessions.Sweep(ctx)
		}
	}
}

const (
	keySecret = "session-key"
	keyEntry  = "key"
)

// key reads the key that sessions are signed with, and makes it once.
func (s *Service) key(ctx context.Context) ([]byte, error) {
	var key []byte
	err := wait.PollUntilContextTimeout(ctx, retryEvery, servedWithin, true, func(ctx context.Context) (bool, error) {
		secret := &corev1.Secret{}
		secret.Namespace, secret.Name = api.IdentityNamespace, keySecret
		err := s.client.Get(ctx, client.ObjectKeyFromObject(secret), secret)
		if apierrors.IsNotFound(err) {
			secret.Data = map[string][]byte{keyEntry: token.NewKey()}
			err = s.client.Create(ctx, secret)
		}
		if err != nil {
			s.cfg.Logger.Debug("the key of sessions cannot be had yet", "error", err)
			return false, nil
		}
		key = secret.Data[keyEntry]
		return true, nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the key of sessions: %w", err)
	}
	return key, nil
}

// waitServed waits until the API server serves our kinds, which it does a moment after they are defined.
func waitServed(ctx context.Context, c client.Client) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, retryEvery, servedWithin, true, func(context.Context) (bool, error) {
		for _, kind := range []string{"User", "Group", "IdentityProvider"} {
			if _, last = c.RESTMapper().RESTMapping(api.GroupVersion().WithKind(kind).GroupKind(), api.Version); last != nil {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return errors.Join(errors.New("waiting for the kinds to be served"), err, last)
	}
	return nil
}

// sourceKey is where the source of a request is in its context.
type sourceKey struct{}

// WithSource returns a context that says which address a login comes from.
func WithSource(ctx context.Context, addr netip.Addr) context.Context {
	return context.WithValue(ctx, sourceKey{}, addr)
}

// sourceOf is the address in a context, the zero address if there is none.
func sourceOf(ctx context.Context) netip.Addr {
	addr, _ := ctx.Value(sourceKey{}).(netip.Addr)
	return addr
}
