// Package stores is the set of datastores that are open on this host, by name.
//
// It is not an engine (internal/storage/datastore) and does not know where the names come from: the
// Datastore controller of the agent puts datastores in and takes them out. The controller and the node
// service of the CSI driver look them up by the handle of a volume. What can go wrong: a name is not there
// (yet), which ErrUnknown says; at start that only means waiting.
package stores

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"atoll.dev/atoll/internal/storage/datastore"
)

// ErrUnknown: no datastore of this name is open on this host.
var ErrUnknown = errors.New("datastore is not open on this host")

// Default is the datastore that is used when nobody names one.
const Default = "default"

// Backend is what a datastore has to do.
type Backend interface {
	datastore.Engine
	datastore.Upkeep
}

// Store is one open datastore. It is not changed after Put.
type Store struct {
	Name string
	// Labels are matched by the parameter datastoreSelector.
	Labels map[string]string
	// Shared says that several hosts have it open: Hosts, if they are known.
	Shared bool
	Hosts  []string
	Backend
}

// Set holds the open datastores. The zero value is empty and ready.
type Set struct {
	mu     sync.RWMutex
	byName map[string]Store
}

// Put adds a datastore or replaces the one of this name.
func (s *Set) Put(store Store) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byName == nil {
		s.byName = map[string]Store{}
	}
	store.Labels = maps.Clone(store.Labels)
	s.byName[store.Name] = store
}

// Remove forgets a datastore. Its files stay.
func (s *Set) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byName, name)
}

// Get returns the datastore of this name, or ErrUnknown.
func (s *Set) Get(name string) (Store, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	store, ok := s.byName[name]
	if !ok {
		return Store{}, fmt.Errorf("%s: %w", name, ErrUnknown)
	}
	return store, nil
}

// All returns the open datastores, sorted by name.
func (s *Set) All() []Store {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.SortedFunc(maps.Values(s.byName), func(a, b Store) int { return strings.Compare(a.Name, b.Name) })
}

// Handle names a volume or snapshot in the whole cluster: the name of its datastore and its id there.
func Handle(store, id string) string { return store + "/" + id }

// ErrHandle: a text is not a handle, so that it names nothing.
var ErrHandle = errors.New("not a handle of this driver, want <datastore>/<id>")

// Split is the reverse of Handle.
func Split(handle string) (store, id string, err error) {
	store, id, ok := strings.Cut(handle, "/")
	if !ok || store == "" || id == "" || strings.Contains(id, "/") {
		return "", "", fmt.Errorf("%q: %w", handle, ErrHandle)
	}
	return store, id, nil
}

// Resolve finds the datastore of a handle. ErrHandle, ErrUnknown.
func (s *Set) Resolve(handle string) (Store, string, error) {
	name, id, err := Split(handle)
	if err != nil {
		return Store{}, "", err
	}
	store, err := s.Get(name)
	return store, id, err
}

// Volume resolves a handle and reads the volume's record.
func (s *Set) Volume(ctx context.Context, handle string) (Store, datastore.Volume, error) {
	store, id, err := s.Resolve(handle)
	if err != nil {
		return Store{}, datastore.Volume{}, err
	}
	v, err := store.Volume(ctx, id)
	return store, v, err
}

// Labels that the CSI driver keeps with a volume about the claim it was made for.
const (
	LabelClaim     = "pvc/name"
	LabelNamespace = "pvc/namespace"
)

// Claim is the PersistentVolumeClaim a volume was made for, namespace/name, or "".
func Claim(v datastore.Volume) string {
	name, namespace := v.Labels[LabelClaim], v.Labels[LabelNamespace]
	if name == "" || namespace == "" {
		return ""
	}
	return namespace + "/" + name
}
