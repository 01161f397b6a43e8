package identity

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
	"atoll.dev/atoll/internal/identity/sessions"
	"atoll.dev/atoll/internal/identity/token"
)

const secret = "correct horse battery"

// world is a service on a fake API server.
type world struct {
	*Service
	mu  sync.Mutex
	now time.Time
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	kinds := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, api.AddToScheme} {
		if err := add(kinds); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{now: time.Now().Truncate(time.Second)}
	s, err := New(Config{
		Client: &rest.Config{}, WebhookAddress: "127.0.0.1:0", AuthenticationFile: "x", Logger: slog.New(slog.DiscardHandler), Now: w.clock,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.client = fake.NewClientBuilder().WithScheme(kinds).WithStatusSubresource(&api.User{}).WithObjects(objects...).Build()
	s.directory = directory.New(s.client)
	s.sessions = sessions.New(s.client, w.clock, slog.New(slog.DiscardHandler))
	if s.signer, err = token.NewSigner(token.NewKey()); err != nil {
		t.Fatal(err)
	}
	close(s.started)
	w.Service = s
	return w
}

// anna is a user with a password.
func anna(t *testing.T, w *world) *api.User {
	t.Helper()
	u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "1"}}
	if err := w.client.Create(t.Context(), u); err != nil {
		t.Fatal(err)
	}
	hash, err := password.Hash(secret)
	if err != nil {
		t.Fatal(err)
	}
	if err := StorePassword(t.Context(), w.client, u, hash, false, w.clock()); err != nil {
		t.Fatal(err)
	}
	return w.user(t)
}

func (w *world) user(t *testing.T) *api.User {
	t.Helper()
	u := &api.User{}
	if err := w.client.Get(t.Context(), client.ObjectKey{Name: "anna"}, u); err != nil {
		t.Fatal(err)
	}
	return u
}

func (w *world) change(t *testing.T, change func(*api.User)) {
	t.Helper()
	u := w.user(t)
	change(u)
	if err := w.client.Update(t.Context(), u); err != nil {
		t.Fatal(err)
	}
}

func TestLoginAndSessions(t *testing.T) {
	w := newWorld(t, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: "system:masters"}, Spec: api.GroupSpec{Members: []string{"anna"}}})
	anna(t, w)
	ctx := WithSource(t.Context(), netip.MustParseAddr("192.0.2.7"))
	got, err := w.Login(ctx, "Anna@atoll.local", secret, false)
	if err != nil {
		t.Fatal(err)
	}
	if got.Person.Name != "sso:anna@atoll.local" || !slices.Equal(got.Person.Groups, []string{"sso:system:masters@atoll.local"}) {
		t.Errorf("%+v", got.Person)
	}
	if u := w.user(t); u.Status.LastLoginFrom != "192.0.2.7" || u.Status.LastLogin == nil {
		t.Errorf("%+v", u.Status)
	}
	var stored corev1.SecretList
	if err := w.client.List(ctx, &stored, client.HasLabels{sessions.Label}); err != nil || len(stored.Items) != 1 {
		t.Fatalf("%v, %v", stored.Items, err)
	}
	claims, err := w.signer.Verify(got.Access, token.Access, w.clock())
	if err != nil || strings.Contains(string(stored.Items[0].Data["session"]), claims.ID) || strings.Contains(stored.Items[0].Name, claims.ID) {
		t.Errorf("the session's secret name is stored, %v", err)
	}
	if _, err := w.Review(ctx, got.Refresh); !errors.Is(err, ErrNoSession) {
		t.Errorf("a refresh token is let in: %v", err)
	}
	if _, err := w.Refresh(ctx, got.Access); !errors.Is(err, ErrNoSession) {
		t.Errorf("an access token refreshes: %v", err)
	}
	w.pass(accessLife)
	if _, err := w.Review(ctx, got.Access); !errors.Is(err, ErrNoSession) {
		t.Errorf("an old token is let in: %v", err)
	}
	again, err := w.Refresh(ctx, got.Refresh)
	if err != nil || !again.SessionExpires.Equal(got.SessionExpires) {
		t.Fatalf("%+v, %v", again, err)
	}
	if p, err := w.Authenticate(ctx, "whoever", again.Access); err != nil || p.Name != "sso:anna@atoll.local" || len(p.Groups) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
	if err := w.Logout(ctx, again.Access); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{again.Access, got.Access} {
		if _, err := w.Review(ctx, text); !errors.Is(err, ErrNoSession) {
			t.Errorf("replayed after the logout: %v", err)
		}
	}
	if _, err := w.Refresh(ctx, got.Refresh); !errors.Is(err, ErrNoSession) {
		t.Errorf("refreshed after the logout: %v", err)
	}
	whole, err := w.Login(ctx, "anna", secret, true)
	if err != nil || !whole.Expires.Equal(whole.SessionExpires) {
		t.Fatalf("%+v, %v", whole, err)
	}
	w.pass(defaultSession)
	if _, err := w.Review(ctx, whole.Access); !errors.Is(err, ErrNoSession) {
		t.Errorf("a session goes on for ever: %v", err)
	}
	w.sessions.Sweep(ctx)
	if err := w.client.List(ctx, &stored, client.HasLabels{sessions.Label}); err != nil || len(stored.Items) != 0 {
		t.Errorf("%d sessions are left, %v", len(stored.Items), err)
	}
}

