package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
	"atoll.dev/atoll/internal/identity/sessions"
	"atoll.dev/atoll/internal/identity/token"
)

// ErrNoSession says that a token is of no session that goes on.
var ErrNoSession = errors.New("you are not logged in: the token is unknown, expired or revoked")

// accessLife is how long an access token is good for before it must be refreshed. What ends a session ends them, too.
const accessLife = 10 * time.Minute

// Person is who a token or password belongs to.
type Person struct {
	// Name and Groups are those in Kubernetes.
	Name   string
	UID    string
	Groups []string
	// Generation is the user's when the session began or the password was checked. It is set for local people only.
	Generation int64
	// Session and Expires are set for local sessions only.
	Session string
	Expires time.Time
}

// person is who a session is of, in the groups of now.
func person(one sessions.Session, groups []string) Person {
	return Person{
		Name: api.LocalSubject(one.User), UID: string(one.UID), Groups: groups, Generation: one.Generation, Session: one.ID, Expires: one.Expires,
	}
}

// Tokens are the result of a login.
type Tokens struct {
	Person Person
	// Access is for the API server until Expires.
	Access  string
	Expires time.Time
	// Refresh gets new access tokens until SessionExpires.
	Refresh        string
	SessionExpires time.Time
}

// Login checks a password and begins a session. whole makes an access token that lives as long as the session, for
// clients that cannot refresh.
func (s *Service) Login(ctx context.Context, typed, secret string, whole bool) (Tokens, error) {
	user, rules, err := s.verify(ctx, typed, secret)
	if err != nil {
		return Tokens{}, err
	}
	if err := s.seen(ctx, user); err != nil {
		return Tokens{}, err
	}
	now := s.cfg.Now()
	id := token.NewID()
	source := ""
	if addr := sourceOf(ctx); addr.IsValid() {
		source = addr.String()
	}
	one := sessions.Session{
		ID: token.Digest(id), User: user.Name, UID: user.UID, Generation: user.Spec.SessionGeneration,
		Created: now, Expires: now.Add(rules.lifetime()), Source: source,
	}
	if err := s.sessions.Begin(ctx, one); err != nil {
		return Tokens{}, err
	}
	s.cfg.Logger.Info("logged in", "user", user.Name, "session", one.ID, "source", source, "until", one.Expires.UTC())
	return s.tokens(ctx, id, one, whole)
}

// seenWithin is how long the directory may take to see a user that the API server has, and the groups.
const seenWithin = 25 * time.Second

// seen waits until the directory, which is asked at each request, has seen a user as the API server has it, in the same
// groups. The first requests of somebody who was made, enabled, given a password or added to a group a moment ago would
// be refused otherwise.
func (s *Service) seen(ctx context.Context, user *api.User) error {
	within, cancel := context.WithTimeout(ctx, seenWithin)
	defer cancel()
	err := wait.PollUntilContextCancel(within, 20*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		known, err := s.directory.User(ctx, user.Name)
		return known != nil && known.UID == user.UID && known.Generation >= user.Generation, err
	})
	if err == nil {
		err = s.seenGroups(within, user)
	}
	if !wait.Interrupted(err) || ctx.Err() != nil {
		return err
	}
	a, err := s.account(ctx, user.Name)
	switch {
	case err != nil:
		return err
	case a.user == nil || a.user.UID != user.UID: // it is gone by now
		return ErrRefused
	}
	return ErrNotReady
}

// seenGroups waits for the groups, which another watch brings. They may change meanwhile, so they are read anew each time.
func (s *Service) seenGroups(ctx context.Context, user *api.User) error {
	latest := directory.New(s.client)
	return wait.PollUntilContextCancel(ctx, retryEvery, true, func(ctx context.Context) (bool, error) {
		want, err := latest.Groups(ctx, user.Name)
		if err != nil {
			return false, err
		}
		known, err := s.directory.Groups(ctx, user.Name)
		return slices.Equal(known, want), err
	})
}

// tokens makes the tokens of a session.
func (s *Service) tokens(ctx context.Context, id string, one sessions.Session, whole bool) (Tokens, error) {
	groups, err := s.directory.Groups(ctx, one.User)
	if err != nil {
		return Tokens{}, err
	}
	now := s.cfg.Now()
	t := Tokens{
		Person:  person(one, groups),
		Expires: one.Expires, SessionExpires: one.Expires,
	}
	if short := now.Add(accessLife); !whole && short.Before(one.Expires) {
		t.Expires = short
	}
	claims := token.Claims{
		Subject: t.Person.Name, Username: one.User + "@" + api.LocalDomain, Domain: api.LocalDomain,
		ID: id, Use: token.Access, IssuedAt: now.Unix(), Expires: t.Expires.Unix(),
	}
	if t.Access, err = s.signer.Sign(claims); err != nil {
		return Tokens{}, fmt.Errorf("making a token: %w", err)
	}
	claims.Use, claims.Expires = token.Refresh, one.Expires.Unix()
	if t.Refresh, err = s.signer.Sign(claims); err != nil {
		return Tokens{}, fmt.Errorf("making a token: %w", err)
	}
	return t, nil
}

