// Package encryption is what the commands about encryption do in the API: they list EncryptionClasses and
// give classes and key providers new keys, with a person's kubeconfig.
//
// It wraps nothing itself; the agents do, and it waits for them. It prints nothing. A rotation that is cut off
// has at most made a key that nothing uses yet; what has begun the agents go on with. What can go wrong: an
// object is missing, or may not be read or changed by the caller; errors name it.
package encryption

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	kubekeys "atoll.dev/atoll/internal/kube/keys"
)

const (
	// timeout bounds a request to the API server.
	timeout = time.Minute
	// keySize is the length of a key-encryption key.
	keySize = 32
	// lookEvery is how often progress is looked at.
	lookEvery = 500 * time.Millisecond
)

// Client reads and writes classes and keys.
type Client struct {
	core    kubernetes.Interface
	classes dynamic.NamespaceableResourceInterface
	now     func() time.Time
}

// NewClient uses a kubeconfig file.
func NewClient(kubeconfig string) (*Client, error) {
	config, err := cluster.ConfigOf(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = timeout
	core, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	return &Client{core: core, classes: objects.Resource(api.Classes()), now: time.Now}, nil
}

// List returns all classes, sorted by namespace and name.
func (c *Client) List(ctx context.Context) ([]api.EncryptionClass, error) {
	list, err := c.classes.List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing EncryptionClasses: %w", err)
	}
	out := make([]api.EncryptionClass, 0, len(list.Items))
	for _, item := range list.Items {
		class, err := decode(&item)
		if err != nil {
			return nil, err
		}
		out = append(out, *class)
	}
	slices.SortFunc(out, func(a, b api.EncryptionClass) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	return out, nil
}

func decode(u *unstructured.Unstructured) (*api.EncryptionClass, error) {
	class := &api.EncryptionClass{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, class); err != nil {
		return nil, fmt.Errorf("reading EncryptionClass %s/%s: %w", u.GetNamespace(), u.GetName(), err)
	}
	return class, nil
}

func (c *Client) class(ctx context.Context, of string) (*api.EncryptionClass, error) {
	namespace, name, _ := strings.Cut(of, "/")
	got, err := c.classes.Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("there is no EncryptionClass %s; `atoll encryption ls` lists what there is", of)
	}
	if err != nil {
		return nil, fmt.Errorf("reading EncryptionClass %s: %w", of, err)
	}
	return decode(got)
}

// Key is a key of a provider.
type Key struct {
	Provider, ID string
	// Made: it is new.
	Made bool
}

// Rotate makes a key the current one of a class (namespace/name) or of a provider. id names a key that there is
// already or a new one; "" makes a new one with a name from the time.
func (c *Client) Rotate(ctx context.Context, of, id string) (Key, error) {
	provider, last := of, true
	var class *api.EncryptionClass
	if strings.Contains(of, "/") {
		var err error
		if class, err = c.class(ctx, of); err != nil {
			return Key{}, err
		}
		provider, last = class.Spec.KeyProvider, class.Spec.KeyID == ""
	}
	key, err := c.ensure(ctx, provider, id, last)
	if err != nil || class == nil || class.Spec.KeyID == key.ID || last {
		return key, err
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": class.ResourceVersion}, "spec": map[string]any{"keyID": key.ID},
	})
	if err != nil {
		return Key{}, fmt.Errorf("encoding a patch: %w", err)
	}
	if _, err := c.classes.Namespace(class.Namespace).Patch(ctx, class.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "atoll-cli"}); err != nil {
		return Key{}, fmt.Errorf("setting spec.keyID of EncryptionClass %s to %q: %w", of, key.ID, err)
	}
	return key, nil
}

