package expand

import (
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// ClusterRoles that internal/kube/bootstrap makes.
const (
	OwnerRole        = "atoll:owner"
	EditRole         = "atoll:edit"
	ViewRole         = "atoll:view"
	RegistryPullRole = "atoll:registry-puller"
	SelfServiceRole  = "atoll:self-service"
)

// Subject is a user or group for RBAC.
func Subject(subjectType, name, domain string) rbacv1.Subject {
	kind := rbacv1.UserKind
	if subjectType == "Group" {
		kind = rbacv1.GroupKind
	}
	return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: kind, Name: atoll.SubjectName(name, domain)}
}

// Subjects are those of the access list that have one of the roles, sorted and each once.
func Subjects(spec *atoll.SupervisorNamespaceSpec, roles ...string) []rbacv1.Subject {
	var out []rbacv1.Subject
	for _, a := range spec.AccessList {
		if slices.Contains(roles, a.Role) {
			out = append(out, Subject(a.SubjectType, a.Subject, a.Domain))
		}
	}
	return SortSubjects(out)
}

// SortSubjects sorts subjects and drops repetitions.
func SortSubjects(list []rbacv1.Subject) []rbacv1.Subject {
	slices.SortFunc(list, func(a, b rbacv1.Subject) int {
		return strings.Compare(a.Kind+"/"+a.Name, b.Kind+"/"+b.Name)
	})
	return slices.Compact(list)
}

// access are the RoleBindings, and what makes the SupervisorNamespace itself visible to those who have access.
// RBAC cannot filter lists of cluster-scoped objects, so they can get and watch it by its name, and nobody but an
// administrator can list them all.
func access(in Input) []client.Object {
	owners := Subjects(in.Spec, atoll.RoleOwner)
	others := Subjects(in.Spec, atoll.RoleEdit, atoll.RoleView)
	var out []client.Object
	for _, b := range []struct {
		name, role string
		subjects   []rbacv1.Subject
	}{
		{"atoll-owner", OwnerRole, owners},
		{"atoll-edit", EditRole, Subjects(in.Spec, atoll.RoleEdit)},
		{"atoll-view", ViewRole, Subjects(in.Spec, atoll.RoleView)},
		{"atoll-registry-pull", RegistryPullRole, []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: "system:serviceaccounts:" + in.Name}}},
	} {
		if len(b.subjects) > 0 {
			out = append(out, &rbacv1.RoleBinding{
				TypeMeta:   metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "RoleBinding"},
				ObjectMeta: in.meta(b.name),
				RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: b.role},
				Subjects:   b.subjects,
			})
		}
	}
	if len(owners) > 0 {
		out = append(out, clusterAccess(in, "atoll:namespace-owner:"+in.Name, owners,
			[]string{"get", "list", "watch", "update", "patch", "delete"}, []string{"get", "delete"})...)
	}
	if len(others) > 0 {
		out = append(out, clusterAccess(in, "atoll:namespace:"+in.Name, others, []string{"get", "list", "watch"}, nil)...)
	}
	return out
}

// clusterAccess is a ClusterRole for this one namespace, and its binding. A list is allowed if it selects this name.
func clusterAccess(in Input, name string, subjects []rbacv1.Subject, verbs, namespaceVerbs []string) []client.Object {
	rules := []rbacv1.PolicyRule{
		{APIGroups: []string{atoll.GroupVersion().Group}, Resources: []string{"supervisornamespaces"}, ResourceNames: []string{in.Name}, Verbs: verbs},
	}
	if len(namespaceVerbs) > 0 {
		rules = append(rules, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"namespaces"}, ResourceNames: []string{in.Name}, Verbs: namespaceVerbs})
	}
	meta := metav1.ObjectMeta{Name: name, Labels: labels(in.Name), OwnerReferences: []metav1.OwnerReference{in.Owner}}
	return []client.Object{
		&rbacv1.ClusterRole{
			TypeMeta:   metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRole"},
			ObjectMeta: meta,
			Rules:      rules,
		},
		&rbacv1.ClusterRoleBinding{
			TypeMeta:   metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRoleBinding"},
			ObjectMeta: *meta.DeepCopy(),
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
			Subjects:   subjects,
		},
	}
}
