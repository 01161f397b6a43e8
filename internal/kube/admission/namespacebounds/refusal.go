package namespacebounds

import (
	"fmt"
	"strings"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// mostNames is how many names a message lists.
const mostNames = 8

// refuse is the error of a request beyond a limit that is a list of what is allowed.
func refuse(b *atoll.SupervisorNamespace, limit string, allowed []string, asked string) error {
	only := "nothing may be used"
	if len(allowed) > 0 {
		only = "only " + list(allowed) + " may be used"
	}
	return fmt.Errorf("namespace %q: limit %s: %s; asked: %s; %s", b.Name, limit, only, asked, who(b))
}

// refuseText is refuse for limits that are no lists.
func refuseText(b *atoll.SupervisorNamespace, limit, says, asked string) error {
	return fmt.Errorf("namespace %q: limit %s: %s; asked: %s; %s", b.Name, limit, says, asked, who(b))
}

// who says who can change the limits of a namespace, and how.
func who(b *atoll.SupervisorNamespace) string {
	return "administrators can change it: atoll ns edit " + b.Name + "; " + owners(b)
}

// owners names those of a namespace.
func owners(b *atoll.SupervisorNamespace) string {
	var owners []string
	for _, a := range b.Spec.AccessList {
		if a.Role == atoll.RoleOwner {
			owners = append(owners, subject(a))
		}
	}
	if len(owners) == 0 {
		return "it has no owners"
	}
	return "owners: " + list(owners)
}

// subject is a user or group as Kubernetes names it.
func subject(a atoll.NamespaceAccess) string {
	name := atoll.SubjectName(a.Subject, a.Domain)
	if a.SubjectType == "Group" {
		return "group " + name
	}
	return name
}

// list joins names, of many the first.
func list(names []string) string {
	if n := len(names); n > mostNames {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:mostNames], ", "), n-mostNames)
	}
	return strings.Join(names, ", ")
}

// names are those of a list of references.
func names(refs []atoll.NamespaceReference) []string {
	out := make([]string, 0, len(refs))
	for _, r := range refs {
		out = append(out, r.Name)
	}
	return out
}

// beyondReservations completes an error of the ledger. A namespace without limits has nobody to ask but administrators.
func beyondReservations(namespace string, b *atoll.SupervisorNamespace, err error) error {
	if b == nil {
		return fmt.Errorf("namespace %q: %w; administrators can change it: atoll ns ls shows what is reserved", namespace, err)
	}
	return fmt.Errorf("namespace %q: %w; administrators can change it: atoll ns ls shows what is reserved; %s", namespace, err, owners(b))
}
