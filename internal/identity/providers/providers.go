// Package providers hands the issuers that IdentityProviders name to the API server.
//
// The API server reads them from a file, which it looks at again whenever it changes. One bad issuer in it would keep
// it from taking up any change, so an issuer is only written when upstream's own validation takes it and it answers;
// what is wrong is said in the object's condition Ready. An issuer that stops answering stays in the file as long as
// nothing else changes. The order is that of age: who comes later cannot take a domain or an issuer away.
//
// The users of an issuer are sso:NAME@DOMAIN and nothing else, whatever their tokens say (see authenticator), and
// atoll.local is nobody's domain but that of local users.
//
// internal/identity runs it. What can go wrong: the file cannot be written, which is tried again.
package providers

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// Config of a Controller.
type Config struct {
	Client client.Client
	// Reader is the cache of IdentityProviders.
	Reader cache.Cache
	// File is read by the API server; Base is what is in it without any issuer.
	File   string
	Base   string
	Logger *slog.Logger
}

// lookAgain is how often issuers that do not answer are asked again, and the file is compared.
const lookAgain = 30 * time.Second

// maxProviders is what the API server takes.
const maxProviders = 64

// Reasons of the condition Ready.
const (
	reasonAccepted     = "Accepted"
	reasonInvalid      = "InvalidConfiguration"
	reasonDomainTaken  = "DomainTaken"
	reasonIssuerTaken  = "IssuerTaken"
	reasonUnreachable  = "IssuerUnreachable"
	reasonNoSecret     = "ClientSecretMissing"
	reasonTooMany      = "TooManyProviders"
	messageTakesAWhile = "tokens of %s for the client %s are accepted; a change takes up to 20 seconds"
)

// Provider is an issuer that people may log in at.
type Provider struct {
	Object    *api.IdentityProvider
	Endpoints Endpoints
}

// Controller keeps the file. Make one with New.
type Controller struct {
	cfg     Config
	changed chan struct{}

	mu     sync.Mutex
	usable map[string]Provider // by name
}

// New makes a controller.
func New(cfg Config) *Controller {
	return &Controller{cfg: cfg, changed: make(chan struct{}, 1), usable: map[string]Provider{}}
}

// Handler must be registered with an informer of IdentityProviders.
func (c *Controller) Handler() toolscache.ResourceEventHandler {
	wake := func() {
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}
	return toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { wake() },
		UpdateFunc: func(old, now any) {
			before, ok1 := old.(*api.IdentityProvider)
			after, ok2 := now.(*api.IdentityProvider)
			if !ok1 || !ok2 || before.Generation != after.Generation {
				wake()
			}
		},
		DeleteFunc: func(any) { wake() },
	}
}

// Get returns a provider that people may log in at.
func (c *Controller) Get(name string) (Provider, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.usable[name]
	return p, ok
}

// List returns all of them, sorted by name.
func (c *Controller) List() []Provider {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Provider
	for _, p := range c.usable {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Provider) int { return strings.Compare(a.Object.Name, b.Object.Name) })
	return out
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	if !c.cfg.Reader.WaitForCacheSync(ctx) {
		return nil
	}
	ticker := time.NewTicker(lookAgain)
	defer ticker.Stop()
	for {
		if err := c.sync(ctx); err != nil && ctx.Err() == nil {
			c.cfg.Logger.Error("handing identity providers to the API server failed", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-c.changed:
		}
	}
}

// verdict is what was found out about one provider.
type verdict struct {
	provider *api.IdentityProvider
	reason   string
	message  string
	// valid: could be in the file. answers: the issuer does.
	valid, answers bool
	endpoints      Endpoints
}

