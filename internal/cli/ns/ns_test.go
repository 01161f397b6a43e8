package ns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/testkit/golden"
)

// world is a cluster without controllers and a person at its command line.
type world struct {
	*testing.T
	client.WithWatch
	c        *commands
	out, err bytes.Buffer
	locale   string
	columns  int
	// edit changes the file that a person edits.
	edit func(text string) string
	// forbidden makes lists forbidden, and before is called before each change.
	forbidden bool
	before    func()
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme, err := cluster.Scheme(vmopv1.AddToScheme, atoll.AddToScheme)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, columns: 140}
	w.WithWatch = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithStatusSubresource(&atoll.SupervisorNamespace{}).
		WithInterceptorFuncs(interceptor.Funcs{
			List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
				if _, ok := list.(*atoll.SupervisorNamespaceList); ok && w.forbidden {
					return apierrors.NewForbidden(schema.GroupResource{Resource: "supervisornamespaces"}, "", errors.New("no"))
				}
				return c.List(ctx, list, opts...)
			},
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				review, ok := o.(*authorizationv1.SelfSubjectRulesReview)
				if !ok {
					return c.Create(ctx, o, opts...)
				}
				rule := func(resource string, names ...string) authorizationv1.ResourceRule {
					return authorizationv1.ResourceRule{Verbs: []string{"get"}, APIGroups: []string{atoll.GroupName}, Resources: []string{resource}, ResourceNames: names}
				}
				review.Status.ResourceRules = []authorizationv1.ResourceRule{rule("datastores", "bank"), rule("supervisornamespaces", "shop", "gone"), rule("supervisornamespaces", "shop")}
				return nil
			},
			Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
				if w.before != nil {
					f := w.before
					w.before = nil
					f()
				}
				return c.Patch(ctx, o, p, opts...)
			},
		}).Build()
	return w
}

// run is one command line; it returns what was printed to both.
func (w *world) run(args ...string) (string, error) {
	w.Helper()
	w.out.Reset()
	w.err.Reset()
	w.c = &commands{now: time.Now, width: func() int { return w.columns }, Config: Config{
		App:        command.App{In: strings.NewReader(""), Out: &w.out, ErrOut: &w.err},
		Getenv:     func(name string) string { return map[string]string{"LANG": w.locale}[name] },
		Kubeconfig: func() string { return "" },
		Edit: func(_ context.Context, path string) error {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, []byte(w.edit(string(text))), 0o600)
		},
	}}
	w.c.connect = func() (client.WithWatch, error) { return w.WithWatch, nil }
	cmd := w.c.command()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(args)
	cmd.SetOut(&w.out)
	cmd.SetErr(&w.err)
	err := cmd.ExecuteContext(w.Context())
	return w.out.String() + w.err.String(), err
}

