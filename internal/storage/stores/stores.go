// Package stores is the set of datastores that are open on this host, by name.
//
// It is not an engine (internal/storage/datastore) and does not know where the names come from: the
// Datastore controller of the agent puts datastores in and takes them out. The controller and the node
// service of the CSI driver look them up by the handle of a volume. What can go wrong: a name is not there,
// and the errors below say why; at start that only means waiting.
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

// Why a datastore is not among the open ones.
var (
	// ErrUnknown: it is not known yet, or not any more.
	ErrUnknown = errors.New("datastore is not open on this host")
	// ErrElsewhere: it is one of another host.
	ErrElsewhere = errors.New("datastore is on another host")
	// ErrNone: there is no datastore of this name in the cluster.
	ErrNone = errors.New("there is no such datastore")
)

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
	mu     sync.RWMutex // guards all below
	byName map[string]Store
	closed map[string]error // why a datastore that is known is not open
	listed bool
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
	delete(s.closed, store.Name)
}

// Close notes that a datastore exists, but is not open, and why: ErrElsewhere or what failed.
func (s *Set) Close(name string, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed == nil {
		s.closed = map[string]error{}
	}
	s.closed[name] = why
	delete(s.byName, name)
}

// Remove forgets a datastore. Its files stay.
func (s *Set) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byName, name)
	delete(s.closed, name)
}

// Listed says that all datastores there are have been put or closed: what is not here does not exist.
func (s *Set) Listed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed = true
}

// Get returns the datastore of this name, or why it is not open.
func (s *Set) Get(name string) (Store, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if store, ok := s.byName[name]; ok {
		return store, nil
	}
	err := s.closed[name]
	switch {
	case err != nil:
	case s.listed:
		err = ErrNone
	default:
		err = ErrUnknown
	}
	return Store{}, fmt.Errorf("datastore %q: %w", name, err)
}

// All returns the open datastores, sorted by name.
func (s *Set) All() []Store {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sorted()
}

// sorted returns the open datastores. The lock is held.
func (s *Set) sorted() []Store {
	return slices.SortedFunc(maps.Values(s.byName), func(a, b Store) int { return strings.Compare(a.Name, b.Name) })
}

// Known returns the open datastores, and why there may be more of this host: one that is not open, or not all
// have been listed.
func (s *Set) Known() ([]Store, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var unseen []error
	if !s.listed {
		unseen = append(unseen, errors.New("the agent has just started and has not opened all datastores yet; wait for it"))
	}
	for _, name := range slices.Sorted(maps.Keys(s.closed)) {
		if why := s.closed[name]; !errors.Is(why, ErrElsewhere) {
			unseen = append(unseen, fmt.Errorf("datastore %s is not open, bring it back (`atoll datastore ls`): %w", name, why))
		}
	}
	return s.sorted(), errors.Join(unseen...)
}

// Complete tells whether All is all there will ever be: everything has been listed, and is on this host and
// open.
func (s *Set) Complete() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.listed && len(s.closed) == 0
}

// Handle names a volume or snapshot in the whole cluster: the name of its datastore and its id there.
func Handle(store, id string) string { return store + "/" + id }

// ErrHandle says that a text is not a handle, so that it names nothing.
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
