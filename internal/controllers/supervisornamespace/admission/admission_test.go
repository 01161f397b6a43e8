package admission

import (
	"context"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/manager"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/selfservice"
)

const (
	root       = "sso:administrator@atoll.local"
	olga       = "sso:olga@atoll.local"
	mallory    = "sso:mallory@atoll.local"
	controller = "system:atoll:namespace-controller"
)

func quantity(s string) *resource.Quantity { return new(resource.MustParse(s)) }

func newWebhook(t *testing.T, objects ...client.Object) *Webhook {
	t.Helper()
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).Build()
	return &Webhook{
		Cached: c, Live: c, Granted: selfservice.NewGrants(),
		Config: Config{Controller: controller, Network: expand.Network{PodCIDR: netip.MustParsePrefix("10.244.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16")}},
		Admin:  func(_ context.Context, u authenticationv1.UserInfo) (bool, error) { return u.Username == root, nil },
	}
}

// as is the context of a request.
func as(t *testing.T, user string, operation admissionv1.Operation, before any) context.Context {
	t.Helper()
	req := admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{Operation: operation, UserInfo: authenticationv1.UserInfo{Username: user}}}
	if before != nil {
		raw, err := json.Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		req.OldObject.Raw = raw
	}
	return admission.NewContextWithRequest(t.Context(), req)
}

func team() *atoll.SupervisorNamespaceTemplate {
	t := &atoll.SupervisorNamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: "team"}}
	t.Spec.Template.Resources.MemoryLimit = quantity("4Gi")
	t.Spec.SelfService = atoll.TemplateSelfService{Enabled: true, MaxPerUser: 2, Default: true}
	return t
}

func owned(name string) *atoll.SupervisorNamespace {
	sn := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	sn.Spec.AccessList = []atoll.NamespaceAccess{{SubjectType: "User", Subject: "olga", Domain: "atoll.local", Role: "Owner"}}
	return sn
}

// create sends a SupervisorNamespace through both webhooks.
func (w *Webhook) create(t *testing.T, user string, sn *atoll.SupervisorNamespace) error {
	t.Helper()
	ctx := as(t, user, admissionv1.Create, nil)
	if err := w.Default(ctx, sn); err != nil {
		return err
	}
	_, err := w.ValidateCreate(ctx, sn)
	return err
}

func (w *Webhook) update(t *testing.T, user string, before, sn *atoll.SupervisorNamespace) error {
	t.Helper()
	ctx := as(t, user, admissionv1.Update, before)
	if err := w.Default(ctx, sn); err != nil {
		return err
	}
	_, err := w.ValidateUpdate(ctx, before, sn)
	return err
}

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("error %v, not %q", err, want)
	}
}

func TestAdministrator(t *testing.T) {
	w := newWebhook(t)
	sn := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Annotations: map[string]string{atoll.CreatorAnnotation: mallory, atoll.SelfServiceAnnotation: "true"}}}
	wantError(t, w.create(t, root, sn), "")
	if sn.Annotations[atoll.CreatorAnnotation] != root || sn.Annotations[atoll.SelfServiceAnnotation] != "" || sn.Finalizers[0] != atoll.NamespaceFinalizer {
		t.Errorf("%+v", sn.ObjectMeta)
	}
	wantError(t, w.create(t, root, &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-x"}}), "system's own")
	wantError(t, w.create(t, root, &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: atoll.SupervisorNamespaceSpec{ClassName: "none"}}),
		`spec.className: Invalid value: "none": unknown template: SupervisorNamespaceTemplate "none" does not exist`)
	bad := sn.DeepCopy()
	bad.Spec.Resources.CPULimit = quantity("-1")
	wantError(t, w.update(t, root, sn, bad), "must not be negative")
	bad = sn.DeepCopy()
	bad.Spec.ClassName = "team"
	wantError(t, w.update(t, root, sn, bad), "spec.className: Forbidden")
	spoofed := sn.DeepCopy()
	spoofed.Annotations[atoll.CreatorAnnotation] = mallory
	wantError(t, w.update(t, root, sn, spoofed), "")
	if spoofed.Annotations[atoll.CreatorAnnotation] != root {
		t.Error("the creator has changed")
	}
}

