// Package rotation brings the key-encryption keys of volumes and snapshots up to date.
//
// When a class of encryption gets another key-encryption key, the keys of all its volumes and snapshots have
// to be wrapped with the new one; the old one is needed until that is done. The data are not touched, and
// volumes may be in use. Each volume's record is replaced at once (fsync, rename), and what is done is read
// from the records themselves, so that a rotation that was cut off goes on where it was by calling Rewrap
// again, here or in another process or host at the same time.
//
// The agent calls it for the controller of EncryptionClasses, and the command line. What can go wrong: the new
// key cannot be used, or an old one is missing; then the volumes that need it stay as they are, the others are
// done, and the result says why.
package rotation

import (
	"context"
	"errors"
	"fmt"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// Item is a volume or snapshot that is encrypted.
type Item struct {
	Store  string
	Source datastore.Source
	Class  string
	KEKs   []datastore.KEK
	// Claim is the claim that a volume was made for, namespace/name, or "".
	Claim string

	// making: it is not finished, and cannot be wrapped anew before it is.
	making bool
	engine datastore.Upkeep
}

// String is how messages name it.
func (i Item) String() string {
	if i.Source.Snapshot != "" {
		return "snapshot " + stores.Handle(i.Store, i.Source.Snapshot)
	}
	return "volume " + stores.Handle(i.Store, i.Source.Volume)
}

// Items returns what is encrypted on datastores. One that fails does not hide the others; with an error there
// may be more than what is returned.
func Items(ctx context.Context, list []stores.Store) ([]Item, error) {
	var out []Item
	var failed error
	for _, s := range list {
		contents, err := s.List(ctx)
		switch {
		case errors.Is(err, datastore.ErrCorrupt): // the others are there
			failed = errors.Join(failed, fmt.Errorf("datastore %s, restore what is damaged from a backup (`atoll storage check`): %w", s.Name, err))
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("datastore %s, bring it back (`atoll datastore ls`): %w", s.Name, err))
		}
		for _, v := range contents.Volumes {
			if v.Encryption != "" && v.State != datastore.StateDeleting {
				out = append(out, Item{
					Store: s.Name, Source: datastore.Source{Volume: v.ID}, Class: v.Encryption, KEKs: v.KEKs, Claim: stores.Claim(v),
					making: v.State != datastore.StateReady, engine: s.Backend,
				})
			}
		}
		for _, v := range contents.Snapshots {
			if v.Encryption != "" {
				out = append(out, Item{Store: s.Name, Source: datastore.Source{Snapshot: v.ID}, Class: v.Encryption, KEKs: v.KEKs, engine: s.Backend})
			}
		}
	}
	return out, failed
}

// Result is how far a rotation is.
type Result struct {
	// KEK wraps now; it is empty if KeyErr is set, which says why the class has no key.
	KEK    datastore.KEK
	KeyErr error
	// Total is how many volumes and snapshots are of the class, and Current how many of them need no other
	// key-encryption key than KEK.
	Total, Current int
	// Err says why others do not, of the first one.
	Err error
}

// Rewrap wraps the keys of all items of a class with its key-encryption key, where they are not. told, if
// set, is called before the first and after each. Items that are gone by now are left out.
func Rewrap(ctx context.Context, keys datastore.Keys, items []Item, class string, told func(Result)) Result {
	if told == nil {
		told = func(Result) {}
	}
	var r Result
	r.KEK, r.KeyErr = keys.Current(ctx, class)
	var todo []Item
	for _, i := range items {
		if i.Class != class {
			continue
		}
		r.Total++
		if r.KeyErr == nil && i.by(r.KEK) {
			r.Current++
		} else {
			todo = append(todo, i)
		}
	}
	if r.KeyErr != nil {
		return r
	}
	told(r)
	for _, i := range todo {
		if i.making { // it is Ready or gone soon
			continue
		}
		err := i.engine.Rewrap(ctx, i.Source, class)
		switch {
		case err == nil:
			r.Current++
		case errors.Is(err, datastore.ErrNotFound):
			r.Total--
		case r.Err == nil:
			r.Err = fmt.Errorf("%s: %w", i, err)
		}
		told(r)
	}
	return r
}

// by tells whether all keys are wrapped with one key-encryption key.
func (i Item) by(kek datastore.KEK) bool {
	return len(i.KEKs) == 1 && i.KEKs[0].Same(kek)
}

// Move gives a volume another class.
func Move(ctx context.Context, i Item, class string) error {
	if err := i.engine.Rewrap(ctx, i.Source, class); err != nil {
		return fmt.Errorf("%s: %w", i, err)
	}
	return nil
}
