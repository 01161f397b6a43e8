package identity

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/attempts"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
)

// Errors of logging in. What is wrong with a name or password is always ErrRefused.
var (
	ErrRefused = errors.New("wrong user name or password")
	// ErrMustChange says that the password is right, but must be changed first.
	ErrMustChange = errors.New("the password must be changed before you can log in; do it with: atoll user passwd")
	// ErrBusy says that too many people log in at once.
	ErrBusy = password.ErrBusy
	// ErrNotReady says that the server has just been started.
	ErrNotReady = errors.New("the server is starting; try again in a moment")
)

// LockedError says that a user or an address has failed too often.
type LockedError struct{ Until time.Time }

func (e LockedError) Error() string {
	return fmt.Sprintf("too many failed logins; try again after %s", e.Until.UTC().Format(time.RFC3339))
}

const (
	// refusalTakes is how long a refusal takes at least, so that it does not tell whether there is such a user.
	refusalTakes = 500 * time.Millisecond
	// perSource is how many logins of one address go on at the same time.
	perSource = 8
	// noteEvery is how often a login is noted in the status of a user.
	noteEvery = time.Minute
)

// account is what a password is checked against.
type account struct {
	// user is nil when there is none of the name.
	user    *api.User
	hash    string
	changed time.Time
}

// verify checks a password and returns the user. Every failure counts, for the user and for the address.
func (s *Service) verify(ctx context.Context, typed, secret string) (*api.User, policy, error) {
	if !s.isStarted() {
		return nil, policy{}, ErrNotReady
	}
	began := s.cfg.Now()
	source := attempts.Source(sourceOf(ctx))
	leave, ok := s.gate.Enter(source, perSource)
	if !ok {
		return nil, policy{}, ErrBusy
	}
	defer leave()
	user, rules, err := s.verifyInTurn(ctx, typed, secret, source)
	if errors.Is(err, ErrRefused) {
		s.sources.Fail(source)
		if err := pause(ctx, refusalTakes-s.cfg.Now().Sub(began)); err != nil {
			return nil, rules, err
		}
	}
	return user, rules, err
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(max(d, 0))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// verifyInTurn lets one attempt per user go on at a time, so that many at once cannot get ahead of the lock.
func (s *Service) verifyInTurn(ctx context.Context, typed, secret, source string) (*api.User, policy, error) {
	if until := s.sources.LockedUntil(source); !until.IsZero() {
		return nil, policy{}, LockedError{until}
	}
	name, ok := directory.LocalName(typed)
	if !ok {
		return nil, policy{}, ErrRefused // there can be no such user, so nothing is told by being quick
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	turn := s.turns[h.Sum32()%stripes]
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return nil, policy{}, ctx.Err()
	}
	rules, err := s.policy(ctx)
	if err != nil {
		return nil, rules, err
	}
	a, err := s.account(ctx, name)
	if err != nil {
		return nil, rules, err
	}
	now := s.cfg.Now()
	if until := s.lockedUntil(a, name); now.Before(until) {
		return nil, rules, LockedError{until}
	}
	hash := a.hash
	if a.user == nil || a.user.Spec.Disabled {
		hash = ""
	}
	matches, err := s.comparer.Matches(ctx, hash, secret)
	if err != nil {
		return nil, rules, err
	}
	if !matches {
		return nil, rules, s.refuse(ctx, a, name, rules)
	}
	if err := s.note(ctx, a.user, now); err != nil {
		return nil, rules, err
	}
	if a.user.Spec.MustChangePassword || rules.maxAge > 0 && now.Sub(a.changed) > rules.maxAge {
		return a.user, rules, ErrMustChange
	}
	return a.user, rules, nil
}

// account reads user and hash from the API server, not from a cache: a lock must count at once.
func (s *Service) account(ctx context.Context, name string) (account, error) {
	var a account
	u := &api.User{}
	err := s.client.Get(ctx, client.ObjectKey{Name: name}, u)
	switch {
	case err == nil:
		a.user = u
	case !apierrors.IsNotFound(err):
		return a, fmt.Errorf("looking up the user: %w", err)
	}
	secret := &corev1.Secret{}
	err = s.client.Get(ctx, client.ObjectKey{Namespace: api.IdentityNamespace, Name: api.PasswordSecretPrefix + name}, secret)
	switch {
	case err == nil && a.user != nil && !ownedBy(secret, a.user):
		// The password of a user who had the name before and is about to be collected.
	case err == nil:
		a.hash = string(secret.Data[api.PasswordHashKey])
		a.changed, _ = time.Parse(time.RFC3339, string(secret.Data[api.PasswordChangedKey]))
	case !apierrors.IsNotFound(err):
		return a, fmt.Errorf("looking up the password: %w", err)
	}
	return a, nil
}

func ownedBy(o, owner metav1.Object) bool {
	return slices.ContainsFunc(o.GetOwnerReferences(), func(r metav1.OwnerReference) bool { return r.UID == owner.GetUID() })
}

func (s *Service) lockedUntil(a account, name string) time.Time {
	if a.user == nil {
		return s.strangers.LockedUntil(name)
	}
	if until := a.user.Status.LockedUntil; until != nil {
		return until.Time
	}
	return time.Time{}
}

// refuse counts a failure. It returns ErrRefused unless it could not be counted.
func (s *Service) refuse(ctx context.Context, a account, name string, rules policy) error {
	if a.user == nil {
		s.strangers.Fail(name)
		return ErrRefused
	}
	failures := a.user.Status.FailedLogins + 1
	// Names of nobody are not logged: people type passwords there.
	s.cfg.Logger.Info("login refused", "user", name, "failures", failures, "source", sourceOf(ctx))
	status := map[string]any{"failedLogins": failures}
	if lock := userRule(rules).Lock(int(failures)); lock > 0 {
		// Times in the API have whole seconds.
		status["lockedUntil"] = metav1.NewTime(s.cfg.Now().Add(lock + time.Second - 1).Truncate(time.Second))
	}
	if err := patchStatus(ctx, s.client, name, status); err != nil {
		return fmt.Errorf("counting a failed login: %w", err)
	}
	return ErrRefused
}

// note writes down a login that worked, but not each of many in a row.
func (s *Service) note(ctx context.Context, u *api.User, now time.Time) error {
	last := u.Status.LastLogin
	if u.Status.FailedLogins == 0 && u.Status.LockedUntil == nil && last != nil && now.Sub(last.Time) < noteEvery {
		return nil
	}
	from := ""
	if addr := sourceOf(ctx); addr.IsValid() {
		from = addr.String()
	}
	err := patchStatus(ctx, s.client, u.Name, map[string]any{
		"failedLogins": nil, "lockedUntil": nil, "lastLogin": metav1.NewTime(now), "lastLoginFrom": from,
	})
	if err != nil {
		return fmt.Errorf("noting the login: %w", err)
	}
	return nil
}

func (s *Service) isStarted() bool {
	select {
	case <-s.started:
		return true
	default:
		return false
	}
}
