package people

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
)

func fakeClient(t *testing.T, objects ...client.Object) client.Client {
	t.Helper()
	scheme, err := cluster.Scheme(api.AddToScheme)
	if err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&api.User{}).WithObjects(objects...).Build()
}

func TestEnsureAdministrator(t *testing.T) {
	cl := fakeClient(t)
	secret, err := EnsureAdministrator(t.Context(), cl)
	if err != nil || len(secret) != 23 {
		t.Fatalf("%d characters, %v", len(secret), err)
	}
	stored := &corev1.Secret{}
	if err := cl.Get(t.Context(), client.ObjectKey{Namespace: api.IdentityNamespace, Name: "user-administrator"}, stored); err != nil {
		t.Fatal(err)
	}
	if hash := string(stored.Data[api.PasswordHashKey]); !strings.HasPrefix(hash, "$2a$11$") || strings.Contains(hash, secret) {
		t.Errorf("stored %q", hash)
	}
	if again, err := EnsureAdministrator(t.Context(), cl); err != nil || again != "" {
		t.Errorf("a second time: %d characters, %v", len(again), err)
	}
	// An administrator that was deleted on purpose does not come back.
	if err := cl.Delete(t.Context(), &api.User{ObjectMeta: metav1.ObjectMeta{Name: api.FirstAdministrator}}); err != nil {
		t.Fatal(err)
	}
	if again, err := EnsureAdministrator(t.Context(), cl); err != nil || again != "" {
		t.Errorf("after the deletion: %d characters, %v", len(again), err)
	}
	// A start that was cut short before the password was stored is completed.
	cl = fakeClient(t, &api.User{ObjectMeta: metav1.ObjectMeta{Name: api.FirstAdministrator}})
	if again, err := EnsureAdministrator(t.Context(), cl); err != nil || again == "" {
		t.Errorf("after a crash: %v", err)
	}
}

func TestDeleteUser(t *testing.T) {
	u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna"}}
	cl := fakeClient(t, u, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: "g"}, Spec: api.GroupSpec{Members: []string{"anna", "ben"}}})
	if err := deleteUser(t.Context(), cl, u); err != nil {
		t.Fatal(err)
	}
	g := &api.Group{}
	if err := cl.Get(t.Context(), client.ObjectKey{Name: "g"}, g); err != nil || !slices.Equal(g.Spec.Members, []string{"ben"}) {
		t.Errorf("%v, %v", g.Spec.Members, err)
	}
}

// TestDeleteUserWhileGroupsGo: a group that somebody deletes meanwhile is no reason to keep the user.
func TestDeleteUserWhileGroupsGo(t *testing.T) {
	u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna"}}
	var objects []client.Object
	for name, members := range map[string][]string{"going": {"anna"}, "others": {"ben"}, "staying": {"anna", "ben"}} {
		objects = append(objects, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: api.GroupSpec{Members: members}})
	}
	var looked []string
	cl := interceptor.NewClient(fakeClient(t, append(objects, u)...).(client.WithWatch), interceptor.Funcs{
		Get: func(ctx context.Context, cl client.WithWatch, key client.ObjectKey, object client.Object, opts ...client.GetOption) error {
			if looked = append(looked, key.Name); key.Name == "going" {
				if err := cl.Delete(ctx, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: key.Name}}); err != nil {
					return err
				}
			}
			return cl.Get(ctx, key, object, opts...)
		},
	})
	if err := deleteUser(t.Context(), cl, u); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(looked, []string{"going", "staying"}) {
		t.Errorf("it has changed %v", looked)
	}
	g := &api.Group{}
	if err := cl.Get(t.Context(), client.ObjectKey{Name: "staying"}, g); err != nil || !slices.Equal(g.Spec.Members, []string{"ben"}) {
		t.Errorf("%v, %v", g.Spec.Members, err)
	}
	if err := cl.Get(t.Context(), client.ObjectKeyFromObject(u), u); !apierrors.IsNotFound(err) {
		t.Errorf("the user: %v", err)
	}
}

func TestCheckAdded(t *testing.T) {
	cl := fakeClient(t, &api.User{ObjectMeta: metav1.ObjectMeta{Name: "anna"}},
		&api.Group{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: api.GroupSpec{Groups: []string{"b"}}}, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: "b"}})
	for _, tt := range []struct {
		to, user, group, want string
	}{
		{"a", "anna", "", ""}, {"a", "nobody", "", "there is no user nobody"}, {"a", "", "c", "there is no group c"}, {"b", "", "a", "cannot be in each other"}, {"a", "", "a", "cannot be in each other"},
	} {
		var users, groups []string
		if tt.user != "" {
			users = []string{tt.user}
		}
		if tt.group != "" {
			groups = []string{tt.group}
		}
		err := checkAdded(t.Context(), cl, tt.to, users, groups)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

func TestUserRows(t *testing.T) {
	now := time.Now()
	at := metav1.NewTime(now)
	later := metav1.NewTime(now.Add(time.Hour))
	users := []api.User{
		{ObjectMeta: metav1.ObjectMeta{Name: "new"}},
		{ObjectMeta: metav1.ObjectMeta{Name: "fine"}, Status: api.UserStatus{PasswordChanged: &at}},
		{ObjectMeta: metav1.ObjectMeta{Name: "first"}, Spec: api.UserSpec{MustChangePassword: true}, Status: api.UserStatus{PasswordChanged: &at}},
		{ObjectMeta: metav1.ObjectMeta{Name: "locked"}, Status: api.UserStatus{PasswordChanged: &at, LockedUntil: &later}},
		{ObjectMeta: metav1.ObjectMeta{Name: "off"}, Spec: api.UserSpec{Disabled: true}, Status: api.UserStatus{LockedUntil: &later}},
	}
	rows := userRows(users, []api.Group{{ObjectMeta: metav1.ObjectMeta{Name: "g"}, Spec: api.GroupSpec{Members: []string{"fine"}}}}, now)
	for i, want := range []string{"STATE", "No password", "Active", "Must change password", "Locked until", "Disabled"} {
		if !strings.HasPrefix(rows[i][2], want) {
			t.Errorf("%v, want %s", rows[i], want)
		}
	}
	if rows[2][3] != "g" {
		t.Errorf("groups %v", rows[2])
	}
}

func TestWrongCommands(t *testing.T) {
	for _, args := range [][]string{
		{"create"}, {"create", "Anna"}, {"create", "a@b"}, {"create", "anna", "--password-stdin"}, {"nothing"}, {"ls", "-o", "xml"}, {"disable"},
	} {
		cmd := UserCommand(Config{
			App:        command.App{In: strings.NewReader("short\n"), Out: new(bytes.Buffer), ErrOut: new(bytes.Buffer)},
			Kubeconfig: func() (string, error) { return "", errors.New("must not be asked") },
		})
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs(args)
		err := cmd.ExecuteContext(t.Context())
		if _, usage := errors.AsType[command.UsageError](err); !usage {
			t.Errorf("%v: %v", args, err)
		}
	}
}
