// Package keys wraps the keys of encrypted volumes with key-encryption keys that somebody else keeps.
//
// A class of encryption names a key provider and perhaps a key of it. What a provider does is the interface
// Provider; the only kind there is, Secret, is AES-256-GCM with a random nonce over keys that can be read. A
// KMS, which gives no keys away, would be another kind. The name of the volume's key is additional data, so
// that a wrapped key works for its own volume only. A wrapped key says which provider and key it needs, so
// that it can be unwrapped when the class has gone or names another one. Keys are never logged and never part
// of an error.
//
// What can go wrong is datastore.ErrKey: no such class, provider or key (it was removed while volumes still
// need it), or another one under its name.
package keys

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// Size is the length of a key-encryption key in bytes.
const Size = 32

// KindSecret is the kind of providers whose keys can be read.
const KindSecret = "Secret"

// Source knows classes and the configuration of key providers.
type Source interface {
	// Class returns the provider that a class names, and the id of the key, "" being the provider's choice.
	Class(ctx context.Context, class string) (provider, key string, err error)
	// Provider returns the kind of a provider, and its keys by id if it is of KindSecret.
	Provider(ctx context.Context, name string) (kind string, keys map[string][]byte, err error)
}

// Provider has key-encryption keys.
type Provider interface {
	// Find names a key by its id; "" is the one to use from now on.
	Find(ctx context.Context, id string) (Ref, error)
	// Wrap encrypts with a key that Find has named, Unwrap decrypts. The additional data are not part of the
	// result, and unwrapping with others must fail.
	Wrap(ctx context.Context, by Ref, key, additional []byte) ([]byte, error)
	Unwrap(ctx context.Context, by Ref, wrapped, additional []byte) ([]byte, error)
}

// Ref is a key of a provider. The fingerprint is the key's, whatever it is called.
type Ref struct{ ID, Fingerprint string }

// Wrapper is datastore.Keys over a Source.
type Wrapper struct{ Source Source }

var _ datastore.Keys = Wrapper{}

// ID names a key-encryption key without telling anything about it.
func ID(kek []byte) string {
	sum := sha256.Sum256(append([]byte("atoll key-encryption key "), kek...))
	return hex.EncodeToString(sum[:8])
}

// Current names the key-encryption key of a class.
func (w Wrapper) Current(ctx context.Context, class string) (datastore.KEK, error) {
	_, kek, err := w.find(ctx, class)
	return kek, err
}

// Wrap encrypts a key with the current key-encryption key of a class.
func (w Wrapper) Wrap(ctx context.Context, class string, key, additional []byte) (handover.WrappedKey, error) {
	p, kek, err := w.find(ctx, class)
	if err != nil {
		return handover.WrappedKey{}, err
	}
	data, err := p.Wrap(ctx, Ref{kek.ID, kek.Fingerprint}, key, additional)
	if err != nil {
		return handover.WrappedKey{}, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, class, err)
	}
	return handover.WrappedKey{Class: class, Provider: kek.Provider, KeyID: kek.ID, KEK: kek.Fingerprint, Data: data}, nil
}

// Unwrap decrypts a key with the key-encryption key that it was encrypted with.
func (w Wrapper) Unwrap(ctx context.Context, wrapped handover.WrappedKey, additional []byte) ([]byte, error) {
	p, err := w.provider(ctx, cmp.Or(wrapped.Provider, wrapped.Class))
	if err != nil {
		return nil, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, wrapped.Class, err)
	}
	key, err := p.Unwrap(ctx, Ref{wrapped.KeyID, wrapped.KEK}, wrapped.Data, additional)
	if err != nil {
		return nil, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, wrapped.Class, err)
	}
	return key, nil
}

// find returns the provider and the key that wrap for a class from now on.
func (w Wrapper) find(ctx context.Context, class string) (Provider, datastore.KEK, error) {
	name, id, err := w.Source.Class(ctx, class)
	if err != nil {
		return nil, datastore.KEK{}, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, class, err)
	}
	p, err := w.provider(ctx, name)
	if err != nil {
		return nil, datastore.KEK{}, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, class, err)
	}
	ref, err := p.Find(ctx, id)
	if err != nil {
		return nil, datastore.KEK{}, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, class, err)
	}
	return p, datastore.KEK{Provider: name, ID: ref.ID, Fingerprint: ref.Fingerprint}, nil
}

