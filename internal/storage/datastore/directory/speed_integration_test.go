//go:build integration

package directory

import (
	"fmt"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
)

// BenchmarkOperations measures what must not depend on the size of a volume: 10 GiB each, beside 200 others.
func BenchmarkOperations(b *testing.B) {
	for _, class := range []string{"", "gold"} {
		s := store(b, Config{Keys: crashKeys("")})
		for n := range 200 {
			if _, err := s.Create(b.Context(), datastore.Spec{ID: fmt.Sprintf("other-%d", n), Size: 10 << 30}); err != nil {
				b.Fatal(err)
			}
		}
		n := 0
		each := func(name string, do func(id string) error) {
			b.Run(name+"/"+class, func(b *testing.B) {
				for b.Loop() {
					n++
					if err := do(fmt.Sprintf("v%d", n)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		each("create", func(id string) error {
			_, err := s.Create(b.Context(), datastore.Spec{ID: id, Size: 10 << 30, Encryption: class})
			return err
		})
		each("attach", func(id string) error {
			_, err := s.Attach(b.Context(), "v1", id, datastore.ReadOnly)
			if err == nil {
				err = s.Detach(b.Context(), "v1", id)
			}
			return err
		})
		each("snapshot", func(string) error {
			if _, err := s.Attach(b.Context(), "v1", "w", datastore.ReadWrite); err != nil {
				return err
			}
			if err := s.Detach(b.Context(), "v1", "w"); err != nil {
				return err
			}
			if _, err := s.Snapshot(b.Context(), "s", "v1", nil); err != nil {
				return err
			}
			return s.DeleteSnapshot(b.Context(), "s")
		})
		each("clone", func(id string) error {
			_, err := s.Create(b.Context(), datastore.Spec{ID: id, Encryption: class, Source: &datastore.Source{Volume: "v2"}})
			return err
		})
		each("list", func(string) error { _, err := s.List(b.Context()); return err })
		each("delete", func(id string) error {
			if _, err := s.Create(b.Context(), datastore.Spec{ID: id, Size: 10 << 30, Encryption: class}); err != nil {
				return err
			}
			return s.Delete(b.Context(), id)
		})
	}
}
