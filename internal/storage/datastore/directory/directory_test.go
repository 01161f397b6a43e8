package directory

import (
	"path/filepath"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/datastore/enginetest"
)

// store makes an empty store.
func store(t testing.TB, c Config) *chain.Store {
	t.Helper()
	if c.Path == "" {
		c.Path = filepath.Join(t.TempDir(), "store")
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSuite(t *testing.T) {
	enginetest.Suite(t, func(t *testing.T, k datastore.Keys) enginetest.Store { return store(t, Config{Keys: k}) })
}
