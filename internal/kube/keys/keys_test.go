package keys

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/storage/datastore"
)

// class is an EncryptionClass as a server has it.
func class(namespace, name, provider, key string, labels map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": api.GroupVersion().String(), "kind": "EncryptionClass",
		"metadata": map[string]any{"namespace": namespace, "name": name, "labels": labels},
		"spec":     map[string]any{"keyProvider": provider, "keyID": key},
	}}
}

// reader has these objects.
func reader(core []runtime.Object, classes ...runtime.Object) *Secrets {
	kinds := map[schema.GroupVersionResource]string{api.Classes(): "EncryptionClassList"}
	objects := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds, classes...)
	return &Secrets{client: fake.NewClientset(core...), classes: objects.Resource(api.Classes())}
}

func TestProvider(t *testing.T) {
	secret := func(name string, kind corev1.SecretType, data map[string][]byte) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: name}, Data: data, Type: kind}
	}
	key := bytes.Repeat([]byte{1}, 32)
	s := reader([]runtime.Object{
		secret("good", corev1.SecretTypeOpaque, map[string][]byte{"2026-01": key}),
		secret("tls", corev1.SecretTypeTLS, map[string][]byte{"tls.key": []byte("secret words")}),
	})
	if kind, keys, err := s.Provider(t.Context(), "good"); err != nil || kind != "Secret" || !bytes.Equal(keys["2026-01"], key) {
		t.Errorf("%s, %v, %v", kind, keys, err)
	}
	if kind, keys, err := s.Provider(t.Context(), "tls"); err != nil || kind != "kubernetes.io/tls" || keys != nil {
		t.Errorf("%s, %v, %v", kind, keys, err)
	}
	if _, _, err := s.Provider(t.Context(), "gone"); err == nil || !strings.Contains(err.Error(), `no key provider "gone"`) || !strings.Contains(err.Error(), "Secret atoll-keys/gone") {
		t.Error(err)
	}
}

func TestClass(t *testing.T) {
	s := reader(nil, class("team", "gold", "corp", "2026", nil), class("team", "empty", "", "", nil))
	for _, c := range []struct{ class, provider, key, err string }{
		{class: "corp", provider: "corp"},
		{class: "team/gold", provider: "corp", key: "2026"},
		{class: "team/empty", err: "spec.keyProvider of EncryptionClass team/empty is empty"},
		{class: "other/gold", err: "there is no EncryptionClass other/gold"},
	} {
		provider, key, err := s.Class(t.Context(), c.class)
		if provider != c.provider || key != c.key || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q %q %v", c.class, provider, key, err)
		}
	}
}

func TestClaim(t *testing.T) {
	claim := func(namespace, name string, annotations map[string]string) *corev1.PersistentVolumeClaim {
		return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: annotations}}
	}
	named := func(class string) map[string]string { return map[string]string{api.ClaimAnnotation: class} }
	def := map[string]any{api.DefaultLabel: "true"}
	s := reader([]runtime.Object{
		claim("team", "named", named("silver")), claim("team", "plain", nil), claim("team", "bad", named("other/gold")), claim("team", "blank", named("")),
		claim("none", "plain", nil), claim("two", "plain", nil),
	}, class("team", "gold", "corp", "", def), class("team", "silver", "corp", "", nil), class("two", "a", "corp", "", def), class("two", "b", "corp", "", def))
	for _, c := range []struct{ namespace, name, fallback, want, err string }{
		{"team", "named", "", "team/silver", ""},
		{"team", "named", "corp", "team/silver", ""},
		{"team", "plain", "", "", ""},
		{"team", "plain", "corp", "team/gold", ""},
		{"team", "bad", "corp", "", `annotation "csi.vsphere.encryption-class" of claim team/bad is "other/gold"`},
		{"team", "blank", "corp", "", "must be the name of an EncryptionClass"},
		{"none", "plain", "corp", "corp", ""},
		{"two", "plain", "", "", ""},
		{"two", "plain", "corp", "", "several default EncryptionClasses, a, b"},
		{"team", "gone", "corp", "", "claim team/gone"},
	} {
		got, err := s.Claim(t.Context(), c.namespace, c.name, c.fallback)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s/%s, %q: %q, %v", c.namespace, c.name, c.fallback, got, err)
		}
	}
}

// TestOutage: an API server that does not answer is told apart from what is wrong with the objects.
func TestOutage(t *testing.T) {
	core := fake.NewClientset()
	core.PrependReactor("get", "persistentvolumeclaims", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if action.(clienttesting.GetAction).GetName() == "gone" {
			return false, nil, nil
		}
		return true, nil, apierrors.NewServiceUnavailable("starting")
	})
	s := reader(nil)
	s.client = core
	if _, err := s.Claim(t.Context(), "team", "data", ""); !errors.Is(err, datastore.ErrUnavailable) || !apierrors.IsServiceUnavailable(err) {
		t.Error(err)
	}
	if _, err := s.Claim(t.Context(), "team", "gone", ""); err == nil || errors.Is(err, datastore.ErrUnavailable) {
		t.Error(err)
	}
}
