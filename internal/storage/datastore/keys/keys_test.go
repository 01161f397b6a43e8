package keys

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
)

func TestWrap(t *testing.T) {
	old, current, other := bytes.Repeat([]byte{1}, Size), bytes.Repeat([]byte{2}, Size), bytes.Repeat([]byte{3}, Size)
	source := Static{"a": {old}, "b": {other}, "short": {{1}}}
	w := Wrapper{Source: source}
	wrapped, err := w.Wrap(t.Context(), "a", []byte("secret"), []byte("v1"))
	if err != nil {
		t.Fatal(err)
	}
	if wrapped.Class != "a" || wrapped.KEK != ID(old) || bytes.Contains(wrapped.Data, []byte("secret")) {
		t.Fatalf("%+v", wrapped)
	}
	source["a"] = append(source["a"], current)
	if key, err := w.Unwrap(t.Context(), wrapped, []byte("v1")); err != nil || string(key) != "secret" {
		t.Fatalf("with an older key: %q, %v", key, err)
	}
	if again, err := w.Wrap(t.Context(), "a", []byte("secret"), []byte("v1")); err != nil || again.KEK != ID(current) {
		t.Fatalf("%+v, %v", again, err)
	}
	if _, err := w.Unwrap(t.Context(), wrapped, []byte("v2")); !errors.Is(err, datastore.ErrKey) {
		t.Errorf("for another volume: %v", err)
	}
	cut := wrapped
	cut.Data = cut.Data[:5]
	if _, err := w.Unwrap(t.Context(), cut, []byte("v1")); !errors.Is(err, datastore.ErrKey) {
		t.Errorf("cut off: %v", err)
	}
	wrapped.Class = "of before, and gone"
	if key, err := w.Unwrap(t.Context(), wrapped, []byte("v1")); err != nil || string(key) != "secret" {
		t.Errorf("without the class: %q, %v", key, err)
	}
	wrapped.Class, wrapped.Provider, wrapped.KeyID = "a", "", "" // as older versions have written it
	if key, err := w.Unwrap(t.Context(), wrapped, []byte("v1")); err != nil || string(key) != "secret" {
		t.Errorf("without a provider: %q, %v", key, err)
	}
	wrapped.Provider, wrapped.KeyID = "b", "key-000"
	if _, err := w.Unwrap(t.Context(), wrapped, []byte("v1")); !errors.Is(err, datastore.ErrKey) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("another key under its name: %v", err)
	}
	wrapped.KeyID = "key-007"
	if _, err := w.Unwrap(t.Context(), wrapped, []byte("v1")); !errors.Is(err, datastore.ErrKey) || !strings.Contains(err.Error(), `no key "key-007"`) {
		t.Errorf("key-encryption key gone: %v", err)
	}
	for _, class := range []string{"none", "short"} {
		if _, err := w.Wrap(t.Context(), class, []byte("secret"), nil); !errors.Is(err, datastore.ErrKey) {
			t.Errorf("class %s: %v", class, err)
		}
	}
}

// TestNoSuchKey: who names a wrong key learns which others there are from nobody.
func TestNoSuchKey(t *testing.T) {
	_, err := ring{"corp", map[string][]byte{"other-team": make([]byte, Size)}}.Find(t.Context(), "guess")
	if err == nil || strings.Contains(err.Error(), "other-team") || !strings.Contains(err.Error(), `no key "guess"`) || !strings.Contains(err.Error(), "administrator") {
		t.Error(err)
	}
}

// vault is a provider of a kind that is not known.
type vault struct{ Static }

func (vault) Provider(context.Context, string) (string, map[string][]byte, error) {
	return "example.org/vault", nil, nil
}

func TestUnknownKind(t *testing.T) {
	_, err := Wrapper{Source: vault{Static{"a": {make([]byte, Size)}}}}.Current(t.Context(), "a")
	if !errors.Is(err, datastore.ErrKey) || !strings.Contains(err.Error(), `"example.org/vault"`) || !strings.Contains(err.Error(), `"Secret"`) {
		t.Error(err)
	}
}
