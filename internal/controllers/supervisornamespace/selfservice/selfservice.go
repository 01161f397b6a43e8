// Package selfservice is about namespaces that people make themselves, from templates that administrators offer.
//
// RBAC lets people make SupervisorNamespaces and Namespaces who may do so by any template: one ClusterRoleBinding, which
// the controller here keeps, lists the subjects of templates, and the owners of all SupervisorNamespaces. What they may make is for the webhooks of package admission to say, which ask Grants.
//
// The controller also says in the status of each template whether it can be used and how many namespaces it has. What can
// go wrong: the API server does not answer; it is tried again.
package selfservice

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

// Templates reads all templates, of which there are few.
func Templates(ctx context.Context, reader client.Reader) (resolve.Templates, error) {
	var list atoll.SupervisorNamespaceTemplateList
	if err := reader.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("listing SupervisorNamespaceTemplates: %w", err)
	}
	return func(name string) *atoll.SupervisorNamespaceTemplate {
		for i := range list.Items {
			if list.Items[i].Name == name {
				return &list.Items[i]
			}
		}
		return nil
	}, nil
}

// Is tells whether a user is a subject, themselves or by a group.
func Is(user authenticationv1.UserInfo, subjectType, subject, domain string) bool {
	name := atoll.SubjectName(subject, domain)
	if subjectType == "Group" {
		return slices.Contains(user.Groups, name)
	}
	return user.Username == name
}

// Owns tells whether a user is an owner of a namespace.
func Owns(user authenticationv1.UserInfo, spec *atoll.SupervisorNamespaceSpec) bool {
	return slices.ContainsFunc(spec.AccessList, func(a atoll.NamespaceAccess) bool {
		return a.Role == atoll.RoleOwner && Is(user, a.SubjectType, a.Subject, a.Domain)
	})
}

// AddOwner makes a person an owner, whatever role they had.
func AddOwner(spec *atoll.SupervisorNamespaceSpec, username string) {
	subject, domain, ok := atoll.SplitSubject(username)
	if !ok {
		return
	}
	spec.AccessList = slices.DeleteFunc(spec.AccessList, func(a atoll.NamespaceAccess) bool {
		return a.SubjectType == "User" && atoll.SubjectName(a.Subject, a.Domain) == username
	})
	spec.AccessList = append(spec.AccessList, atoll.NamespaceAccess{SubjectType: "User", Subject: subject, Domain: domain, Role: atoll.RoleOwner})
}

// visibleWithin is how long a namespace that has been granted may not be seen yet.
const visibleWithin = 10 * time.Second

// Grants says who may make namespaces, and counts what was granted a moment ago and cannot be seen yet.
type Grants struct {
	now func() time.Time

	mu     sync.Mutex
	recent []grant
}

type grant struct {
	user, template, name string
	at                   time.Time
}

// NewGrants has granted nothing.
func NewGrants() *Grants { return &Grants{now: time.Now} }

// May says whether a user may make a namespace from a template. All are the SupervisorNamespaces that there are, and made
// the Namespaces: one whose SupervisorNamespace is not there yet, or not any more, counts too.
func (g *Grants) May(user authenticationv1.UserInfo, t *atoll.SupervisorNamespaceTemplate, all []atoll.SupervisorNamespace, made []metav1.PartialObjectMetadata, name string) error {
	offered := slices.ContainsFunc(t.Spec.SelfService.Subjects, func(s atoll.TemplateSubject) bool {
		return Is(user, s.SubjectType, s.Subject, s.Domain)
	})
	if !offered && t.Spec.SelfService.Enabled {
		offered = slices.ContainsFunc(all, func(sn atoll.SupervisorNamespace) bool { return Owns(user, sn.EffectiveSpec()) })
	}
	if !offered {
		return fmt.Errorf("SupervisorNamespaceTemplate %s is not offered to %s: ask an administrator to name you in its spec.selfService", t.Name, user.Username)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	g.recent = slices.DeleteFunc(g.recent, func(x grant) bool { return now.Sub(x.at) > visibleWithin })
	have := map[string]bool{}
	for i := range all {
		sn := &all[i]
		if sn.Spec.ClassName == t.Name && sn.Annotations[atoll.SelfServiceAnnotation] == "true" && sn.Annotations[atoll.CreatorAnnotation] == user.Username {
			have[sn.Name] = true
		}
	}
	for i := range made {
		if notes := made[i].Annotations; notes[atoll.TemplateAnnotation] == t.Name && notes[atoll.CreatorAnnotation] == user.Username {
			have[made[i].Name] = true
		}
	}
	for _, x := range g.recent {
		if x.user == user.Username && x.template == t.Name {
			have[x.name] = true
		}
	}
	delete(have, name)
	if most := t.Spec.SelfService.MaxPerUser; most > 0 && len(have) >= int(most) {
		return fmt.Errorf("%s has %d namespaces of SupervisorNamespaceTemplate %s, which allows %d for each user: delete one first", user.Username, len(have), t.Name, most)
	}
	g.recent = append(g.recent, grant{user.Username, t.Name, name, now})
	return nil
}
