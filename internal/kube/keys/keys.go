// Package keys reads key-encryption keys from Secrets.
//
// A class of encryption is a Secret of its name in the namespace atoll-keys. Each entry of the Secret is a
// key of 32 bytes; the entry whose name sorts last wraps new keys, the others only unwrap. So a key is
// rotated by adding an entry, and an entry can go when no volume needs it any more. Nothing is kept: keys are
// read when they are needed, which is seldom.
//
// The agent's storage part is the caller, and the only identity besides administrators that may read this
// namespace. What can go wrong: the Secret or an entry is missing, or an entry has another length; errors say
// which, and never what is in it.
package keys

import (
	"context"
	"fmt"
	"maps"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Namespace holds the Secrets.
const Namespace = "atoll-keys"

// Secrets reads the keys of classes.
type Secrets struct {
	client kubernetes.Interface
}

// New makes a reader. It does not talk to the API server.
func New(config *rest.Config) (*Secrets, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reading encryption keys: %w", err)
	}
	return &Secrets{client: client}, nil
}

// Current returns the key that wraps from now on.
func (s *Secrets) Current(ctx context.Context, class string) ([]byte, error) {
	all, err := s.All(ctx, class)
	if err != nil {
		return nil, err
	}
	return all[len(all)-1], nil
}

// All returns all keys of a class, the current one last. There is at least one.
func (s *Secrets) All(ctx context.Context, class string) ([][]byte, error) {
	secret, err := s.client.CoreV1().Secrets(Namespace).Get(ctx, class, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("there is no Secret %s/%s; create it with a key of 32 bytes, or remove the parameter \"encryption\"", Namespace, class)
	case err != nil:
		return nil, fmt.Errorf("reading Secret %s/%s: %w", Namespace, class, err)
	case len(secret.Data) == 0:
		return nil, fmt.Errorf("the Secret %s/%s is empty; add a key of 32 bytes", Namespace, class)
	}
	var out [][]byte
	for _, name := range slices.Sorted(maps.Keys(secret.Data)) {
		key := secret.Data[name]
		if len(key) != 32 {
			return nil, fmt.Errorf("entry %q of Secret %s/%s has %d bytes, and must have 32", name, Namespace, class, len(key))
		}
		out = append(out, key)
	}
	return out, nil
}