// TestSessionsEnd: whatever ends a session does so without a word to the store.
// TestSameNameAgain: who gets a name that somebody had does not get the password, which may be there for a while.
func TestSameNameAgain(t *testing.T) {
	w := newWorld(t)
	first := anna(t, w)
	if err := w.client.Delete(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if err := w.client.Create(t.Context(), &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "2"}}); err != nil {
		t.Fatal(err)
	}
	ctx := WithSource(t.Context(), netip.MustParseAddr("192.0.2.7"))
	if _, err := w.Login(ctx, "anna", secret, false); !errors.Is(err, ErrRefused) {
		t.Errorf("the password of another anna: %v", err)
	}
}

func TestSessionsEnd(t *testing.T) {
	for name, change := range map[string]func(*api.User){
		"revoked":     func(u *api.User) { u.Spec.SessionGeneration++ },
		"disabled":    func(u *api.User) { u.Spec.Disabled = true },
		"must change": func(u *api.User) { u.Spec.MustChangePassword = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			anna(t, w)
			got, err := w.Login(t.Context(), "anna", secret, false)
			if err != nil {
				t.Fatal(err)
			}
			w.change(t, change)
			if _, err := w.Review(t.Context(), got.Access); !errors.Is(err, ErrNoSession) {
				t.Errorf("error %v", err)
			}
			if _, err := w.Refresh(t.Context(), got.Refresh); !errors.Is(err, ErrNoSession) {
				t.Errorf("error %v", err)
			}
		})
	}
	t.Run("made anew", func(t *testing.T) {
		w := newWorld(t)
		u := anna(t, w)
		got, err := w.Login(t.Context(), "anna", secret, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.client.Delete(t.Context(), u); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Review(t.Context(), got.Access); !errors.Is(err, ErrNoSession) {
			t.Errorf("deleted: %v", err)
		}
		other := &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "2"}, Spec: api.UserSpec{SessionGeneration: 1}}
		if err := w.client.Create(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Review(t.Context(), got.Access); !errors.Is(err, ErrNoSession) {
			t.Errorf("another anna: %v", err)
		}
	})
	t.Run("another password", func(t *testing.T) {
		w := newWorld(t)
		anna(t, w)
		got, err := w.Login(t.Context(), "anna", secret, false)
		if err != nil {
			t.Fatal(err)
		}
		for wanted, want := range map[string]string{"short": "at least", secret: "the old one", "i am anna and that is it": "name of the user"} {
			if err := w.ChangePassword(t.Context(), "anna", secret, wanted); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v", wanted, err)
			}
		}
		if err := w.ChangePassword(t.Context(), "anna", secret, "another horse battery"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Review(t.Context(), got.Access); !errors.Is(err, ErrNoSession) {
			t.Errorf("error %v", err)
		}
		if _, err := w.Login(t.Context(), "anna", secret, false); !errors.Is(err, ErrRefused) {
			t.Errorf("the old password: %v", err)
		}
		if _, err := w.Login(t.Context(), "anna", "another horse battery", false); err != nil {
			t.Errorf("the new password: %v", err)
		}
	})
}

func TestMustChange(t *testing.T) {
	w := newWorld(t, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: api.IdentityNamespace, Name: PolicyName}, Data: map[string]string{policyMaxAge: "30"}})
	anna(t, w)
	w.pass(31 * 24 * time.Hour)
	if _, err := w.Login(t.Context(), "anna", secret, false); !errors.Is(err, ErrMustChange) {
		t.Fatalf("an old password: %v", err)
	}
	if _, err := w.Authenticate(t.Context(), "anna", secret); !errors.Is(err, ErrMustChange) {
		t.Errorf("the registry: %v", err)
	}
	if err := w.ChangePassword(t.Context(), "anna", secret, "another horse battery"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Login(t.Context(), "anna", "another horse battery", false); err != nil {
		t.Error(err)
	}
}

