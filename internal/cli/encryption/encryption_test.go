package encryption

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
)

func TestNewName(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for newest, want := range map[string]string{
		"":                         "2026-03-04-050607",
		"2025-12-31":               "2026-03-04-050607",
		"key":                      "key-2026-03-04-050607",
		"key-2026-01-01-000000":    "key-2026-03-04-050607",
		"2026-03-04-050607":        "2026-03-04-050607-2026-03-04-050607",
		"z-2026-01-01-000000-more": "z-2026-01-01-000000-more-2026-03-04-050607",
	} {
		if got := newName(newest, now); got != want || got <= newest {
			t.Errorf("%q: %q, want %q", newest, got, want)
		}
	}
}

func TestRotate(t *testing.T) {
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "atoll-keys", Name: "corp"},
		Data:       map[string][]byte{"a": make([]byte, 32), "b": make([]byte, 32)},
	}
	tls := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "atoll-keys", Name: "tls"}, Type: corev1.SecretTypeTLS}
	class := func(name, provider, key string) runtime.Object {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": api.GroupVersion().String(), "kind": "EncryptionClass",
			"metadata": map[string]any{"namespace": "team", "name": name}, "spec": map[string]any{"keyProvider": provider, "keyID": key},
		}}
	}
	kinds := map[schema.GroupVersionResource]string{api.Classes(): "EncryptionClassList"}
	objects := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds,
		class("fixed", "corp", "a"), class("free", "corp", ""), class("lost", "nobody", ""))
	c := &Client{
		core: fake.NewClientset(secret, tls), classes: objects.Resource(api.Classes()),
		now: func() time.Time { return time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC) },
	}
	for _, step := range []struct {
		of, id string
		want   Key
		err    string
	}{
		{of: "team/fixed", id: "b", want: Key{"corp", "b", false}},
		{of: "team/fixed", id: "0", want: Key{"corp", "0", true}}, // named, so the order does not matter
		{of: "team/free", id: "a", err: `the name of "b" sorts after it`},
		{of: "team/free", want: Key{"corp", "b-2026-03-04-050607", true}},
		{of: "corp", id: "c", want: Key{"corp", "c", true}},
		{of: "corp", id: "no spaces", err: `key "no spaces"`},
		{of: "team/lost", err: `no key provider "nobody"`},
		{of: "team/gone", err: "no EncryptionClass team/gone"},
		{of: "tls", err: `of kind "kubernetes.io/tls"`},
	} {
		got, err := c.Rotate(t.Context(), step.of, step.id)
		if got != step.want || (err == nil) != (step.err == "") || err != nil && !strings.Contains(err.Error(), step.err) {
			t.Errorf("%s %q: %+v, %v", step.of, step.id, got, err)
		}
	}
	if got, err := c.class(t.Context(), "team/fixed"); err != nil || got.Spec.KeyID != "0" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := c.class(t.Context(), "team/free"); err != nil || got.Spec.KeyID != "" {
		t.Errorf("%+v, %v", got, err)
	}
	after, err := c.core.CoreV1().Secrets("atoll-keys").Get(t.Context(), "corp", metav1.GetOptions{})
	if err != nil || len(after.Data) != 5 || len(after.Data["c"]) != 32 || string(after.Data["c"]) == string(after.Data["a"]) {
		t.Errorf("%d keys, %v", len(after.Data), err)
	}
}

// TestWaitForWhatCannotBeSeen: a rotation is not done while volumes may be hidden, and says why.
func TestWaitForWhatCannotBeSeen(t *testing.T) {
	class := func(status, reason string) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": api.GroupVersion().String(), "kind": "EncryptionClass",
			"metadata": map[string]any{"namespace": "team", "name": "gold", "generation": int64(1)},
			"spec":     map[string]any{"keyProvider": "corp"},
			"status": map[string]any{"keyID": "b", "conditions": []any{
				map[string]any{"type": api.ClassReady, "status": "True", "reason": "KeyUsable", "observedGeneration": int64(1)},
				map[string]any{"type": api.ClassKeysCurrent, "status": status, "reason": reason, "message": "datastore far", "observedGeneration": int64(1)},
			}},
		}}
	}
	kinds := map[schema.GroupVersionResource]string{api.Classes(): "EncryptionClassList"}
	objects := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds, class("Unknown", "NotAllSeen"))
	c := &Client{classes: objects.Resource(api.Classes()), now: time.Now}
	said := ""
	err := c.Wait(t.Context(), "team/gold", Key{Provider: "corp", ID: "b"}, func(int, int) {}, func(why string) {
		said = why
		if _, err := c.classes.Namespace("team").Update(t.Context(), class("True", "AllCurrent"), metav1.UpdateOptions{}); err != nil {
			t.Error(err)
		}
	})
	if err != nil || said != "datastore far" {
		t.Errorf("said %q, %v", said, err)
	}
}
