// Package keys wraps the keys of encrypted volumes with key-encryption keys that somebody else keeps.
//
// It is AES-256-GCM with a random nonce and the name of the volume's key as additional data, so that a wrapped
// key works for its own volume only. Where key-encryption keys come from is the Source's: a Secret today, a
// KMS would implement datastore.Keys itself. Keys are never logged and never part of an error.
//
// What can go wrong is datastore.ErrKey: no such class, no such key-encryption key (it was removed while
// volumes still need it), or another one under its name.
package keys

import (
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

// Source knows key-encryption keys.
type Source interface {
	// Current returns the key-encryption key of a class that wraps from now on.
	Current(ctx context.Context, class string) ([]byte, error)
	// All returns all key-encryption keys of a class, older ones included.
	All(ctx context.Context, class string) ([][]byte, error)
}

// Wrapper is datastore.Keys over a Source.
type Wrapper struct{ Source Source }

var _ datastore.Keys = Wrapper{}

// ID names a key-encryption key without telling anything about it.
func ID(kek []byte) string {
	sum := sha256.Sum256(append([]byte("atoll key-encryption key "), kek...))
	return hex.EncodeToString(sum[:8])
}

// Wrap encrypts a key with the current key-encryption key of a class.
func (w Wrapper) Wrap(ctx context.Context, class string, key, additional []byte) (handover.WrappedKey, error) {
	kek, err := w.Source.Current(ctx, class)
	if err != nil {
		return handover.WrappedKey{}, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, class, err)
	}
	gcm, err := newGCM(class, kek)
	if err != nil {
		return handover.WrappedKey{}, err
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return handover.WrappedKey{}, fmt.Errorf("making a nonce: %w", err)
	}
	return handover.WrappedKey{Class: class, KEK: ID(kek), Data: gcm.Seal(nonce, nonce, key, additional)}, nil
}

// Unwrap decrypts a key with the key-encryption key that it was encrypted with.
func (w Wrapper) Unwrap(ctx context.Context, wrapped handover.WrappedKey, additional []byte) ([]byte, error) {
	all, err := w.Source.All(ctx, wrapped.Class)
	if err != nil {
		return nil, fmt.Errorf("%w: class %s: %w", datastore.ErrKey, wrapped.Class, err)
	}
	for _, kek := range all {
		if ID(kek) != wrapped.KEK {
			continue
		}
		gcm, err := newGCM(wrapped.Class, kek)
		if err != nil {
			return nil, err
		}
		if len(wrapped.Data) < gcm.NonceSize() {
			return nil, fmt.Errorf("%w: wrapped key of %d bytes", datastore.ErrKey, len(wrapped.Data))
		}
		key, err := gcm.Open(nil, wrapped.Data[:gcm.NonceSize()], wrapped.Data[gcm.NonceSize():], additional)
		if err != nil {
			return nil, fmt.Errorf("%w: key-encryption key %s of class %s does not fit", datastore.ErrKey, wrapped.KEK, wrapped.Class)
		}
		return key, nil
	}
	return nil, fmt.Errorf("%w: class %s has no key-encryption key %s", datastore.ErrKey, wrapped.Class, wrapped.KEK)
}

// newGCM returns the cipher of a key-encryption key.
func newGCM(class string, kek []byte) (cipher.AEAD, error) {
	if len(kek) != Size {
		return nil, fmt.Errorf("%w: the key-encryption key of class %s has %d bytes, not %d", datastore.ErrKey, class, len(kek), Size)
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

// Static is a Source over bytes, the last of each class being the current one.
type Static map[string][][]byte

// Current returns the last key of a class.
func (s Static) Current(_ context.Context, class string) ([]byte, error) {
	if len(s[class]) == 0 {
		return nil, fmt.Errorf("there is no class %q", class)
	}
	return s[class][len(s[class])-1], nil
}

// All returns the keys of a class.
func (s Static) All(_ context.Context, class string) ([][]byte, error) { return s[class], nil }