// Refresh makes a new access token.
func (s *Service) Refresh(ctx context.Context, refresh string) (Tokens, error) {
	if !s.isStarted() {
		return Tokens{}, ErrNotReady
	}
	id, one, err := s.session(ctx, refresh, token.Refresh)
	if err != nil {
		return Tokens{}, err
	}
	return s.tokens(ctx, id, one, false)
}

// session is the one a token belongs to, if the user may still use it.
func (s *Service) session(ctx context.Context, text, use string) (id string, one sessions.Session, err error) {
	claims, err := s.signer.Verify(text, use, s.cfg.Now())
	if err != nil {
		return "", one, ErrNoSession
	}
	one, ok := s.sessions.Get(token.Digest(claims.ID))
	if !ok {
		return "", one, ErrNoSession
	}
	user, err := s.directory.User(ctx, one.User)
	if err != nil {
		return "", one, err
	}
	if user == nil || user.UID != one.UID || user.Spec.SessionGeneration != one.Generation || user.Spec.Disabled || user.Spec.MustChangePassword {
		return "", one, ErrNoSession
	}
	return claims.ID, one, nil
}

// Review tells who a local access token belongs to. It talks to nobody.
func (s *Service) Review(ctx context.Context, text string) (Person, error) {
	if !s.isStarted() {
		return Person{}, ErrNotReady
	}
	_, one, err := s.session(ctx, text, token.Access)
	if err != nil {
		return Person{}, err
	}
	groups, err := s.directory.Groups(ctx, one.User)
	if err != nil {
		return Person{}, err
	}
	return person(one, groups), nil
}

// Logout ends the session of a token, access or refresh.
func (s *Service) Logout(ctx context.Context, text string) error {
	if !s.isStarted() {
		return ErrNotReady
	}
	for _, use := range []string{token.Access, token.Refresh} {
		if claims, err := s.signer.Verify(text, use, s.cfg.Now()); err == nil {
			s.cfg.Logger.Info("logged out", "user", claims.Username, "session", token.Digest(claims.ID))
			return s.sessions.End(ctx, token.Digest(claims.ID))
		}
	}
	return ErrNoSession
}

// ChangePassword sets another password and ends all sessions of the user.
func (s *Service) ChangePassword(ctx context.Context, typed, old, wanted string) error {
	user, rules, err := s.verify(ctx, typed, old)
	if err != nil && !errors.Is(err, ErrMustChange) {
		return err
	}
	if wanted == old {
		return PasswordError{errors.New("the new password is the old one; choose another")}
	}
	if err := rules.password.Check(user.Name, wanted); err != nil {
		return PasswordError{err}
	}
	hash, err := password.Hash(wanted)
	if err != nil {
		return err
	}
	if err := StorePassword(ctx, s.client, user, hash, false, s.cfg.Now()); err != nil {
		return err
	}
	s.cfg.Logger.Info("password changed", "user", user.Name)
	for _, one := range s.sessions.Of(user.Name) {
		if err := s.sessions.End(ctx, one.ID); err != nil {
			return err
		}
	}
	return nil
}

// PasswordError says what is wrong with a new password.
type PasswordError struct{ error }

// Authenticate tells who somebody is by user name and password, or by a token as the password; then the name is not
// looked at. It is for services that speak HTTP basic authentication; the source of the attempt is in ctx
// (WithSource). Stands tells afterwards whether it still holds.
func (s *Service) Authenticate(ctx context.Context, username, secret string) (Person, error) {
	if token.Looks(secret) {
		return s.Bearer(ctx, secret)
	}
	user, _, err := s.verify(ctx, username, secret)
	if err != nil {
		return Person{}, err
	}
	if err := s.seen(ctx, user); err != nil {
		return Person{}, err
	}
	groups, err := s.directory.Groups(ctx, user.Name)
	if err != nil {
		return Person{}, err
	}
	return Person{Name: api.LocalSubject(user.Name), UID: string(user.UID), Groups: groups, Generation: user.Spec.SessionGeneration}, nil
}

// Stands tells whether somebody whom Authenticate has let in may still be, and is in which groups now. It talks to
// nobody. Of people of another issuer nothing is known here: they are as they were.
func (s *Service) Stands(ctx context.Context, p Person) (Person, error) {
	if !s.isStarted() {
		return Person{}, ErrNotReady
	}
	name, domain, ok := api.SplitSubject(p.Name)
	if !ok || domain != api.LocalDomain {
		return p, nil
	}
	if one, ok := s.sessions.Get(p.Session); p.Session != "" && (!ok || one.User != name) {
		return Person{}, ErrNoSession
	}
	user, err := s.directory.User(ctx, name)
	if err != nil {
		return Person{}, err
	}
	// The password was compared with what the API server had, which may be newer than what is seen here.
	if user == nil || string(user.UID) != p.UID || user.Spec.SessionGeneration > p.Generation || user.Spec.Disabled || user.Spec.MustChangePassword {
		return Person{}, ErrNoSession
	}
	p.Groups, err = s.directory.Groups(ctx, name)
	return p, err
}

// Exists tells whether there is a local user of a name that somebody typed.
func (s *Service) Exists(ctx context.Context, typed string) (bool, error) {
	name, ok := directory.LocalName(typed)
	if !ok || !s.isStarted() {
		return false, nil
	}
	u, err := s.directory.User(ctx, name)
	return u != nil, err
}
