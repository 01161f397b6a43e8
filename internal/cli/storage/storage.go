// Package storage is what the commands about datastores and volumes have in common: it reads and writes
// Datastore objects with a person's kubeconfig, and opens the datastores of this host directly.
//
// Volumes are looked at in the datastores themselves, not in the API, so that what is there can be told from
// what should be; engines may be open in several processes at once. It prints nothing. What can go wrong: the
// API server does not answer (then only the datastores below the data directory are known), or the caller may
// not read the directories.
package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	kubekeys "atoll.dev/atoll/internal/kube/keys"
	"atoll.dev/atoll/internal/storage/backends"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/stores"
)

const (
	// timeout bounds a request to the API server.
	timeout = time.Minute
	// agentWithin is how long an agent may take to open a datastore, or to let it go.
	agentWithin = time.Minute
)

// Client reads and writes Datastore objects.
type Client struct {
	config *rest.Config
	client dynamic.NamespaceableResourceInterface
}

// NewClient uses a kubeconfig file.
func NewClient(kubeconfig string) (*Client, error) {
	config, err := cluster.ConfigOf(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = timeout
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	return &Client{config: config, client: client.Resource(api.Datastores())}, nil
}

// List returns all datastores, sorted by name.
func (c *Client) List(ctx context.Context) ([]api.Datastore, error) {
	list, err := c.client.List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing datastores: %w", err)
	}
	out := make([]api.Datastore, len(list.Items))
	for i, item := range list.Items {
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(item.Object, &out[i]); err != nil {
			return nil, fmt.Errorf("reading datastore %s: %w", item.GetName(), err)
		}
	}
	slices.SortFunc(out, func(a, b api.Datastore) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Create makes a datastore and waits until it is open, or has failed to be. A datastore that was made but
// does not open is an error that says why; it is left for the administrator to see.
func (c *Client) Create(ctx context.Context, d *api.Datastore) error {
	d.TypeMeta = metav1.TypeMeta{APIVersion: api.GroupVersion().String(), Kind: "Datastore"}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(d)
	if err != nil {
		return fmt.Errorf("creating datastore %s: %w", d.Name, err)
	}
	delete(content, "status")
	if _, err := c.client.Create(ctx, &unstructured.Unstructured{Object: content}, metav1.CreateOptions{FieldManager: "atoll-cli"}); err != nil {
		return fmt.Errorf("creating datastore %s: %w", d.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, agentWithin)
	defer cancel()
	var last *metav1.Condition
	err = wait.PollUntilContextCancel(ctx, 200*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		last, err = c.ready(ctx, d.Name)
		if err != nil && cluster.Temporary(err) {
			err = nil
		}
		return last != nil, err
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("datastore %s was created, but no agent has opened it in %v", d.Name, agentWithin)
	case err != nil:
		return err
	case last.Status != metav1.ConditionTrue:
		return fmt.Errorf("datastore %s was created, but cannot be used: %s", d.Name, last.Message)
	}
	return nil
}

// ready returns the condition Ready, or nil.
func (c *Client) ready(ctx context.Context, name string) (*metav1.Condition, error) {
	got, err := c.client.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("looking at datastore %s: %w", name, err)
	}
	var d api.Datastore
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(got.Object, &d); err != nil {
		return nil, fmt.Errorf("reading datastore %s: %w", name, err)
	}
	for _, condition := range d.Status.Conditions {
		if condition.Type == api.DatastoreReady {
			return &condition, nil
		}
	}
	return nil, nil
}

// ErrNotEmpty says that a datastore holds volumes or snapshots.
var ErrNotEmpty = errors.New("is not empty")

// Remove deletes the object of an empty datastore; its directory stays.
func (c *Client) Remove(ctx context.Context, name string) error {
	all, err := c.List(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(d api.Datastore) bool { return d.Name == name })
	if i < 0 {
		return fmt.Errorf("there is no datastore %s; `atoll datastore ls` lists what there is", name)
	}
	if s := all[i].Status; s.VolumeCount+s.SnapshotCount > 0 {
		return fmt.Errorf("datastore %s %w: it holds %d volumes and %d snapshots; delete their claims first (`atoll volume ls --datastore %s`)",
			name, ErrNotEmpty, s.VolumeCount, s.SnapshotCount, name)
	}
	if err := c.client.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("removing datastore %s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, agentWithin)
	defer cancel()
	err = wait.PollUntilContextCancel(ctx, 200*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		_, err := c.client.Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err), nil
	})
	if err != nil {
		return fmt.Errorf("datastore %s is being removed, but its host has not let it go yet; `atoll datastore ls` says why", name)
	}
	return nil
}

// Store is a datastore that is open in this process.
type Store struct {
	Name string
	stores.Backend
}

// Open opens the datastores of this host that names ask for, or all. Without a client it opens what is below
// the directory of the data directory.
func Open(ctx context.Context, c *Client, dir, node string, names ...string) ([]Store, error) {
	found := map[string]backends.Config{}
	if c == nil {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("looking for datastores: %w", err)
		}
		for _, e := range entries {
			found[e.Name()] = backends.Config{Path: filepath.Join(dir, e.Name())}
		}
	} else {
		all, err := c.List(ctx)
		if err != nil {
			return nil, err
		}
		secrets, err := kubekeys.New(c.config)
		if err != nil {
			return nil, err
		}
		for _, d := range all {
			config := backends.Config{ID: d.Status.ID, Keys: keys.Wrapper{Source: secrets}}
			switch p, rbd := d.Spec.Directory, d.Spec.RBD; {
			case p != nil && (p.Node == "" || p.Node == node || node == ""):
				config.Path = p.Path
			case rbd != nil:
				config.Pool, config.Namespace, config.Conf, config.User = rbd.Pool, rbd.Namespace, rbd.ConfigFile, rbd.User
			default:
				continue
			}
			found[d.Name] = config
		}
	}
	for _, name := range names {
		if _, ok := found[name]; !ok {
			return nil, fmt.Errorf("datastore %s is not on this host; `atoll datastore ls` lists what there is", name)
		}
	}
	var out []Store
	for name, config := range found {
		if len(names) > 0 && !slices.Contains(names, name) {
			continue
		}
		engine, err := backends.New(config)
		if err != nil {
			return nil, fmt.Errorf("datastore %s: %w", name, err)
		}
		out = append(out, Store{Name: name, Backend: engine})
	}
	slices.SortFunc(out, func(a, b Store) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Concerns tells whether a problem is about one of these volumes, given as handles or ids.
func Concerns(store string, p datastore.Problem, volumes []string) bool {
	return len(volumes) == 0 || slices.ContainsFunc(p.Volumes, func(id string) bool {
		return slices.Contains(volumes, id) || slices.Contains(volumes, stores.Handle(store, id))
	})
}
