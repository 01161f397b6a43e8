package namespacebounds

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/admission/podruntime"
)

// controller is the user that expands SupervisorNamespaces (internal/controllers/supervisornamespace).
const controller = pki.NamespaceControllerUser

// classesLabel of a Namespace says whether it gets the default classes (internal/controllers/virtualmachineclass).
const classesLabel = "atoll.dev/vm-classes"

// isMarked tells whether an object is part of what a SupervisorNamespace expands into, or bounds like it.
func isMarked(o metav1.Object) bool {
	if o == nil {
		return false
	}
	l := o.GetLabels()
	_, marked := l[atoll.SupervisorNamespaceLabel]
	return marked || l[atoll.TierLabel] == atoll.TierAdministrator
}

// accessor is the metadata of an object, nil if it has none.
func accessor(obj any) metav1.Object {
	if obj == nil {
		return nil
	}
	o, err := meta.Accessor(obj)
	if err != nil {
		return nil
	}
	return o
}

// protect keeps what a SupervisorNamespace expands into in the hands of administrators.
func (p *Plugin) protect(ctx context.Context, a admission.Attributes) error {
	if s := a.GetSubresource(); s != "" && s != "status" {
		return nil
	}
	now, old := accessor(a.GetObject()), accessor(a.GetOldObject())
	if !isMarked(now) && !isMarked(old) {
		return nil
	}
	asked := ""
	switch a.GetOperation() {
	case admission.Create:
		asked = marksNew(now)
	case admission.Update:
		asked = changesMarked(a, now, old)
		if isCleaner(a.GetUserInfo()) {
			asked = ""
		}
	case admission.Delete:
		if old != nil && !isCleaner(a.GetUserInfo()) {
			asked = "to delete it"
		}
	}
	if asked == "" || p.isAdministrator(ctx, a.GetUserInfo()) {
		return nil
	}
	if isNamespace(a) && a.GetOperation() == admission.Delete && p.may(ctx, a.GetUserInfo(), "delete", old.GetName()) {
		return nil
	}
	return admission.NewForbidden(a, p.errMarked(ctx, a, now, old, asked))
}

// isEncryptionClass tells whether a request is about an EncryptionClass itself.
func isEncryptionClass(a admission.Attributes) bool {
	return a.GetResource().GroupResource() == encryption.Classes().GroupResource() && a.GetSubresource() == ""
}

// protectEncryption keeps the EncryptionClass that a namespace must use in the hands of administrators: who could edit it
// would choose the key.
func (p *Plugin) protectEncryption(ctx context.Context, a admission.Attributes) error {
	if !isEncryptionClass(a) || a.GetNamespace() == "" || isCleaner(a.GetUserInfo()) {
		return nil
	}
	o := accessor(a.GetOldObject())
	if o == nil {
		o = accessor(a.GetObject())
	}
	if o == nil { // a whole collection: its objects are asked for one by one
		return nil
	}
	b, err := p.boundsOf(ctx, a)
	if b == nil || err != nil {
		return err
	}
	if b.Spec.Encryption.ClassName == "" || o.GetName() != b.Spec.Encryption.ClassName || p.isAdministrator(ctx, a.GetUserInfo()) {
		return nil
	}
	return admission.NewForbidden(a, fmt.Errorf("namespace %q: limit %s.className: its volumes must be encrypted by EncryptionClass %s, which only administrators make, change and delete; asked: to %s it; "+
		"ask an administrator; %s", b.Name, limitEncryption, o.GetName(), strings.ToLower(string(a.GetOperation())), owners(b)))
}

func isNamespace(a admission.Attributes) bool {
	return a.GetResource().GroupResource() == core.Resource("namespaces")
}

// marksNew names the mark of a new object.
func marksNew(now metav1.Object) string {
	if _, ok := now.GetLabels()[atoll.SupervisorNamespaceLabel]; ok {
		return "label " + atoll.SupervisorNamespaceLabel
	}
	return "label " + atoll.TierLabel + "=" + atoll.TierAdministrator
}

// changesMarked says what an update changes that only administrators may, "" for nothing. Of the status of an object
// that is its marks, of a Namespace what decides what its pods may do, and of others everything.
func changesMarked(a admission.Attributes, now, old metav1.Object) string {
	if now == nil || old == nil {
		return "to change it"
	}
	keys := marks()
	if isNamespace(a) {
		keys = append(keys, decisive(now, old)...)
	}
	for _, key := range keys {
		is, has := now.GetLabels()[key]
		was, had := old.GetLabels()[key]
		if is != was || has != had {
			return "to change label " + key
		}
	}
	if isNamespace(a) {
		if key := atoll.RestartPriorityAnnotation; now.GetAnnotations()[key] != old.GetAnnotations()[key] {
			return "to change annotation " + key
		}
		return ""
	}
	if a.GetSubresource() == "status" {
		return ""
	}
	return "to change it"
}

func marks() []string { return []string{atoll.SupervisorNamespaceLabel, atoll.TierLabel} }

// decisive are the labels of both objects that decide what the pods of a Namespace may do.
func decisive(objects ...metav1.Object) []string {
	out := []string{podruntime.HostAccessLabel, classesLabel}
	for _, o := range objects {
		for key := range o.GetLabels() {
			if strings.HasPrefix(key, "pod-security.kubernetes.io/") {
				out = append(out, key)
			}
		}
	}
	return out
}

// isCleaner tells whether a user is a part of the control plane that ends, counts and owns objects for others.
func isCleaner(u user.Info) bool {
	return u.GetName() == user.KubeControllerManager || u.GetName() == user.APIServerUser || slices.Contains(u.GetGroups(), "system:serviceaccounts:kube-system")
}

// isAdministrator tells whether a user may change every SupervisorNamespace, or is their controller.
func (p *Plugin) isAdministrator(ctx context.Context, u user.Info) bool {
	return slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) || u.GetName() == controller || p.may(ctx, u, "update", "")
}

// may asks whether a user may do something to a SupervisorNamespace, or to all with an empty name.
func (p *Plugin) may(ctx context.Context, u user.Info, verb, name string) bool {
	decision, _, err := p.authz.Authorize(ctx, authorizer.AttributesRecord{
		User: u, Verb: verb, APIGroup: atoll.GroupName, APIVersion: atoll.Version, Resource: "supervisornamespaces", Name: name, ResourceRequest: true,
	})
	return err == nil && decision == authorizer.DecisionAllow
}

// errMarked is the refusal of a request about something that administrators look after.
func (p *Plugin) errMarked(ctx context.Context, a admission.Attributes, now, old metav1.Object, asked string) error {
	o := old
	if o == nil {
		o = now
	}
	name := o.GetLabels()[atoll.SupervisorNamespaceLabel]
	if name == "" {
		name = a.GetNamespace()
	}
	if a.GetOperation() == admission.Create || a.GetOperation() == admission.Update && !isMarked(old) {
		return fmt.Errorf("namespace %q: only administrators make objects with this label, which bound the namespace; asked: %s; remove the label", name, asked)
	}
	what := fmt.Sprintf("namespace %q: it is made of SupervisorNamespace %s, and only administrators change it; asked: %s", name, name, asked)
	if p.source.ready() {
		if b, err := p.source.of(ctx, name); err == nil && b != nil {
			return fmt.Errorf("%s; %s", what, who(b))
		}
	}
	return fmt.Errorf("%s; administrators can change it: atoll ns edit %s", what, name)
}
