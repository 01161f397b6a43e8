package identity

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/directory"
)

// TestStands: what is taken away from somebody who was let in ends at once, by password and by session.
func TestStands(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *world, Person){
		"revoked":  func(t *testing.T, w *world, _ Person) { w.change(t, func(u *api.User) { u.Spec.SessionGeneration++ }) },
		"disabled": func(t *testing.T, w *world, _ Person) { w.change(t, func(u *api.User) { u.Spec.Disabled = true }) },
		"must change": func(t *testing.T, w *world, _ Person) {
			w.change(t, func(u *api.User) { u.Spec.MustChangePassword = true })
		},
		"logged out": func(t *testing.T, w *world, p Person) {
			if err := w.sessions.End(t.Context(), p.Session); err != nil {
				t.Fatal(err)
			}
		},
		"made anew": func(t *testing.T, w *world, _ Person) {
			if err := w.client.Delete(t.Context(), w.user(t)); err != nil {
				t.Fatal(err)
			}
			if err := w.client.Create(t.Context(), &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "2"}}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			anna(t, w)
			got, err := w.Login(t.Context(), "anna", secret, true)
			if err != nil {
				t.Fatal(err)
			}
			session, err := w.Authenticate(t.Context(), "", got.Access)
			if err != nil {
				t.Fatal(err)
			}
			typed := session // as after a password
			typed.Session, typed.Expires = "", time.Time{}
			for _, p := range []Person{session, typed} {
				if _, err := w.Stands(t.Context(), p); err != nil {
					t.Errorf("before: %v", err)
				}
			}
			change(t, w, session)
			if _, err := w.Stands(t.Context(), session); !errors.Is(err, ErrNoSession) {
				t.Errorf("by session: %v", err)
			}
			if _, err := w.Stands(t.Context(), typed); !errors.Is(err, ErrNoSession) && name != "logged out" {
				t.Errorf("by password: %v", err)
			}
		})
	}
}

func TestStandsInTheGroupsOfNow(t *testing.T) {
	ops := &api.Group{ObjectMeta: metav1.ObjectMeta{Name: "ops"}, Spec: api.GroupSpec{Members: []string{"anna"}}}
	w := newWorld(t, ops)
	anna(t, w)
	p, err := w.Authenticate(t.Context(), "anna", secret)
	if err != nil || !slices.Equal(p.Groups, []string{"sso:ops@atoll.local"}) {
		t.Fatalf("%+v, %v", p, err)
	}
	if err := w.client.Get(t.Context(), client.ObjectKeyFromObject(ops), ops); err != nil {
		t.Fatal(err)
	}
	ops.Spec.Members = nil
	if err := w.client.Update(t.Context(), ops); err != nil {
		t.Fatal(err)
	}
	if p, err := w.Stands(t.Context(), p); err != nil || len(p.Groups) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	// Who is not of here is as before.
	other := Person{Name: "sso:olga@corp.example", Groups: []string{"sso:dev@corp.example"}}
	if p, err := w.Stands(t.Context(), other); err != nil || len(p.Groups) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
}

// TestForeignTokensOfALockedSource: the API server is not asked for them.
func TestForeignTokensOfALockedSource(t *testing.T) {
	w := newWorld(t)
	ctx := WithSource(t.Context(), netip.MustParseAddr("192.0.2.7"))
	for range sourceRule().After {
		w.sources.Fail("192.0.2.7")
	}
	if _, err := w.Bearer(ctx, "eyJhbGciOiJSUzI1NiJ9.e30.x"); !errors.As(err, new(LockedError)) {
		t.Errorf("%v", err)
	}
}

// lagging answers a few times with what there was before. Groups there were none.
type lagging struct {
	client.Reader
	before *api.User // nil: none
	looks  int
	lists  int
}

func (l *lagging) List(ctx context.Context, list client.ObjectList, opts ...client.ListOption) error {
	if _, ok := list.(*api.GroupList); !ok || l.lists == 0 {
		return l.Reader.List(ctx, list, opts...)
	}
	l.lists--
	return nil
}

func (l *lagging) Get(ctx context.Context, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
	u, ok := obj.(*api.User)
	if !ok || l.looks == 0 {
		return l.Reader.Get(ctx, key, obj, opts...)
	}
	l.looks--
	if l.before == nil {
		return apierrors.NewNotFound(schema.GroupResource{Resource: "users"}, key.Name)
	}
	l.before.DeepCopyInto(u)
	return nil
}

// TestLoginOfWhoHasJustChanged: a session holds from its first request on, though the directory lags.
func TestLoginOfWhoHasJustChanged(t *testing.T) {
	for name, before := range map[string]*api.User{
		"made":     nil,
		"anew":     {ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "0", Generation: 7}},
		"enabled":  {ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "1", Generation: 1}, Spec: api.UserSpec{Disabled: true}},
		"password": {ObjectMeta: metav1.ObjectMeta{Name: "anna", UID: "1", Generation: 1}, Spec: api.UserSpec{MustChangePassword: true}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			anna(t, w)
			w.change(t, func(u *api.User) { u.Generation = 2 })
			w.directory = directory.New(&lagging{Reader: w.client, before: before, looks: 3})
			got, err := w.Login(t.Context(), "anna", secret, true)
			if err != nil {
				t.Fatal(err)
			}
			if p, err := w.Review(t.Context(), got.Access); err != nil || p.UID != "1" {
				t.Errorf("%+v, %v", p, err)
			}
			w.directory = directory.New(&lagging{Reader: w.client, before: before, looks: 3})
			p, err := w.Authenticate(t.Context(), "anna", secret)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Stands(t.Context(), p); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLoginOfWhoHasJustJoined: a session is in its groups from the first request on, though the directory lags.
func TestLoginOfWhoHasJustJoined(t *testing.T) {
	w := newWorld(t, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: "ops"}, Spec: api.GroupSpec{Members: []string{"anna"}}})
	anna(t, w)
	want := []string{"sso:ops@atoll.local"}
	w.directory = directory.New(&lagging{Reader: w.client, lists: 2})
	got, err := w.Login(t.Context(), "anna", secret, true)
	if err != nil || !slices.Equal(got.Person.Groups, want) {
		t.Fatalf("%+v, %v", got.Person, err)
	}
	if p, err := w.Review(t.Context(), got.Access); err != nil || !slices.Equal(p.Groups, want) {
		t.Errorf("%+v, %v", p, err)
	}
	w.directory = directory.New(&lagging{Reader: w.client, lists: 2})
	if p, err := w.Authenticate(t.Context(), "anna", secret); err != nil || !slices.Equal(p.Groups, want) {
		t.Errorf("%+v, %v", p, err)
	}
}
