// Package manager runs the controllers and webhooks of the server role in one manager of controller-runtime.
//
// It is not a controller itself: packages below internal/controllers add themselves by a Setup, which the
// server role lists. They share one client, one cache and one webhook port on 127.0.0.1. The identity is
// system:atoll:vm-controller, whose rights are in internal/kube/bootstrap; the webhook configurations and the
// CustomResourceDefinitions are there, too, so this package never writes them.
//
// The cache is kept small: managed fields are dropped, Secrets, ConfigMaps and Events are never cached (a Get asks the
// API server), and of pods only those of virtual machines are.
//
// What can go wrong: the port is busy, the certificate cannot be read, or a kind is not served within a minute.
// All end Run with an error, which ends the server role, which is restarted.
package manager

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/conversion"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Setup adds controllers, indexes and webhooks to the manager.
type Setup func(mgr manager.Manager) error

// Config of the manager.
type Config struct {
	// Kubeconfig is a file with the identity of the controllers.
	Kubeconfig string
	// WebhookPort on 127.0.0.1, with the PEM files of its certificate, which are read again at each handshake.
	WebhookPort int
	CertFile    string
	KeyFile     string
	Setups      []Setup
	// Ready, when set, is called once when caches are filled and the webhooks answer.
	Ready  func()
	Logger *slog.Logger
}

const (
	servedWithin = time.Minute
	retryEvery   = 200 * time.Millisecond
	stopWithin   = 10 * time.Second
)

// Run holds until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	log.SetLogger(newLogger(cfg.Logger))
	mgr, err := newManager(cfg)
	if err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	if err := waitServed(ctx, mgr); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("controllers: %w", err)
	}
	mgr.GetWebhookServer().Register("/convert", conversion.NewWebhookHandler(mgr.GetScheme(), mgr.GetConverterRegistry()))
	for _, setup := range cfg.Setups {
		if err := setup(mgr); err != nil {
			return fmt.Errorf("controllers: %w", err)
		}
	}
	if err := mgr.Add(manager.RunnableFunc(func(ctx context.Context) error { return announce(ctx, mgr, cfg.Ready) })); err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	return nil
}

func newManager(cfg Config) (manager.Manager, error) {
	rest, err := clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig)
	if err != nil {
		return nil, err
	}
	rest.QPS, rest.Burst = -1, 0 // the API server's own priority and fairness does it
	rest.UserAgent = "atoll-controllers"
	scheme, err := NewScheme()
	if err != nil {
		return nil, err
	}
	ours, err := labels.NewRequirement(machinev1.UIDLabel, selection.Exists, nil)
	if err != nil {
		return nil, err
	}
	return manager.New(rest, manager.Options{
		Scheme:                  scheme,
		Logger:                  newLogger(cfg.Logger),
		Metrics:                 server.Options{BindAddress: "0"},
		HealthProbeBindAddress:  "0",
		GracefulShutdownTimeout: new(stopWithin),
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				&corev1.Pod{}: {Label: labels.NewSelector().Add(*ours)},
			},
		},
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{
			&corev1.Secret{}, &corev1.ConfigMap{}, &corev1.Event{}, &eventsv1.Event{},
		}}},
		WebhookServer: webhook.NewServer(webhook.Options{
			Host: "127.0.0.1", Port: cfg.WebhookPort,
			TLSOpts: []func(*tls.Config){func(c *tls.Config) {
				c.MinVersion = tls.VersionTLS12
				c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
					pair, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
					return &pair, err
				}
			}},
		}),
		// One process has one manager, but a test may have several.
		Controller: config.Controller{SkipNameValidation: new(true), MaxConcurrentReconciles: 4},
	})
}

// announce calls ready when the webhooks answer. It is started after the caches.
func announce(ctx context.Context, mgr manager.Manager, ready func()) error {
	if ready == nil {
		return nil
	}
	up := mgr.GetWebhookServer().StartedChecker()
	if err := wait.PollUntilContextCancel(ctx, retryEvery/4, true, func(context.Context) (bool, error) { return up(nil) == nil, nil }); err != nil {
		return nil // ctx ended
	}
	ready()
	return nil
}

// waitServed waits until the API server serves every kind of ours, which it does a moment after the definitions are
// applied.
func waitServed(ctx context.Context, mgr manager.Manager) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, retryEvery, servedWithin, true, func(context.Context) (bool, error) {
		last = nil
		for _, kind := range definedKinds(mgr.GetScheme()) {
			if _, err := mgr.GetRESTMapper().RESTMapping(kind.GroupKind(), kind.Version); err != nil {
				last = err
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
