package v1alpha1

import "strings"

// Annotations of SupervisorNamespaces that people or the API server write, and the finalizer.
const (
	// AdoptAnnotation set to "true" lets a SupervisorNamespace take over a Namespace of its name that is there already.
	AdoptAnnotation = "atoll.dev/adopt"
	// CreatorAnnotation is the user who made it. The API server writes it; what a client says is overwritten.
	CreatorAnnotation = "atoll.dev/creator"
	// SelfServiceAnnotation is "true" on what was made by somebody who is no administrator, from a template. The API
	// server writes it.
	SelfServiceAnnotation = "atoll.dev/self-service"
	// TemplateAnnotation of a Namespace that an owner has made with kubectl is the template of the SupervisorNamespace
	// that it becomes. The API server writes it.
	TemplateAnnotation = "atoll.dev/template"
	// NamespaceFinalizer keeps a SupervisorNamespace until everything it expands into is gone.
	NamespaceFinalizer = "atoll.dev/supervisor-namespace"
	// ClassCatalogNamespace has the VirtualMachineClasses that an administrator offers beside the default ones.
	ClassCatalogNamespace = "atoll-system"
)

// Reasons of the condition Ready, where it is False.
const (
	ReasonReady               = "Ready"
	ReasonUnknownReference    = "UnknownReference"
	ReasonNamespaceExists     = "NamespaceExists"
	ReasonNamespaceReserved   = "NamespaceReserved"
	ReasonTemplateInvalid     = "TemplateInvalid"
	ReasonNotExpanded         = "NotExpanded"
	ReasonNamespaceTerminated = "NamespaceTerminating"
)

// EffectiveSpec is what is enforced: the spec of the status, or before there is one that of the object.
func (s *SupervisorNamespace) EffectiveSpec() *SupervisorNamespaceSpec {
	if s.Status.Effective != nil {
		return s.Status.Effective
	}
	return &s.Spec
}

// SubjectName is the name of a user or group in Kubernetes.
func SubjectName(subject, domain string) string {
	if domain == "" {
		domain = LocalDomain
	}
	return SubjectPrefix + subject + "@" + domain
}

// SplitSubject is the reverse of SubjectName. It is false for names that no person has.
func SplitSubject(name string) (subject, domain string, ok bool) {
	rest, person := strings.CutPrefix(name, SubjectPrefix)
	at := strings.LastIndex(rest, "@")
	if !person || at <= 0 || at == len(rest)-1 {
		return "", "", false
	}
	return rest[:at], rest[at+1:], true
}

// SystemNamespace tells whether a name is one of the system's own, which no SupervisorNamespace may have. The project
// that everybody's images come from is of no namespace.
func SystemNamespace(name string) bool {
	if name == "default" || name == RegistryLibrary {
		return true
	}
	for _, prefix := range []string{"kube-", "atoll-", "vmware-system-"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}