// sync looks at all providers and brings file, conditions and the list of usable ones up to date.
func (c *Controller) sync(ctx context.Context) error {
	var list api.IdentityProviderList
	if err := c.cfg.Reader.List(ctx, &list); err != nil {
		return fmt.Errorf("listing identity providers: %w", err)
	}
	verdicts := c.judge(list.Items)
	var wait sync.WaitGroup
	for _, v := range verdicts {
		if v.valid {
			wait.Go(func() { c.probe(ctx, v) })
		}
	}
	wait.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := c.write(verdicts); err != nil {
		return err
	}
	usable := map[string]Provider{}
	for _, v := range verdicts {
		if v.valid && v.answers {
			usable[v.provider.Name] = Provider{Object: v.provider, Endpoints: v.endpoints}
		}
	}
	c.mu.Lock()
	c.usable = usable
	c.mu.Unlock()
	for _, v := range verdicts {
		if err := c.report(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

// judge looks at the objects alone, the oldest first.
func (c *Controller) judge(items []api.IdentityProvider) []*verdict {
	slices.SortFunc(items, func(a, b api.IdentityProvider) int {
		if age := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); age != 0 {
			return age
		}
		return strings.Compare(a.Name, b.Name)
	})
	domains, issuers := map[string]string{}, map[string]string{}
	var out []*verdict
	count := 0
	for i := range items {
		p := &items[i]
		v := &verdict{provider: p}
		out = append(out, v)
		if err := check(c.cfg.Base, p); err != nil {
			v.reason, v.message = reasonInvalid, err.Error()
			continue
		}
		if other := domains[p.Spec.Domain]; other != "" {
			v.reason, v.message = reasonDomainTaken, fmt.Sprintf("spec.domain: %s is that of IdentityProvider %s; choose another", p.Spec.Domain, other)
			continue
		}
		if other := issuers[p.Spec.IssuerURL]; other != "" {
			v.reason, v.message = reasonIssuerTaken, fmt.Sprintf("spec.issuerURL: %s is that of IdentityProvider %s", p.Spec.IssuerURL, other)
			continue
		}
		if count++; count > maxProviders {
			v.reason, v.message = reasonTooMany, fmt.Sprintf("there are more than %d identity providers; remove one", maxProviders)
			continue
		}
		domains[p.Spec.Domain], issuers[p.Spec.IssuerURL] = p.Name, p.Name
		v.valid = true
	}
	return out
}

// probe asks the issuer and looks for the client's secret.
func (c *Controller) probe(ctx context.Context, v *verdict) {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	var err error
	if v.endpoints, err = discover(ctx, v.provider); err != nil {
		v.reason, v.message = reasonUnreachable, "the issuer cannot be used: "+err.Error()
		return
	}
	v.answers = true
	if _, err := c.ClientSecret(ctx, v.provider); err != nil {
		v.reason, v.message = reasonNoSecret, err.Error()
		return
	}
	v.reason, v.message = reasonAccepted, fmt.Sprintf(messageTakesAWhile, v.provider.Spec.IssuerURL, v.provider.Spec.ClientID)
}

// ClientSecret reads the secret of a provider's client, "" when it has none.
func (c *Controller) ClientSecret(ctx context.Context, p *api.IdentityProvider) (string, error) {
	ref := p.Spec.ClientSecretRef
	if ref == nil {
		return "", nil
	}
	secret := &corev1.Secret{}
	if err := c.cfg.Client.Get(ctx, client.ObjectKey{Namespace: api.IdentityNamespace, Name: ref.Name}, secret); err != nil {
		return "", fmt.Errorf("spec.clientSecretRef: reading Secret %s in namespace %s: %w", ref.Name, api.IdentityNamespace, err)
	}
	value := strings.TrimSpace(string(secret.Data[api.ClientSecretKey]))
	if value == "" {
		return "", fmt.Errorf("spec.clientSecretRef: Secret %s in namespace %s has no entry %s", ref.Name, api.IdentityNamespace, api.ClientSecretKey)
	}
	return value, nil
}

// write brings the file up to date. What the API server has and only does not answer now is no reason to change it.
func (c *Controller) write(verdicts []*verdict) error {
	var valid, answering []*api.IdentityProvider
	for _, v := range verdicts {
		if v.valid {
			valid = append(valid, v.provider)
		}
		if v.valid && v.answers {
			answering = append(answering, v.provider)
		}
	}
	have, err := os.ReadFile(c.cfg.File)
	if err != nil {
		return fmt.Errorf("reading the issuers of the API server: %w", err)
	}
	all, err := render(c.cfg.Base, valid)
	if err != nil {
		return err
	}
	if bytes.Equal(have, all) {
		return nil
	}
	text, err := render(c.cfg.Base, answering)
	if err != nil {
		return err
	}
	if err := validate(text); err != nil {
		return fmt.Errorf("the issuers together are refused: %w", err)
	}
	wrote, err := atomicfile.WriteIfChanged(c.cfg.File, text, 0o600)
	if err != nil {
		return fmt.Errorf("writing the issuers of the API server: %w", err)
	}
	if wrote {
		c.cfg.Logger.Info("identity providers handed to the API server", "count", len(answering))
	}
	return nil
}

// report writes the condition when it says something new.
func (c *Controller) report(ctx context.Context, v *verdict) error {
	p := v.provider.DeepCopy()
	before := p.DeepCopy()
	status := metav1.ConditionFalse
	if v.reason == reasonAccepted {
		status = metav1.ConditionTrue
	}
	p.Status.ObservedGeneration = p.Generation
	changed := meta.SetStatusCondition(&p.Status.Conditions, metav1.Condition{
		Type: api.IdentityProviderReady, Status: status, Reason: v.reason, Message: cut(v.message), ObservedGeneration: p.Generation,
	})
	if !changed && before.Status.ObservedGeneration == p.Generation {
		return nil
	}
	if err := c.cfg.Client.Status().Patch(ctx, p, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("reporting on IdentityProvider %s: %w", p.Name, err)
	}
	return nil
}

func cut(text string) string {
	const most = 4096
	if len(text) > most {
		return text[:most]
	}
	return text
}
