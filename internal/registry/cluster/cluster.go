// Package cluster is what the registry asks the API server: whose a token is, what an identity may do, and the few
// objects that it has to know of at each request.
//
// The objects come from a cache of its own, which holds the names of namespaces, SupervisorNamespaces, RobotAccounts and
// the RegistryConfiguration. The server role makes it with the identity of the registry and gives it to
// internal/registry. What can go wrong: the API server does not answer; questions fail then, and the cache is as old as
// the loss.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	authnv1 "k8s.io/api/authentication/v1"
	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	crcache "sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/registry"
)

// Config of a Cluster.
type Config struct {
	// Client is the API server and the registry's identity.
	Client *rest.Config
	// Gone, when set, is called with name and uid of a namespace that was deleted. There may be another of the name by then.
	Gone func(namespace, uid string)
}

// Cluster implements registry.Authority and registry.Directory.
type Cluster struct {
	cfg    Config
	client kubernetes.Interface
	live   client.Reader // not from the cache
	cache  crcache.Cache
}

// New makes a cluster that knows nothing before Run.
func New(cfg Config) (*Cluster, error) {
	own := rest.CopyConfig(cfg.Client)
	own.QPS, own.UserAgent = -1, "atoll-registry"
	clientset, err := kubernetes.NewForConfig(own)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, atoll.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
	}
	c, err := crcache.New(own, crcache.Options{Scheme: scheme, DefaultTransform: strip})
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	live, err := client.New(own, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	return &Cluster{cfg: cfg, client: clientset, live: live, cache: c}, nil
}

// strip drops what the registry does not look at.
func strip(obj any) (any, error) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
		m.SetAnnotations(nil)
	}
	if s, ok := obj.(*atoll.SupervisorNamespace); ok {
		if s.Status.Effective != nil {
			s.Spec = *s.Status.Effective
		}
		s.Spec, s.Status = atoll.SupervisorNamespaceSpec{Registry: s.Spec.Registry}, atoll.SupervisorNamespaceStatus{}
	}
	return obj, nil
}

// namespaces is the kind of namespaces as far as the cache holds them.
func namespaces() *metav1.PartialObjectMetadata {
	out := &metav1.PartialObjectMetadata{}
	out.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	return out
}

// Run fills the cache, calls ready, and keeps it up to date until ctx ends.
func (c *Cluster) Run(ctx context.Context, ready func()) error {
	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	done := make(chan error, 1)
	go func() { done <- c.cache.Start(running) }()
	if err := c.watch(running); err != nil {
		fail(err)
		<-done
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("registry: %w", err)
	}
	ready()
	if err := <-done; err != nil && ctx.Err() == nil {
		return fmt.Errorf("registry: %w", err)
	}
	return nil
}

// watch waits until everything that the registry looks at is there.
func (c *Cluster) watch(ctx context.Context) error {
	informer, err := c.cache.GetInformer(ctx, namespaces())
	if err != nil {
		return err
	}
	if c.cfg.Gone != nil {
		_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			if m, ok := obj.(metav1.Object); ok {
				c.cfg.Gone(m.GetName(), string(m.GetUID()))
			}
		}})
		if err != nil {
			return err
		}
	}
	for _, kind := range []client.Object{&atoll.SupervisorNamespace{}, &atoll.RobotAccount{}, &atoll.RegistryConfiguration{}} {
		if _, err := c.cache.GetInformer(ctx, kind); err != nil {
			return err
		}
	}
	if !c.cache.WaitForCacheSync(ctx) {
		return errors.New("the objects of the registry could not be read")
	}
	return nil
}

// get reads an object of the cache; it is not there before the cache is filled.
func (c *Cluster) get(namespace, name string, into client.Object) bool {
	ctx, cancel := context.WithTimeout(context.Background(), askWithin)
	defer cancel()
	return c.cache.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, into) == nil
}

// Namespace implements registry.Directory.
func (c *Cluster) Namespace(name string) (string, bool) {
	ns := namespaces()
	if !c.get("", name, ns) || ns.DeletionTimestamp != nil {
		return "", false
	}
	return string(ns.UID), true
}

// Exists implements registry.Directory. When in doubt, it does.
func (c *Cluster) Exists(namespace string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), askWithin)
	defer cancel()
	return !apierrors.IsNotFound(c.cache.Get(ctx, client.ObjectKey{Name: namespace}, namespaces()))
}

// Settings implements registry.Directory.
func (c *Cluster) Settings(project string) atoll.NamespaceRegistry {
	var ns atoll.SupervisorNamespace
	if !c.get("", project, &ns) {
		return atoll.NamespaceRegistry{}
	}
	return ns.Spec.Registry
}

// Robot implements registry.Directory.
func (c *Cluster) Robot(namespace, name string) (*atoll.RobotAccount, bool) {
	var robot atoll.RobotAccount
	return &robot, c.get(namespace, name, &robot)
}

// Configuration implements registry.Directory.
func (c *Cluster) Configuration() atoll.RegistryConfigurationSpec {
	var configuration atoll.RegistryConfiguration
	c.get("", atoll.RegistryConfigurationName, &configuration)
	return configuration.Spec
}

// askWithin is how long the API server may take to answer.
const askWithin = 25 * time.Second

// Review implements registry.Authority.
func (c *Cluster) Review(ctx context.Context, token, audience string) (registry.Identity, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	review := &authnv1.TokenReview{Spec: authnv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	answer, err := c.client.AuthenticationV1().TokenReviews().Create(ctx, review, metav1.CreateOptions{})
	if apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
		return registry.Identity{}, false, nil
	}
	if err != nil {
		return registry.Identity{}, false, fmt.Errorf("asking whose a token is: %w", err)
	}
	st := answer.Status
	if !st.Authenticated || !slices.Contains(st.Audiences, audience) {
		return registry.Identity{}, false, nil
	}
	id := registry.Identity{Name: st.User.Username, UID: st.User.UID, Groups: st.User.Groups}
	return id, true, nil
}

// Allowed implements registry.Authority.
func (c *Cluster) Allowed(ctx context.Context, id registry.Identity, verb, namespace string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	extra := make(map[string]authzv1.ExtraValue, len(id.Extra))
	for k, v := range id.Extra {
		extra[k] = v
	}
	review := &authzv1.SubjectAccessReview{Spec: authzv1.SubjectAccessReviewSpec{
		User: id.Name, UID: id.UID, Groups: id.Groups, Extra: extra,
		ResourceAttributes: &authzv1.ResourceAttributes{
			Namespace: namespace, Verb: verb, Group: atoll.RegistryGroup, Resource: atoll.RegistryRepositories,
		},
	}}
	answer, err := c.client.AuthorizationV1().SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return false, fmt.Errorf("asking what %s may do: %w", id.Name, err)
	}
	return answer.Status.Allowed && !answer.Status.Denied, nil
}

// RobotHash implements registry.Authority.
func (c *Cluster) RobotHash(ctx context.Context, namespace, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	var robot atoll.RobotAccount
	err := c.live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &robot)
	if err != nil && !apierrors.IsNotFound(err) {
		return "", fmt.Errorf("asking for robot account %s/%s: %w", namespace, name, err)
	}
	return robot.Status.SecretHash, nil
}
