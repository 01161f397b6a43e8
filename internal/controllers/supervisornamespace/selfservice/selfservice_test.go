package selfservice

import (
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/manager"
)

func template() *atoll.SupervisorNamespaceTemplate {
	return &atoll.SupervisorNamespaceTemplate{
		ObjectMeta: metav1.ObjectMeta{Name: "team"},
		Spec: atoll.SupervisorNamespaceTemplateSpec{SelfService: atoll.TemplateSelfService{
			Subjects: []atoll.TemplateSubject{{SubjectType: "Group", Subject: "devs"}, {SubjectType: "User", Subject: "olga"}}, MaxPerUser: 1,
		}},
	}
}

func TestMay(t *testing.T) {
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	g := NewGrants()
	g.now = func() time.Time { return now }
	dave := authenticationv1.UserInfo{Username: "sso:dave@atoll.local", Groups: []string{"sso:devs@atoll.local"}}
	if err := g.May(dave, template(), nil, nil, "a"); err != nil {
		t.Fatal(err)
	}
	if err := g.May(dave, template(), nil, nil, "b"); err == nil {
		t.Error("a second one was granted")
	}
	if err := g.May(dave, template(), nil, nil, "a"); err != nil {
		t.Errorf("the same one again: %v", err)
	}
	now = now.Add(time.Minute) // it never came to be
	if err := g.May(dave, template(), nil, nil, "b"); err != nil {
		t.Error(err)
	}
	if err := g.May(authenticationv1.UserInfo{Username: "dave", Groups: []string{"devs"}}, template(), nil, nil, "c"); err == nil {
		t.Error("somebody else of that name was let in")
	}
}

// A Namespace counts also where its SupervisorNamespace is gone, or not there yet.
func TestNamespacesCount(t *testing.T) {
	dave := authenticationv1.UserInfo{Username: "sso:dave@atoll.local", Groups: []string{"sso:devs@atoll.local"}}
	made := func(creator, template string) []metav1.PartialObjectMetadata {
		return []metav1.PartialObjectMetadata{{ObjectMeta: metav1.ObjectMeta{Name: "left", Annotations: map[string]string{
			atoll.CreatorAnnotation: creator, atoll.TemplateAnnotation: template,
		}}}}
	}
	for _, c := range []struct {
		creator, template, name string
		counts                  bool
	}{
		{dave.Username, "team", "next", true},
		{dave.Username, "team", "left", false},
		{dave.Username, "other", "next", false},
		{"sso:olga@atoll.local", "team", "next", false},
	} {
		if err := NewGrants().May(dave, template(), nil, made(c.creator, c.template), c.name); (err != nil) != c.counts {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestBindingAndStatus(t *testing.T) {
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	sn := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}, Spec: atoll.SupervisorNamespaceSpec{ClassName: "team", AccessList: []atoll.NamespaceAccess{
		{SubjectType: "User", Subject: "olga", Role: "Owner"}, {SubjectType: "User", Subject: "otto", Role: "Owner"}, {SubjectType: "User", Subject: "eve", Role: "Edit"},
	}}}
	c := fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&atoll.SupervisorNamespaceTemplate{}).WithObjects(template(), sn).Build()
	r := &Reconciler{Client: c, Live: c}
	for range 2 {
		if _, err := r.Reconcile(t.Context(), ctrl.Request{}); err != nil {
			t.Fatal(err)
		}
	}
	binding := &rbacv1.ClusterRoleBinding{}
	if err := c.Get(t.Context(), client.ObjectKey{Name: BindingName}, binding); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range binding.Subjects {
		names = append(names, s.Name)
	}
	if len(names) != 3 || names[0] != "sso:devs@atoll.local" || names[1] != "sso:olga@atoll.local" || names[2] != "sso:otto@atoll.local" {
		t.Errorf("subjects %v", names)
	}
	got := &atoll.SupervisorNamespaceTemplate{}
	if err := c.Get(t.Context(), client.ObjectKey{Name: "team"}, got); err != nil {
		t.Fatal(err)
	}
	if got.Status.Namespaces != 1 || got.Status.Conditions[0].Status != metav1.ConditionTrue {
		t.Errorf("%+v", got.Status)
	}
}