// ensure makes a key unless it is there. With last it must be the one whose name sorts last.
func (c *Client) ensure(ctx context.Context, provider, id string, last bool) (Key, error) {
	secrets := c.core.CoreV1().Secrets(kubekeys.Namespace)
	secret, err := secrets.Get(ctx, provider, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return Key{}, fmt.Errorf("there is no key provider %q: no Secret %s/%s; make it with `kubectl create secret generic %s -n %s`",
			provider, kubekeys.Namespace, provider, provider, kubekeys.Namespace)
	case err != nil:
		return Key{}, fmt.Errorf("reading key provider %q: %w", provider, err)
	case secret.Type != "" && secret.Type != corev1.SecretTypeOpaque:
		return Key{}, fmt.Errorf("key provider %q is of kind %q, whose keys are made elsewhere; make one there and set spec.keyID", provider, secret.Type)
	}
	newest := ""
	for name := range secret.Data {
		newest = max(newest, name)
	}
	if id == "" {
		id = newName(newest, c.now())
	}
	_, have := secret.Data[id]
	problems := validation.IsConfigMapKey(id)
	switch {
	case len(problems) > 0:
		return Key{}, fmt.Errorf("key %q: %s", id, strings.Join(problems, "; "))
	case last && id < newest:
		return Key{}, fmt.Errorf("key %q would not be used: the name of %q sorts after it; choose another name, or set spec.keyID of an EncryptionClass", id, newest)
	case have:
		return Key{Provider: provider, ID: id}, nil
	}
	b := make([]byte, keySize)
	if _, err := rand.Read(b); err != nil {
		return Key{}, fmt.Errorf("making a key: %w", err)
	}
	if secret.Data == nil {
		secret.Data = map[string][]byte{}
	}
	secret.Data[id] = b
	if _, err := secrets.Update(ctx, secret, metav1.UpdateOptions{FieldManager: "atoll-cli"}); err != nil {
		return Key{}, fmt.Errorf("adding key %q to Secret %s/%s: %w", id, kubekeys.Namespace, provider, err)
	}
	return Key{Provider: provider, ID: id, Made: true}, nil
}

// newName returns a name from the time that sorts after newest.
func newName(newest string, now time.Time) string {
	stamp := now.UTC().Format("2006-01-02-150405")
	if stamp > newest {
		return stamp
	}
	return regexp.MustCompile(`-\d{4}-\d{2}-\d{2}-\d{6}$`).ReplaceAllString(newest, "") + "-" + stamp
}

// Wait holds until the keys of all volumes of a class are wrapped with a key. It fails when the class says
// that it cannot be, or at the end of ctx. stuck is called while that cannot be known, since some volumes
// cannot be looked at.
func (c *Client) Wait(ctx context.Context, of string, key Key, told func(done, total int), stuck func(why string)) error {
	state := "no agent has looked at it"
	err := wait.PollUntilContextCancel(ctx, lookEvery, true, func(ctx context.Context) (bool, error) {
		class, err := c.class(ctx, of)
		if err != nil {
			if cluster.Temporary(err) {
				state, err = err.Error(), nil
			}
			return false, err
		}
		ready := meta.FindStatusCondition(class.Status.Conditions, api.ClassReady)
		current := meta.FindStatusCondition(class.Status.Conditions, api.ClassKeysCurrent)
		if ready == nil || current == nil || ready.ObservedGeneration != class.Generation || class.Status.KeyID != key.ID {
			return false, nil
		}
		state = current.Message
		told(int(class.Status.Current), int(class.Status.Volumes))
		switch {
		case ready.Status == metav1.ConditionFalse:
			return false, errors.New(ready.Message)
		case current.Status == metav1.ConditionFalse && current.Reason == "OldKeyNeeded":
			return false, errors.New(current.Message)
		case current.Status == metav1.ConditionUnknown:
			stuck(current.Message)
		}
		return current.Status == metav1.ConditionTrue, nil
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("the volumes of EncryptionClass %s are not done yet (%s); the agents go on, and `atoll encryption ls` shows how far they are", of, state)
	}
	return err
}