func TestSelfService(t *testing.T) {
	w := newWebhook(t, team(), owned("first"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "taken"}})
	mine := func(name string, change func(*atoll.SupervisorNamespace)) *atoll.SupervisorNamespace {
		sn := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: atoll.SupervisorNamespaceSpec{ClassName: "team"}}
		change(sn)
		return sn
	}
	nothing := func(*atoll.SupervisorNamespace) {}
	wantError(t, w.create(t, mallory, mine("a", nothing)), "is not offered to "+mallory)
	wantError(t, w.create(t, olga, mine("a", func(sn *atoll.SupervisorNamespace) { sn.Spec.ClassName = "" })), "spec.className must name")
	wantError(t, w.create(t, olga, mine("a", func(sn *atoll.SupervisorNamespace) { sn.Spec.Resources.MemoryLimit = quantity("5Gi") })), "is above that of the template, which is 4Gi")
	wantError(t, w.create(t, olga, mine("a", func(sn *atoll.SupervisorNamespace) { sn.Annotations = map[string]string{atoll.AdoptAnnotation: "true"} })), "only an administrator")
	wantError(t, w.create(t, olga, mine("taken", nothing)), "there is a Namespace taken already")
	sn := mine("a", func(sn *atoll.SupervisorNamespace) {
		sn.Annotations = map[string]string{atoll.CreatorAnnotation: root, atoll.WidenedAnnotation: "true"}
	})
	wantError(t, w.create(t, olga, sn), "")
	if sn.Annotations[atoll.WidenedAnnotation] != "" || sn.Annotations[atoll.CreatorAnnotation] != olga || sn.Annotations[atoll.SelfServiceAnnotation] != "true" || len(sn.Spec.AccessList) != 1 || sn.Spec.AccessList[0].Role != "Owner" {
		t.Errorf("%+v", sn)
	}
	// What was granted a moment ago counts, though nobody can see it yet.
	wantError(t, w.create(t, olga, mine("b", nothing)), "")
	wantError(t, w.create(t, olga, mine("c", nothing)), "allows 2 for each user")

	wider := sn.DeepCopy()
	wider.Spec.PodRuntime.Policy = "Runc"
	wantError(t, w.update(t, olga, sn, wider), "the template allows micro-VMs only")
	less := sn.DeepCopy()
	less.Spec.Resources.MemoryLimit = quantity("1Gi")
	wantError(t, w.update(t, olga, sn, less), "")
	adopt := sn.DeepCopy()
	adopt.Annotations[atoll.AdoptAnnotation] = "true"
	wantError(t, w.update(t, olga, sn, adopt), "only an administrator")
	note := sn.DeepCopy()
	note.Annotations[atoll.WidenedAnnotation] = "true"
	wantError(t, w.update(t, olga, sn, note), "")
	if note.Annotations[atoll.WidenedAnnotation] != "" {
		t.Error("an owner says that an administrator has widened it")
	}
	wantError(t, w.update(t, root, sn, wider), "")
	if wider.Annotations[atoll.WidenedAnnotation] != "true" {
		t.Error("it is not noted that an administrator has widened it")
	}
	stricter := wider.DeepCopy() // as if the template had been wider when it was made
	delete(stricter.Annotations, atoll.WidenedAnnotation)
	described := stricter.DeepCopy()
	described.Spec.Description = "with a word"
	wantError(t, w.update(t, root, stricter, described), "")
	if described.Annotations[atoll.WidenedAnnotation] != "" {
		t.Error("what a template cuts comes back when an administrator changes something else")
	}
	wantError(t, w.update(t, olga, wider, less), "")
	if less.Annotations[atoll.WidenedAnnotation] != "" {
		t.Error("it is within its template again")
	}

	first := owned("first")
	change := first.DeepCopy()
	change.Spec.Description = "mine"
	wantError(t, w.update(t, olga, first, change), "an administrator has made it")
	allow := first.DeepCopy()
	allow.Annotations = map[string]string{atoll.DeleteContentsAnnotation: "true"}
	wantError(t, w.update(t, olga, first, allow), "")
}

// Who may delete a SupervisorNamespace cannot leave its Namespace behind, by its finalizer, or its place in the template.
func TestDeletionKeepsFinalizer(t *testing.T) {
	sn := owned("mine")
	sn.Spec.ClassName = "team"
	sn.Finalizers = []string{atoll.NamespaceFinalizer}
	sn.DeletionTimestamp = new(metav1.Now())
	sn.Annotations = map[string]string{atoll.SelfServiceAnnotation: "true", atoll.CreatorAnnotation: olga}
	left := func(name string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{atoll.CreatorAnnotation: olga, atoll.TemplateAnnotation: "team"}}}
	}
	w := newWebhook(t, team(), owned("first"), left("a"), left("b"))
	bare := sn.DeepCopy()
	bare.Finalizers = nil
	wantError(t, w.update(t, olga, sn, bare.DeepCopy()), "only an administrator changes finalizers")
	wantError(t, w.update(t, root, sn, bare.DeepCopy()), "")
	wantError(t, w.update(t, controller, sn, bare.DeepCopy()), "")
	adopt := sn.DeepCopy()
	adopt.Annotations[atoll.AdoptAnnotation] = "true"
	wantError(t, w.update(t, olga, sn, adopt), "only an administrator sets annotation")
	contents := sn.DeepCopy()
	contents.Annotations[atoll.DeleteContentsAnnotation] = "true"
	wantError(t, w.update(t, olga, sn, contents), "")
	third := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Spec: atoll.SupervisorNamespaceSpec{ClassName: "team"}}
	wantError(t, w.create(t, olga, third), "allows 2 for each user")
}

