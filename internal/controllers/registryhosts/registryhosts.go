// Package registryhosts follows the RegistryConfiguration on a host, whose containerd it configures through Apply.
//
// It has the identity of the node and watches one object. The agent role runs it; what Apply writes is the business of
// internal/registry/hosts. What can go wrong: Apply fails, which is logged and tried again; the API server cannot be
// reached, and the host goes on with what it has.
package registryhosts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Config of a Follower.
type Config struct {
	Client *rest.Config
	// Apply makes the host do what the configuration says; the zero value is what there is without one.
	Apply  func(spec atoll.RegistryConfigurationSpec) error
	Logger *slog.Logger
}

// Follower follows the configuration.
type Follower struct {
	cfg     Config
	client  dynamic.Interface
	changed chan struct{}
}

const (
	retryAfter = 10 * time.Second
	// again is when everything is written again, in case somebody has removed it.
	again = 10 * time.Minute
)

// New checks the configuration.
func New(cfg Config) (*Follower, error) {
	if cfg.Apply == nil || cfg.Logger == nil {
		return nil, errors.New("registry hosts: Apply and Logger must be set")
	}
	client, err := dynamic.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("registry hosts: %w", err)
	}
	return &Follower{cfg: cfg, client: client, changed: make(chan struct{}, 1)}, nil
}

// Run holds until ctx ends.
func (f *Follower) Run(ctx context.Context) error {
	informers := dynamicinformer.NewFilteredDynamicSharedInformerFactory(f.client, again, metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, atoll.RegistryConfigurationName).String()
	})
	informer := informers.ForResource(atoll.RegistryConfigurations()).Informer()
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { f.wake() }, UpdateFunc: func(any, any) { f.wake() }, DeleteFunc: func(any) { f.wake() },
	}); err != nil {
		return fmt.Errorf("registry hosts: %w", err)
	}
	informers.Start(ctx.Done())
	defer informers.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil
	}
	for {
		wait := again
		if err := f.apply(informer.GetStore()); err != nil {
			f.cfg.Logger.Warn("registries cannot be configured", "error", err)
			wait = retryAfter
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.changed:
		case <-time.After(wait):
		}
	}
}

func (f *Follower) wake() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

func (f *Follower) apply(store cache.Store) error {
	var configuration atoll.RegistryConfiguration
	obj, there, err := store.GetByKey(atoll.RegistryConfigurationName)
	if err != nil {
		return err
	}
	if u, ok := obj.(*unstructured.Unstructured); there && ok {
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &configuration); err != nil {
			return fmt.Errorf("reading RegistryConfiguration %s: %w", atoll.RegistryConfigurationName, err)
		}
	}
	return f.cfg.Apply(configuration.Spec)
}