// provider finds a provider by its name.
func (w Wrapper) provider(ctx context.Context, name string) (Provider, error) {
	kind, all, err := w.Source.Provider(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case kind != KindSecret:
		return nil, fmt.Errorf("key provider %q is of kind %q, which this version does not know; it knows %q", name, kind, KindSecret)
	}
	return ring{name, all}, nil
}

// ring is a Provider over keys by id.
type ring struct {
	name string
	keys map[string][]byte
}

func (r ring) Find(_ context.Context, id string) (Ref, error) {
	if id == "" {
		for name := range r.keys {
			id = max(id, name)
		}
	}
	kek, ok := r.keys[id]
	if len(r.keys) == 0 {
		return Ref{}, fmt.Errorf("key provider %q has no keys; add one of %d bytes", r.name, Size)
	}
	if !ok {
		// Who names a key need not be who may know what there is.
		return Ref{}, fmt.Errorf("key provider %q has no key %q; ask the administrator, who finds its keys in the provider's Secret, or name none to use its last one", r.name, id)
	}
	if len(kek) != Size {
		return Ref{}, fmt.Errorf("key %q of key provider %q has %d bytes, and must have %d", id, r.name, len(kek), Size)
	}
	return Ref{id, ID(kek)}, nil
}

// find returns the key with a fingerprint. Its name may have changed.
func (r ring) find(by Ref) ([]byte, error) {
	for _, kek := range r.keys {
		if ID(kek) == by.Fingerprint {
			return kek, nil
		}
	}
	named := datastore.KEK{Provider: r.name, ID: by.ID, Fingerprint: by.Fingerprint}
	if kek, ok := r.keys[by.ID]; ok {
		return nil, fmt.Errorf("there is no %s any more: another key (%s) has its name; restore the old one", named, ID(kek))
	}
	return nil, fmt.Errorf("there is no %s any more; restore it", named)
}

func (r ring) Wrap(_ context.Context, by Ref, key, additional []byte) ([]byte, error) {
	gcm, err := r.gcm(by)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("making a nonce: %w", err)
	}
	return gcm.Seal(nonce, nonce, key, additional), nil
}

func (r ring) Unwrap(_ context.Context, by Ref, wrapped, additional []byte) ([]byte, error) {
	gcm, err := r.gcm(by)
	if err != nil {
		return nil, err
	}
	if len(wrapped) < gcm.NonceSize() {
		return nil, fmt.Errorf("wrapped key of %d bytes", len(wrapped))
	}
	key, err := gcm.Open(nil, wrapped[:gcm.NonceSize()], wrapped[gcm.NonceSize():], additional)
	if err != nil {
		return nil, fmt.Errorf("%s does not fit", datastore.KEK{Provider: r.name, ID: by.ID, Fingerprint: by.Fingerprint})
	}
	return key, nil
}

// gcm returns the cipher of a key-encryption key.
func (r ring) gcm(by Ref) (cipher.AEAD, error) {
	kek, err := r.find(by)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("preparing a cipher: %w", err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("preparing a cipher: %w", err)
	}
	return gcm, nil
}

// Static is a Source over bytes: classes that are providers of the same name, the last key of each being the
// current one.
type Static map[string][][]byte

// Class implements Source.
func (s Static) Class(_ context.Context, class string) (provider, key string, err error) {
	if len(s[class]) == 0 {
		return "", "", fmt.Errorf("there is no class %q", class)
	}
	return class, "", nil
}

// Provider implements Source.
func (s Static) Provider(_ context.Context, name string) (string, map[string][]byte, error) {
	out := map[string][]byte{}
	for n, key := range s[name] {
		out[fmt.Sprintf("key-%03d", n)] = bytes.Clone(key)
	}
	return KindSecret, out, nil
}
