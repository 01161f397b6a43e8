package keys

import (
	"bytes"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestKeys(t *testing.T) {
	secret := func(name string, data map[string][]byte) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: name}, Data: data}
	}
	old, current := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	s := &Secrets{client: fake.NewClientset(
		secret("good", map[string][]byte{"2026-02": current, "2026-01": old}),
		secret("empty", nil),
		secret("short", map[string][]byte{"a": []byte("secret words")}),
	)}
	got, err := s.Current(t.Context(), "good")
	if err != nil || !bytes.Equal(got, current) {
		t.Errorf("%v, %v", got, err)
	}
	all, err := s.All(t.Context(), "good")
	if err != nil || len(all) != 2 || !bytes.Equal(all[0], old) {
		t.Errorf("%v, %v", all, err)
	}
	for class, want := range map[string]string{"missing": "no Secret atoll-keys/missing", "empty": "atoll-keys/empty is empty", "short": `entry "a"`} {
		_, err := s.Current(t.Context(), class)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", class, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret words") {
			t.Errorf("the error tells the key: %v", err)
		}
	}
}