func TestTemplates(t *testing.T) {
	a, b := team(), team()
	a.Name, b.Name = "a", "b"
	a.Spec.SelfService.Default, b.Spec.SelfService.Default = false, false
	b.Spec.BasedOn = "a"
	used := owned("used")
	used.Spec.ClassName = "b"
	w := &templates{newWebhook(t, a, b, team(), used)}
	a.Spec.BasedOn = "b"
	_, err := w.ValidateUpdate(t.Context(), nil, a)
	wantError(t, err, "spec.basedOn: Invalid value: \"b\": templates are based on each other: a -> b -> a")
	a.Spec.BasedOn = "none"
	_, err = w.ValidateCreate(t.Context(), a)
	wantError(t, err, "does not exist")
	a.Spec.BasedOn = ""
	a.Spec.SelfService.Default = true
	_, err = w.ValidateUpdate(t.Context(), nil, a)
	wantError(t, err, "SupervisorNamespaceTemplate team is the default already")
	a.Spec.SelfService.Default = false
	a.Spec.Template.Resources.MemoryLimit = quantity("-4Gi")
	_, err = w.ValidateUpdate(t.Context(), nil, a)
	wantError(t, err, "spec.template.resources.memoryLimit")
	_, err = w.ValidateDelete(t.Context(), a)
	wantError(t, err, "it bounds SupervisorNamespaceTemplate b")
	_, err = w.ValidateDelete(t.Context(), b)
	wantError(t, err, "it bounds SupervisorNamespace used")
}

func TestNamespaces(t *testing.T) {
	w := &namespaces{newWebhook(t, team(), owned("first"))}
	create := func(user string, ns *corev1.Namespace) error {
		return w.Default(as(t, user, admissionv1.Create, nil), ns)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "mine"}}
	wantError(t, create(olga, ns), "")
	if ns.Annotations[atoll.TemplateAnnotation] != "team" || ns.Annotations[atoll.CreatorAnnotation] != olga {
		t.Errorf("%v", ns.Annotations)
	}
	wantError(t, create(olga, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{"atoll.dev/host-access": "allowed"}}}), "is for administrators to set")
	wantError(t, create(olga, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}}}), "is for administrators to set")
	wantError(t, create(olga, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-x"}}), "system's own")
	wantError(t, create(mallory, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x"}}), "is not offered")
	plain := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-x", Labels: map[string]string{"atoll.dev/host-access": "allowed"}}}
	wantError(t, create(root, plain), "")
	if len(plain.Annotations) > 0 {
		t.Errorf("an administrator's namespace: %v", plain.Annotations)
	}
	w = &namespaces{newWebhook(t, owned("first"))}
	wantError(t, create(olga, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x"}}), "there is no default SupervisorNamespaceTemplate")
}

func TestNamespaceDeletion(t *testing.T) {
	sn := owned("first")
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "first", Name: "web"}}
	w := &namespaces{newWebhook(t, sn, pod)}
	remove := func(user string) error {
		_, err := w.ValidateDelete(as(t, user, admissionv1.Delete, nil), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "first"}})
		return err
	}
	wantError(t, remove(olga), "1 Pod (web)")
	wantError(t, remove(controller), "")
	sn.Annotations = map[string]string{atoll.DeleteContentsAnnotation: "true"}
	w = &namespaces{newWebhook(t, sn, pod)}
	wantError(t, remove(olga), "")
	w = &namespaces{newWebhook(t, owned("first"))}
	wantError(t, remove(root), "")
}

// TestWhatCannotBeRead is left to the schema by the defaults, which is asked next, and refused by the validation, which is
// asked last.
func TestWhatCannotBeRead(t *testing.T) {
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	w := newWebhook(t)
	defaults := readable{next: admission.WithDefaulter(scheme, w).Handler, decoder: admission.NewDecoder(scheme)}
	validation := admission.WithValidator(scheme, w).Handler
	for spec, readable := range map[string]bool{`{"resources":{"memoryLimit":"1Gi"}}`: true, `{"resources":{"memoryLimit":"lots"}}`: false, `{"resources":{"counts":{"podCount":"many"}}}`: false} {
		req := admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{Operation: admissionv1.Create, UserInfo: authenticationv1.UserInfo{Username: root}}}
		req.Object.Raw = []byte(`{"apiVersion":"atoll.dev/v1alpha1","kind":"SupervisorNamespace","metadata":{"name":"shop"},"spec":` + spec + `}`)
		if got := defaults.Handle(t.Context(), req); !got.Allowed || (len(got.Patches) > 0) != readable {
			t.Errorf("defaults of %s: %+v", spec, got)
		}
		if got := validation.Handle(t.Context(), req); got.Allowed != readable {
			t.Errorf("validation of %s: %+v", spec, got)
		}
	}
}