func TestLockOut(t *testing.T) {
	w := newWorld(t)
	anna(t, w)
	began := time.Now()
	for i := range defaultLockAfter {
		if _, err := w.Login(t.Context(), "anna", "wrong", false); !errors.Is(err, ErrRefused) {
			t.Fatalf("attempt %d: %v", i, err)
		}
		if _, err := w.Login(t.Context(), "nobody", "wrong", false); !errors.Is(err, ErrRefused) {
			t.Fatalf("attempt %d: %v", i, err)
		}
	}
	if took := time.Since(began); took < 2*defaultLockAfter*refusalTakes*9/10 {
		t.Errorf("refusals took only %s", took)
	}
	for _, name := range []string{"anna", "nobody"} {
		if _, ok := errors.AsType[LockedError](func() error { _, err := w.Login(t.Context(), name, secret, false); return err }()); !ok {
			t.Errorf("%s is not locked", name)
		}
	}
	if u := w.user(t); u.Status.FailedLogins != defaultLockAfter || u.Status.LockedUntil == nil {
		t.Errorf("%+v", u.Status)
	}
	if err := Unlock(t.Context(), w.client, "anna"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Login(t.Context(), "anna", secret, false); err != nil {
		t.Errorf("unlocked: %v", err)
	}
	// The address has failed ten times by now, and is locked after twenty.
	for range 10 {
		_, _ = w.Login(t.Context(), "a@b", "wrong", false)
	}
	if _, err := w.Login(t.Context(), "anna", secret, false); !isLocked(err) {
		t.Errorf("the address is not locked: %v", err)
	}
	if _, err := w.Login(WithSource(t.Context(), netip.MustParseAddr("192.0.2.9")), "anna", secret, false); err != nil {
		t.Errorf("another address: %v", err)
	}
	w.pass(time.Minute)
	if _, err := w.Login(t.Context(), "anna", secret, false); err != nil {
		t.Errorf("after the lock: %v", err)
	}
}

func isLocked(err error) bool {
	_, ok := errors.AsType[LockedError](err)
	return ok
}

// TestManyAtOnce: attempts at the same time do not get more tries than one after the other.
func TestManyAtOnce(t *testing.T) {
	w := newWorld(t)
	anna(t, w)
	var refused, locked int
	var mu sync.Mutex
	var group sync.WaitGroup
	for i := range 12 {
		group.Go(func() {
			ctx := WithSource(t.Context(), netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}))
			_, err := w.Login(ctx, "anna", "wrong", false)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, ErrRefused):
				refused++
			case isLocked(err):
				locked++
			default:
				t.Errorf("error %v", err)
			}
		})
	}
	group.Wait()
	if refused != defaultLockAfter || locked != 12-defaultLockAfter {
		t.Errorf("%d refused, %d locked", refused, locked)
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	u := anna(t, w)
	for _, name := range []string{"", "system:admin", "sso:anna@atoll.local@x", "anna@other.local", "anna\x00", "../anna", strings.Repeat("a", 1000)} {
		if _, err := w.Login(t.Context(), name, secret, false); !errors.Is(err, ErrRefused) && !isLocked(err) {
			t.Errorf("%.20q: %v", name, err)
		}
	}
	w.change(t, func(u *api.User) { u.Spec.Disabled = true })
	if _, err := w.Login(t.Context(), u.Name, secret, false); !errors.Is(err, ErrRefused) {
		t.Errorf("disabled: %v", err)
	}
	for _, text := range []string{"", "x", "eyJ.x.y", "a.b.c"} {
		if _, err := w.Review(context.Background(), text); !errors.Is(err, ErrNoSession) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestParsePolicy(t *testing.T) {
	p, wrong := parsePolicy(map[string]string{policyMinLength: "20", policyMaxAge: "90", policyLockAfter: "3", policySession: "1", policyBanner: "hello"})
	if len(wrong) != 0 || p.password.MinLength != 20 || p.maxAge != 90*24*time.Hour || p.lockAfter != 3 || p.lifetime() != time.Hour || p.banner != "hello" {
		t.Errorf("%+v, %v", p, wrong)
	}
	p, wrong = parsePolicy(map[string]string{policyMinLength: "1", policyMaxAge: "-1", policyLockAfter: "0", policySession: "many", policyBanner: strings.Repeat("x", maxBanner+1)})
	if len(wrong) != 5 || p.lifetime() != defaultSession || userRule(p).After != defaultLockAfter {
		t.Errorf("%+v, %v", p, wrong)
	}
}

func TestAccessOf(t *testing.T) {
	binding := func(namespace, name, label string, subjects ...rbacv1.Subject) rbacv1.RoleBinding {
		return rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{api.SupervisorNamespaceLabel: label}}, Subjects: subjects}
	}
	user := rbacv1.Subject{Kind: "User", Name: "sso:anna@atoll.local"}
	group := rbacv1.Subject{Kind: "Group", Name: "sso:dev@atoll.local"}
	got := accessOf([]rbacv1.RoleBinding{
		binding("b", "atoll-view", "b", user),
		binding("a", "atoll-view", "a", user),
		binding("a", "atoll-owner", "a", group),
		binding("c", "atoll-edit", "c", rbacv1.Subject{Kind: "Group", Name: "sso:anna@atoll.local"}),
		binding("d", "view", "d", user),
		binding("e", "atoll-view", "other", user),
		binding("f", "atoll-robot", "f", user),
	}, Person{Name: "sso:anna@atoll.local", Groups: []string{"sso:dev@atoll.local"}})
	if !slices.Equal(got, []Access{{"a", "owner"}, {"b", "view"}}) {
		t.Errorf("%v", got)
	}
}
