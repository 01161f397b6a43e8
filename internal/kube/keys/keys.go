// Package keys reads which key-encryption key encrypts what, and the keys.
//
// A key provider is a Secret in the namespace atoll-keys. Each entry of it is a key of 32 bytes, whose id is the
// entry's name; the one whose name sorts last is used where nobody names one. A class of encryption is either
// the name of a provider, or namespace/name of an EncryptionClass, which names a provider and perhaps a key.
// Claims says which class a PersistentVolumeClaim asks for. Nothing is kept: all of it is read when it is
// needed, which is seldom.
//
// The agent's storage part is the caller, and the only identity besides administrators that may read the
// namespace of the Secrets. What can go wrong: an object or a key is missing, or a Secret is none of keys;
// errors say which, and never what is in it.
package keys

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Namespace holds the Secrets.
const Namespace = "atoll-keys"

// kindSecret is the kind of a provider whose keys are in its Secret.
const kindSecret = "Secret"

// Secrets reads classes and keys.
type Secrets struct {
	client  kubernetes.Interface
	classes dynamic.NamespaceableResourceInterface
}

// New makes a reader. It does not talk to the API server.
func New(config *rest.Config) (*Secrets, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reading encryption keys: %w", err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reading encryption keys: %w", err)
	}
	return &Secrets{client: client, classes: objects.Resource(api.Classes())}, nil
}

// unanswered marks an error of the API other than that there is no such object: asking again may help.
func unanswered(err error) error {
	if apierrors.IsNotFound(err) {
		return err
	}
	return outage{err}
}

// outage is datastore.ErrUnavailable without its text: the datastore has nothing to do with it.
type outage struct{ error }

func (o outage) Unwrap() error { return o.error }

// Is makes it datastore.ErrUnavailable.
func (outage) Is(target error) bool { return target == datastore.ErrUnavailable }

// ClassOf is the class of encryption that an EncryptionClass is.
func ClassOf(namespace, name string) string { return namespace + "/" + name }

// Class returns the provider that a class names, and the id of the key, "" being the one that sorts last.
func (s *Secrets) Class(ctx context.Context, class string) (provider, key string, err error) {
	namespace, name, ok := strings.Cut(class, "/")
	if !ok {
		return class, "", nil
	}
	obj, err := s.classes.Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "", "", fmt.Errorf("there is no EncryptionClass %s; create it, or name another one by the annotation %q of the claim", class, api.ClaimAnnotation)
	case err != nil:
		return "", "", fmt.Errorf("reading EncryptionClass %s: %w", class, unanswered(err))
	}
	var c api.EncryptionClass
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &c); err != nil {
		return "", "", fmt.Errorf("reading EncryptionClass %s: %w", class, err)
	}
	if c.Spec.KeyProvider == "" {
		return "", "", fmt.Errorf("spec.keyProvider of EncryptionClass %s is empty; set it to the name of a Secret in namespace %s", class, Namespace)
	}
	return c.Spec.KeyProvider, c.Spec.KeyID, nil
}

// Provider returns the kind of a provider: "Secret", and then its keys, or the type of a Secret that is none.
func (s *Secrets) Provider(ctx context.Context, name string) (kind string, keys map[string][]byte, err error) {
	secret, err := s.client.CoreV1().Secrets(Namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "", nil, fmt.Errorf("there is no key provider %q: create the Secret %s/%s with a key of 32 bytes, or name another provider", name, Namespace, name)
	case err != nil:
		return "", nil, fmt.Errorf("reading Secret %s/%s: %w", Namespace, name, unanswered(err))
	case secret.Type != "" && secret.Type != corev1.SecretTypeOpaque:
		return string(secret.Type), nil, nil
	}
	return kindSecret, secret.Data, nil
}
