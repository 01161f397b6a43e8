// Package bootstrap creates the objects every Atoll cluster has.
//
// RuntimeClasses, the label that lets kube-system use the host, the DNS Service
// and its endpoint, the roles of components that upstream does not define, the
// APIService of resource metrics, the ConfigMap kube-public/atoll, and what
// storage needs. Everything is applied server-side as the field manager "atoll",
// so that a second run changes nothing, what an administrator adds stays, and what
// they remove comes back at the next start. What is theirs to change (the default
// StorageClass, the default Datastore) is only made when it is missing.
//
// The server role calls Apply when the API server is ready. What can go wrong:
// the API server is not done with its own start (namespaces, roles); Apply tries
// again until it is or its context ends.
package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// retryEvery is the pause between two attempts. Objects of a kind that is new have to wait for it.
const retryEvery = 200 * time.Millisecond

// fieldManager owns what Apply sets.
const fieldManager = "atoll"

// Config is what the objects say.
type Config struct {
	Client       *rest.Config
	DNSServiceIP netip.Addr
	// DNSEndpoint and DNSPort are where CoreDNS listens.
	DNSEndpoint netip.Addr
	DNSPort     int
	NodeName    string
	// NodeIP is this host's address, and Portal the port of it that people log in at.
	NodeIP netip.Addr
	Portal int
	// DatastorePath is the directory of the datastore "default".
	DatastorePath string
	Version       string
	// WebhookPort on 127.0.0.1 is where the manager of virtual machines answers, with a certificate of the
	// authority WebhookCA (PEM).
	WebhookPort int
	WebhookCA   []byte
	Logger      *slog.Logger
}

// object is one thing to apply.
type object struct {
	resource schema.GroupVersionResource
	content  *unstructured.Unstructured
	// once: an object that exists is left as it is.
	once bool
	// replace: an object that cannot become as wanted is deleted and made anew.
	replace bool
}

// Apply creates or updates all objects. It retries until everything is in place
// or ctx ends.
func Apply(ctx context.Context, cfg Config) error {
	client, err := dynamic.NewForConfig(cfg.Client)
	if err != nil {
		return fmt.Errorf("bootstrap objects: %w", err)
	}
	todo, err := objects(cfg)
	if err != nil {
		return fmt.Errorf("bootstrap objects: %w", err)
	}
	var last error
	err = wait.PollUntilContextCancel(ctx, retryEvery, true, func(ctx context.Context) (bool, error) {
		var left []object
		last = nil
		for _, o := range todo {
			if err := applyOne(ctx, client, o); err != nil {
				left, last = append(left, o), errors.Join(last, err)
			}
		}
		if len(left) > 0 {
			cfg.Logger.Debug("some bootstrap objects must wait", "left", len(left), "error", last)
		}
		todo = left
		return len(todo) == 0, nil
	})
	if err != nil {
		return fmt.Errorf("bootstrap objects: %w", errors.Join(err, last))
	}
	return nil
}

func applyOne(ctx context.Context, client dynamic.Interface, o object) error {
	name, namespace := o.content.GetName(), o.content.GetNamespace()
	var target dynamic.ResourceInterface = client.Resource(o.resource)
	if namespace != "" {
		target = client.Resource(o.resource).Namespace(namespace)
	}
	if o.once {
		if _, err := target.Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return err
		}
	}
	_, err := target.Apply(ctx, name, o.content, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if o.replace && apierrors.IsInvalid(err) {
		if err = target.Delete(ctx, name, metav1.DeleteOptions{}); err == nil {
			_, err = target.Apply(ctx, name, o.content, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		}
	}
	if err != nil {
		return fmt.Errorf("applying %s %s: %w", o.content.GetKind(), name, err)
	}
	return nil
}

// objects renders the manifests.
func objects(cfg Config) ([]object, error) {
	var out []object
	for _, m := range manifests(cfg) {
		content := make(map[string]any)
		if err := yaml.Unmarshal([]byte(m.text), &content); err != nil {
			return nil, fmt.Errorf("manifest of %s: %w", m.resource.Resource, err)
		}
		definition := &unstructured.Unstructured{Object: content}
		for _, change := range []error{setConversion(cfg, definition), setSelector(definition)} {
			if change != nil {
				return nil, fmt.Errorf("manifest of %s: %w", m.resource.Resource, change)
			}
		}
		out = append(out, object{resource: m.resource, content: definition, once: m.once, replace: m.replace})
	}
	return out, nil
}
