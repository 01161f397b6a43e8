// Package backends makes the engine of a datastore from where the datastore is.
//
// The agent and the command line call it, so that they take the same place for the same datastore. It opens
// nothing; what can go wrong is a place that makes no sense.
package backends

import (
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/datastore/directory"
	"atoll.dev/atoll/internal/storage/datastore/rbd"
)

// Config says where a datastore is: Path, or Pool and what follows.
type Config struct {
	Path string

	Pool, Namespace, Conf, User string

	// ID is what Init has returned once, or "".
	ID     string
	Keys   datastore.Keys
	Limits datastore.Limits
}

// New makes the engine.
func New(c Config) (*chain.Store, error) {
	if c.Pool != "" {
		return rbd.New(rbd.Config{
			Pool: c.Pool, Namespace: c.Namespace, Conf: c.Conf, User: c.User, ID: c.ID, Keys: c.Keys, Limits: c.Limits,
		})
	}
	return directory.New(directory.Config{Path: c.Path, ID: c.ID, Keys: c.Keys, Limits: c.Limits})
}