func (w *world) must(args ...string) string {
	w.Helper()
	out, err := w.run(args...)
	if err != nil {
		w.Fatalf("atoll ns %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// refused runs a command line that fails and tells how.
func (w *world) refused(args ...string) string {
	w.Helper()
	out, err := w.run(args...)
	if err == nil {
		w.Errorf("atoll ns %s: no error\n%s", strings.Join(args, " "), out)
		return ""
	}
	return err.Error()
}

// namespace reads the namespace shop.
func (w *world) namespace() *atoll.SupervisorNamespace {
	w.Helper()
	b := &atoll.SupervisorNamespace{}
	if err := w.Get(w.Context(), client.ObjectKey{Name: "shop"}, b); err != nil {
		w.Fatal(err)
	}
	return b
}

// ages replaces times, which differ from run to run, and how much room they take.
func ages(text string) string {
	text = regexp.MustCompile(`\b\d+[smhd](\d+[smhd])?\b`).ReplaceAllString(text, "AGE")
	return regexp.MustCompile(`AGE +`).ReplaceAllString(text, "AGE ")
}

func q(text string) *resource.Quantity { return new(resource.MustParse(text)) }

func use(name, used, limit, reservation string) atoll.NamespaceUsage {
	u := atoll.NamespaceUsage{Resource: name, Used: resource.MustParse(used)}
	if limit != "" {
		u.Limit = q(limit)
	}
	if reservation != "" {
		u.Reservation = q(reservation)
	}
	return u
}

func cond(kind string, status metav1.ConditionStatus, message string) metav1.Condition {
	return metav1.Condition{Type: kind, Status: status, Message: message, Reason: "Test", LastTransitionTime: metav1.Now()}
}

// shop has everything bounded, and is over a limit.
func shop() *atoll.SupervisorNamespace {
	return &atoll.SupervisorNamespace{
		ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "1", CreationTimestamp: metav1.NewTime(time.Now().Add(-5 * time.Minute)), Labels: map[string]string{"team": "web"}},
		Spec:       atoll.SupervisorNamespaceSpec{Description: "the web shop", ClassName: "large"},
		Status: atoll.SupervisorNamespaceStatus{
			Effective: &atoll.SupervisorNamespaceSpec{
				Description: "the web shop", ClassName: "large", RestartPriority: "High",
				StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold", Limit: q("10Gi")}, {Name: "silver"}},
				VMClasses:      []atoll.NamespaceReference{{Name: "small"}, {Name: "medium"}},
				ContentSources: []atoll.NamespaceContentSource{{Name: "blessed"}, {Name: "default", Type: namespaceLibrary}},
				Images:         []string{"registry.atoll.local/shop/**"},
				AccessList: []atoll.NamespaceAccess{
					{SubjectType: "User", Subject: "anna", Domain: "atoll.local", Role: "Owner"},
					{SubjectType: "Group", Subject: "devs", Domain: "example.org", Role: "Edit"},
					{SubjectType: "User", Subject: "victor", Role: "View"},
				},
				Network: atoll.NamespaceNetwork{
					Isolation: atoll.IsolationIsolated, ToNamespaces: []string{"bank"}, EgressCIDRs: []string{"10.0.0.0/8"},
				},
				Encryption: atoll.NamespaceEncryption{Required: true, ClassName: "corp"},
				Hosts:      []string{"host-1"},
				Registry:   atoll.NamespaceRegistry{ImmutableTags: []string{"*:v*"}, Retention: []atoll.RegistryRetention{{Pattern: "*:dev-*", KeepLast: 3}}},
			},
			Conditions: []metav1.Condition{
				cond(atoll.NamespaceReady, metav1.ConditionTrue, "everything is in place"),
				cond(atoll.NamespaceWithinLimits, metav1.ConditionFalse, "memory: 20Gi used of 16Gi; nothing is evicted"),
			},
			NamespaceEndpointURL: "https://192.0.2.1:6443", RegistryProject: "registry.atoll.local/shop",
			Usage: []atoll.NamespaceUsage{
				use("count/pods", "7", "50", ""), use("cpu", "2500m", "8", "1"), use("memory", "20Gi", "16Gi", ""),
				use("storageclass/gold", "1Gi", "10Gi", ""), use("storage", "3Gi", "", ""), use("registry", "512Mi", "20Gi", ""),
			},
			Top: []atoll.NamespaceTop{
				{Resource: "cpu", Kind: "VirtualMachine", Name: "db", Used: resource.MustParse("2")},
				{Resource: "memory", Kind: "Pod", Name: "web-0", Used: resource.MustParse("1Gi")},
				{Resource: "storage", Kind: "PersistentVolumeClaim", Name: "data", Used: resource.MustParse("2Gi")},
			},
		},
	}
}

func bank() *atoll.SupervisorNamespace {
	return &atoll.SupervisorNamespace{
		ObjectMeta: metav1.ObjectMeta{Name: "bank", UID: "2", CreationTimestamp: metav1.NewTime(time.Now().Add(-50 * time.Hour))},
		Status: atoll.SupervisorNamespaceStatus{
			Conditions: []metav1.Condition{cond(atoll.NamespaceReady, metav1.ConditionFalse, "StorageClass bronze is not there")},
			Usage:      []atoll.NamespaceUsage{use("cpu", "0", "", ""), use("memory", "21Gi", "32Gi", "")},
		},
	}
}

func TestOutputs(t *testing.T) {
	w := newWorld(t, shop(), bank(), &atoll.SupervisorNamespaceTemplate{
		ObjectMeta: metav1.ObjectMeta{Name: "small"},
		Spec: atoll.SupervisorNamespaceTemplateSpec{
			Template: atoll.SupervisorNamespaceSpec{Resources: atoll.NamespaceResources{CPULimit: q("4"), MemoryLimit: q("8Gi")}}, BasedOn: "base",
			SelfService: atoll.TemplateSelfService{Enabled: true, MaxPerUser: 2, Default: true, Subjects: []atoll.TemplateSubject{{SubjectType: "Group", Subject: "devs"}}},
		},
	})
	var out strings.Builder
	for _, c := range []struct {
		locale  string
		columns int
		args    string
	}{
		{"", 140, "ls"},
		{"de_DE.UTF-8", 200, "ls"},
		{"", 80, "ls shop -o wide"},
		{"", 140, "ls -l team=web -o name"},
		{"", 140, "describe shop"},
		{"C.utf8", 90, "describe shop"},
		{"", 140, "describe bank"},
		{"", 140, "top"},
		{"", 140, "top shop"},
		{"", 140, "top shop -o yaml"},
		{"", 140, "template ls"},
		{"", 140, "template ls -o name"},
	} {
		w.locale, w.columns = c.locale, c.columns
		fmt.Fprintf(&out, "$ atoll ns %s\n%s\n", c.args, ages(w.must(strings.Fields(c.args)...)))
	}
	golden.Compare(t, "outputs.golden", out.String())
	for _, format := range []string{"json", "yaml"} {
		if got := w.must("ls", "-o", format); !strings.Contains(got, "SupervisorNamespaceList") || !strings.Contains(got, "shop") {
			t.Error(got)
		}
		if got := w.must("describe", "shop", "-o", format); !strings.Contains(got, "SupervisorNamespace") || strings.Contains(got, "managedFields") {
			t.Error(got)
		}
	}
}

func TestOwnersSeeTheirOwn(t *testing.T) {
	w := newWorld(t, shop(), bank())
	w.forbidden = true
	if got := w.must("ls", "-o", "name"); got != "supervisornamespace.atoll.dev/shop\n" {
		t.Error(got)
	}
	if got := w.must("__complete", "describe", ""); !strings.HasPrefix(got, "shop\n") {
		t.Error(got)
	}
}

func TestCreate(t *testing.T) {
	w := newWorld(t)
	w.must(strings.Fields(`create lab --wait=false --cpu-limit 8 --memory-limit 16Gi --cpu-reservation 500m --storage-limit 1Ti
		--count pods=20,vms=5 --storage-class gold=10Gi --storage-class silver --vm-class small,medium --content-library blessed,namespace:default
		--image registry.atoll.local/lab/** --owner anna --edit group:devs@example.org --view sso:victor@atoll.local,anna --zone a --host host-1
		--isolation deny-all --egress 10.0.0.0/8 --allow-to bank --encryption-required --encryption-class corp --runtime runc --privileged
		--registry-quota 20Gi --immutable-tag *:v* --retention *:dev-*=3 --restart-priority high --description laboratory --from-template large`)...)
	golden.Compare(t, "created.golden", w.must("describe", "lab", "-o", "yaml"))
	if got := w.refused("create", "lab", "--wait=false"); !strings.Contains(got, "`atoll ns edit lab` changes it") {
		t.Error(got)
	}
	if got := w.must("create", "never", "--dry-run", "--owner", "anna"); got != "never would be made\n" {
		t.Error(got)
	}
	if err := w.Get(t.Context(), client.ObjectKey{Name: "never"}, &atoll.SupervisorNamespace{}); !apierrors.IsNotFound(err) {
		t.Error("a dry run has made it")
	}
}

func TestBadFlags(t *testing.T) {
	w := newWorld(t, shop())
	var out strings.Builder
	for _, args := range []string{
		"create", "create x --cpu-limit lots", "create x --memory-limit -5Gi", "create x --count pods=many", "create x --count cats=1",
		"create x --storage-class gold=much", "create x --owner a@b@c", "create x --owner group:", "create x --isolation tight", "create x --runtime docker",
		"create x --retention dev", "create x --output table", "edit shop --remove-access bob", "frobnicate", "lst", "ls nothing", "describe nothing",
		"template rm",
	} {
		fmt.Fprintf(&out, "$ atoll ns %s\n%s\n", args, w.refused(strings.Fields(args)...))
	}
	golden.Compare(t, "errors.golden", out.String())
}

func TestEditByFlags(t *testing.T) {
	b := shop()
	b.Spec = *b.Status.Effective
	w := newWorld(t, b)
	w.before = func() { // somebody else is faster
		other := w.namespace()
		other.Spec.Description = "theirs"
		if err := w.Update(t.Context(), other); err != nil {
			t.Error(err)
		}
	}
	got := w.must("edit", "shop", "--wait=false", "--vm-class", "any", "--owner", "bob", "--owner", "group:devs@example.org", "--remove-access", "anna", "--cpu-limit", "2", "--encryption-required=false")
	if !strings.Contains(got, "shop is changed\n") || !strings.Contains(got, "memory: 20Gi used of 16Gi") {
		t.Error(got)
	}
	now := w.namespace().Spec
	if now.Description != "theirs" || now.VMClasses != nil || now.Resources.CPULimit.String() != "2" || now.Encryption.Required {
		t.Errorf("%+v", now)
	}
	if got := fmt.Sprint(now.AccessList); got != "[{User victor  View} {User bob atoll.local Owner} {Group devs example.org Owner}]" {
		t.Error(got)
	}
	if got := w.must("edit", "shop", "--cpu-limit", "2"); got != "shop is not changed\n" {
		t.Error(got)
	}
}

func TestEditInEditor(t *testing.T) {
	w := newWorld(t, shop())
	rounds := 0
	w.edit = func(text string) string {
		rounds++
		switch rounds {
		case 1:
			return strings.Replace(text, "spec:", "spec:\n  colour: red", 1)
		case 2:
			if !strings.Contains(text, "# It was not taken: ") || !strings.Contains(text, `unknown field "colour"`) {
				t.Errorf("opened again with\n%s", text)
			}
			return strings.Replace(text, "colour: red", "hosts: [host-2]", 1)
		}
		return text
	}
	if got := w.must("edit", "shop", "--wait=false"); !strings.Contains(got, "shop is changed") || rounds != 2 {
		t.Error(rounds, got)
	}
	if got := w.namespace().Spec.Hosts; len(got) != 1 || got[0] != "host-2" {
		t.Error(got)
	}
	if got := w.must("edit", "shop"); got != "shop is not changed\n" {
		t.Error(got)
	}
	w.edit = func(string) string { return "" }
	if got := w.must("edit", "shop"); got != "shop is not changed\n" {
		t.Error(got)
	}
	// Somebody else changes it while it is open, and the person gives up.
	w.edit = func(text string) string {
		if strings.Contains(text, "somebody else has changed shop") {
			return text
		}
		other := w.namespace()
		other.Spec.Description = "theirs"
		if err := w.Update(t.Context(), other); err != nil {
			t.Error(err)
		}
		return strings.Replace(text, "host-2", "host-3", 1)
	}
	got := w.refused("edit", "shop")
	if !strings.Contains(got, "what was edited is in ") || w.namespace().Spec.Hosts[0] != "host-2" {
		t.Error(got)
	}
}

func TestDelete(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data"}}
	w := newWorld(t, shop(), bank(), pod, claim)
	if got, want := w.refused("delete", "shop"), "shop is not empty, there are 1 pods, 1 volumes, 512 MiB of images in it; --with-contents deletes them too"; got != want {
		t.Error(got)
	}
	w.namespace()
	if got := w.must("delete", "bank"); got != "bank is deleted\n" {
		t.Error(got)
	}
	if got := w.must("delete", "shop", "--with-contents", "--yes"); got != "shop is deleted\n" {
		t.Error(got)
	}
}

func TestCompletion(t *testing.T) {
	w := newWorld(t, shop(), bank(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "host-1", Labels: map[string]string{corev1.LabelTopologyZone: "a"}}})
	for args, want := range map[string]string{
		"ls shop ": "bank", "describe ": "bank\nshop", "describe shop ": "", "edit shop --host ": "host-1", "edit shop --zone ": "a",
		"create x --isolation ": "open\nisolated\ndeny-all", "create x --owner ": "", "ls -o ": "table\nwide\njson\nyaml\nname",
	} {
		got := w.must(append([]string{"__complete"}, strings.Split(args, " ")...)...)
		got, _, _ = strings.Cut(got, ":4")
		if strings.TrimSpace(got) != want {
			t.Errorf("%q: %q", args, got)
		}
	}
}
