package sessions

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

func TestBounded(t *testing.T) {
	now := time.Now()
	c := fake.NewClientBuilder().Build()
	s := New(c, func() time.Time { return now }, slog.New(slog.DiscardHandler))
	for i := range maxPerUser + 3 {
		one := Session{ID: fmt.Sprint(i), User: "anna", Created: now.Add(time.Duration(i)), Expires: now.Add(time.Hour)}
		if err := s.Begin(t.Context(), one); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.Get("2"); ok || len(s.Of("anna")) != maxPerUser {
		t.Errorf("%d sessions", len(s.Of("anna")))
	}
	var stored corev1.SecretList
	if err := c.List(t.Context(), &stored, client.HasLabels{Label}); err != nil || len(stored.Items) != maxPerUser {
		t.Errorf("%d Secrets, %v", len(stored.Items), err)
	}
	if err := s.End(t.Context(), "none"); err != nil {
		t.Errorf("ending what is not there: %v", err)
	}
	now = now.Add(time.Hour)
	if _, ok := s.Get("5"); ok {
		t.Error("an expired session goes on")
	}
}

// TestHandler: what others do with the Secrets counts, and what is no session is none.
func TestHandler(t *testing.T) {
	s := New(fake.NewClientBuilder().Build(), time.Now, slog.New(slog.DiscardHandler))
	secret := func(name, kind, data string) *corev1.Secret {
		return &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: api.IdentityNamespace, Name: name}, Type: corev1.SecretType(kind), Data: map[string][]byte{dataKey: []byte(data)},
		}
	}
	good := `{"user":"anna","uid":"1","generation":2,"expires":"2999-01-01T00:00:00Z"}`
	h := s.Handler()
	for _, other := range []any{
		secret("session-a", "Opaque", good), secret("session-", secretType, good), secret("session-b", secretType, "{"), secret("session-c", secretType, `{}`),
		secret("x", secretType, good), &corev1.Pod{}, nil,
	} {
		h.OnAdd(other, true)
	}
	if len(s.byID) != 0 {
		t.Errorf("taken for sessions: %v", s.byID)
	}
	one := secret("session-d", secretType, good)
	h.OnAdd(one, true)
	got, ok := s.Get("d")
	if !ok || got.User != "anna" || got.UID != "1" || got.Generation != 2 {
		t.Errorf("%+v", got)
	}
	h.OnDelete(cache.DeletedFinalStateUnknown{Key: "x", Obj: one})
	if _, ok := s.Get("d"); ok {
		t.Error("a deleted session goes on")
	}
	h.OnAdd(one, false)
	gone := one.DeepCopy()
	gone.DeletionTimestamp = new(metav1.Now())
	h.OnUpdate(one, gone)
	if _, ok := s.Get("d"); ok {
		t.Error("a session that is being deleted goes on")
	}
}

// TestEndedStays: what the informer tells late does not bring back a session that was ended here.
func TestEndedStays(t *testing.T) {
	now := time.Now()
	c := fake.NewClientBuilder().Build()
	s := New(c, func() time.Time { return now }, slog.New(slog.DiscardHandler))
	if err := s.Begin(t.Context(), Session{ID: "a", User: "anna", Expires: now.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: api.IdentityNamespace, Name: prefix + "a"}, secret); err != nil {
		t.Fatal(err)
	}
	if err := s.End(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	s.Handler().OnAdd(secret, false)
	if _, ok := s.Get("a"); ok {
		t.Error("a session that was ended goes on")
	}
	now = now.Add(2 * lag)
	s.Sweep(t.Context())
	if len(s.ended) != 0 {
		t.Errorf("kept for ever: %v", s.ended)
	}
}
