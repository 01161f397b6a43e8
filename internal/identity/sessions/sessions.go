// Package sessions keeps who is logged in: one Secret per session in the namespace atoll-system, named after the
// digest of the session's secret name, and all of them in memory.
//
// A session that is begun or ended here counts at once; one that is ended elsewhere (its Secret is deleted) counts
// as soon as the watch tells. Whether the user may still use it is not decided here. internal/identity is the caller.
//
// What can go wrong: the API server does not answer, which Begin and End return. A Secret that is no session is
// ignored.
package sessions

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

const (
	// Label is on the Secrets; its value is the name of the User.
	Label = "atoll.dev/session"

	secretType = "atoll.dev/session"
	dataKey    = "session"
	prefix     = "session-"
	// maxPerUser is how many sessions a user may have; one more ends the oldest.
	maxPerUser = 50
	// lag is more than what the informer may tell late.
	lag = 10 * time.Minute
)

// Session is one login.
type Session struct {
	// ID is the digest of the secret name.
	ID         string    `json:"-"`
	User       string    `json:"user"`
	UID        types.UID `json:"uid"`
	Generation int64     `json:"generation"`
	Created    time.Time `json:"created"`
	Expires    time.Time `json:"expires"`
	Source     string    `json:"source,omitempty"`
}

// Store keeps sessions. Make one with New.
type Store struct {
	client client.Client
	now    func() time.Time
	logger *slog.Logger

	mu    sync.Mutex
	byID  map[string]Session
	ended map[string]time.Time // here, of which the informer may yet tell that they began
}

// New makes a store. Handler must be registered with an informer of the Secrets that have Label.
func New(c client.Client, now func() time.Time, logger *slog.Logger) *Store {
	return &Store{client: c, now: now, logger: logger, byID: map[string]Session{}, ended: map[string]time.Time{}}
}

// Get returns a session that has not ended.
func (s *Store) Get(id string) (Session, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, ok := s.byID[id]
	return found, ok && s.now().Before(found.Expires)
}

// Of lists the sessions of a user, oldest first.
func (s *Store) Of(user string) []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Session
	for _, one := range s.byID {
		if one.User == user && s.now().Before(one.Expires) {
			out = append(out, one)
		}
	}
	slices.SortFunc(out, func(a, b Session) int { return a.Created.Compare(b.Created) })
	return out
}

// Begin stores a session.
func (s *Store) Begin(ctx context.Context, one Session) error {
	data, err := json.Marshal(one)
	if err != nil {
		return fmt.Errorf("beginning a session: %w", err)
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: api.IdentityNamespace, Name: prefix + one.ID, Labels: map[string]string{Label: one.User},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: api.GroupVersion().String(), Kind: "User", Name: one.User, UID: one.UID}},
		},
		Type: secretType, Data: map[string][]byte{dataKey: data},
	}
	if err := s.client.Create(ctx, secret); err != nil {
		return fmt.Errorf("beginning a session: %w", err)
	}
	s.put(one)
	for have := s.Of(one.User); len(have) > maxPerUser; have = have[1:] {
		if err := s.End(ctx, have[0].ID); err != nil {
			return err
		}
	}
	return nil
}

// End removes a session. One that is not there is no error.
func (s *Store) End(ctx context.Context, id string) error {
	s.mu.Lock()
	delete(s.byID, id)
	s.ended[id] = s.now()
	s.mu.Unlock()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: api.IdentityNamespace, Name: prefix + id}}
	if err := s.client.Delete(ctx, secret); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("ending a session: %w", err)
	}
	return nil
}

// Sweep removes what has expired.
func (s *Store) Sweep(ctx context.Context) {
	s.mu.Lock()
	var old []string
	for id, one := range s.byID {
		if !s.now().Before(one.Expires) {
			old = append(old, id)
		}
	}
	maps.DeleteFunc(s.ended, func(_ string, at time.Time) bool { return s.now().Sub(at) > lag })
	s.mu.Unlock()
	for _, id := range old {
		if err := s.End(ctx, id); err != nil {
			s.logger.Warn("an expired session stays for now", "error", err)
			return
		}
	}
}

// Handler keeps the store like the Secrets.
func (s *Store) Handler() cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: s.see,
		UpdateFunc: func(_, now any) {
			s.see(now)
		},
		DeleteFunc: func(gone any) {
			if last, ok := gone.(cache.DeletedFinalStateUnknown); ok {
				gone = last.Obj
			}
			if secret, ok := gone.(*corev1.Secret); ok && len(secret.Name) > len(prefix) {
				s.drop(secret.Name[len(prefix):])
			}
		},
	}
}

func (s *Store) see(object any) {
	secret, ok := object.(*corev1.Secret)
	if !ok || secret.Type != secretType || len(secret.Name) <= len(prefix) {
		return
	}
	var one Session
	if err := json.Unmarshal(secret.Data[dataKey], &one); err != nil || one.User == "" {
		s.logger.Warn("a Secret is labelled as a session, but is none", "name", secret.Name)
		return
	}
	one.ID = secret.Name[len(prefix):]
	if secret.DeletionTimestamp != nil {
		s.drop(one.ID)
		return
	}
	s.put(one)
}

func (s *Store) put(one Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ended := s.ended[one.ID]; !ended {
		s.byID[one.ID] = one
	}
}

func (s *Store) drop(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID, id)
}
