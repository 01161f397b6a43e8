package namespacebounds

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/networking"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/kube/admission/podruntime"
	"atoll.dev/atoll/internal/testkit/golden"
)

// meta returns metadata with labels.
func labelled(name string, labels ...string) metav1.ObjectMeta {
	m := metav1.ObjectMeta{Name: name, Namespace: shopNS, Labels: map[string]string{}}
	for i := 0; i+1 < len(labels); i += 2 {
		m.Labels[labels[i]] = labels[i+1]
	}
	return m
}

func TestWhatAdministratorsLookAfter(t *testing.T) {
	mark, tier := atoll.SupervisorNamespaceLabel, atoll.TierLabel
	quota := func(labels ...string) runtime.Object {
		return &core.ResourceQuota{ObjectMeta: labelled("shop-quota", labels...)}
	}
	policy := func(labels ...string) runtime.Object {
		return &networking.NetworkPolicy{ObjectMeta: labelled("p", labels...)}
	}
	namespace := func(labels ...string) runtime.Object {
		ns := &core.Namespace{ObjectMeta: labelled(shopNS, labels...)}
		ns.Namespace = ""
		return ns
	}
	annotated := namespace(mark, shopNS).(*core.Namespace)
	annotated.Annotations = map[string]string{atoll.RestartPriorityAnnotation: "Highest"}
	cleaner := &user.DefaultInfo{Name: "system:serviceaccount:kube-system:namespace-controller", Groups: []string{"system:serviceaccounts:kube-system"}}
	masters := &user.DefaultInfo{Name: "atoll-admin", Groups: []string{user.SystemPrivilegedGroup}}
	expander := &user.DefaultInfo{Name: controller}
	var out strings.Builder
	for _, c := range []struct {
		name     string
		resource string
		sub      string
		op       admission.Operation
		now, old runtime.Object
		who      user.Info
	}{
		{"a quota of her own", "resourcequotas", "", admission.Create, quota(), nil, anna()},
		{"a quota with the label", "resourcequotas", "", admission.Create, quota(mark, shopNS), nil, anna()},
		{"by an administrator", "resourcequotas", "", admission.Create, quota(mark, shopNS), nil, administrator()},
		{"by a master", "resourcequotas", "", admission.Create, quota(mark, shopNS), nil, masters},
		{"by the controller", "resourcequotas", "", admission.Create, quota(mark, shopNS), nil, expander},
		{"by a part of the control plane", "resourcequotas", "", admission.Create, quota(mark, shopNS), nil, cleaner},
		{"a policy of another tier", "networkpolicies", "", admission.Create, policy(tier, "mine"), nil, anna()},
		{"a policy of administrators", "networkpolicies", "", admission.Create, policy(tier, atoll.TierAdministrator), nil, anna()},
		{"a policy becomes one", "networkpolicies", "", admission.Update, policy(tier, atoll.TierAdministrator), policy(), anna()},
		{"the quota changes", "resourcequotas", "", admission.Update, quota(mark, shopNS), quota(mark, shopNS), anna()},
		{"the quota changes, by an administrator", "resourcequotas", "", admission.Update, quota(mark, shopNS), quota(mark, shopNS), administrator()},
		{"the quota loses its label", "resourcequotas", "", admission.Update, quota(), quota(mark, shopNS), anna()},
		{"the quota's status", "resourcequotas", "status", admission.Update, quota(mark, shopNS), quota(mark, shopNS), anna()},
		{"the quota loses its label by its status", "resourcequotas", "status", admission.Update, quota(), quota(mark, shopNS), anna()},
		{"the quota is deleted", "resourcequotas", "", admission.Delete, nil, quota(mark, shopNS), anna()},
		{"the quota is deleted with its namespace", "resourcequotas", "", admission.Delete, nil, quota(mark, shopNS), cleaner},
		{"a whole collection is deleted", "resourcequotas", "", admission.Delete, nil, nil, anna()},
		{"the namespace gets a label", "namespaces", "", admission.Update, namespace(mark, shopNS, "team", "web"), namespace(mark, shopNS), anna()},
		{"the namespace lets pods use the host", "namespaces", "", admission.Update, namespace(mark, shopNS, podruntime.HostAccessLabel, "allowed"), namespace(mark, shopNS), anna()},
		{
			"the namespace loses its pod security", "namespaces", "", admission.Update,
			namespace(mark, shopNS), namespace(mark, shopNS, "pod-security.kubernetes.io/enforce", "baseline"), anna(),
		},
		{"the namespace loses its bounds", "namespaces", "", admission.Update, namespace(), namespace(mark, shopNS), anna()},
		{"the namespace is restarted first", "namespaces", "", admission.Update, annotated, namespace(mark, shopNS), anna()},
		{"the namespace is finalized", "namespaces", "finalize", admission.Update, namespace(), namespace(mark, shopNS), cleaner},
		{"the namespace is deleted by its owner", "namespaces", "", admission.Delete, nil, namespace(mark, shopNS), anna()},
		{"the namespace is deleted by another", "namespaces", "", admission.Delete, nil, namespace(mark, shopNS), &user.DefaultInfo{Name: "sso:mallory@atoll.local"}},
	} {
		w := newWorld(t, spec{})
		object := c.now
		if object == nil {
			object = c.old
		}
		ns, name := shopNS, "all"
		if object != nil {
			m, err := meta.Accessor(object)
			if err != nil {
				t.Fatal(err)
			}
			ns, name = m.GetNamespace(), m.GetName()
		}
		r := ask{
			obj: c.now, old: c.old, ns: ns, name: name, op: c.op, who: c.who, subresource: c.sub,
			gvk: core.Kind("Any").WithVersion("v1"), gvr: core.Resource(c.resource).WithVersion("v1"),
		}
		fmt.Fprintf(&out, "%s: %s\n", c.name, text(w.send(r)))
	}
	golden.Compare(t, "marks.golden", out.String())
}

// TestEncryptionClass: the class that the limits name is not for who is limited.
func TestEncryptionClass(t *testing.T) {
	class := func(name string) runtime.Object {
		u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "encryption.vmware.com/v1alpha1", "kind": "EncryptionClass"}}
		u.SetName(name)
		u.SetNamespace(shopNS)
		return u
	}
	w := newWorld(t, spec{Encryption: atoll.NamespaceEncryption{Required: true, ClassName: "corp"}})
	cleaner := &user.DefaultInfo{Name: "system:serviceaccount:kube-system:namespace-controller", Groups: []string{"system:serviceaccounts:kube-system"}}
	for _, c := range []struct {
		name     string
		op       admission.Operation
		now, old runtime.Object
		sub, ns  string
		who      user.Info
		refused  string
	}{
		{"made", admission.Create, class("corp"), nil, "", shopNS, anna(), `limit spec.encryption.className: its volumes must be encrypted by EncryptionClass corp, which only administrators make, change and delete; asked: to create it; ask an administrator; owners: sso:anna@atoll.local`},
		{"changed", admission.Update, class("corp"), class("corp"), "", shopNS, anna(), "asked: to update it"},
		{"deleted", admission.Delete, nil, class("corp"), "", shopNS, anna(), "asked: to delete it"},
		{"made by an administrator", admission.Create, class("corp"), nil, "", shopNS, administrator(), ""},
		{"changed by an administrator", admission.Update, class("corp"), class("corp"), "", shopNS, administrator(), ""},
		{"deleted by an administrator", admission.Delete, nil, class("corp"), "", shopNS, administrator(), ""},
		{"deleted with its namespace", admission.Delete, nil, class("corp"), "", shopNS, cleaner, ""},
		{"status", admission.Update, class("corp"), class("corp"), "status", shopNS, anna(), ""},
		{"another class", admission.Update, class("mine"), class("mine"), "", shopNS, anna(), ""},
		{"a whole collection", admission.Delete, nil, nil, "", shopNS, anna(), ""},
		{"where nothing is bounded", admission.Update, class("corp"), class("corp"), "", plainNS, anna(), ""},
	} {
		r := ask{obj: c.now, old: c.old, gvk: encryption.GroupVersion().WithKind("EncryptionClass"), gvr: encryption.Classes(), ns: c.ns, op: c.op, subresource: c.sub, who: c.who}
		if err := w.send(r); c.refused == "" && err != nil || c.refused != "" && !strings.Contains(text(err), c.refused) {
			t.Errorf("%s: %s", c.name, text(err))
		}
	}
}

// quotaPlugin is an upstream plugin that refuses everything.
type quotaPlugin struct {
	*admission.Handler
	err error
}

func (q quotaPlugin) Validate(context.Context, admission.Attributes, admission.ObjectInterfaces) error {
	return q.err
}

func TestUpstreamRefusalsSayWho(t *testing.T) {
	w := newWorld(t, spec{})
	refused := apierrors.NewForbidden(core.Resource("pods"), "web", errors.New("exceeded quota: shop-quota, requested: limits.cpu=4, used: limits.cpu=2, limited: limits.cpu=4"))
	send := func(plugin, ns string, err error) error {
		d := Explain(w.source).Decorate(quotaPlugin{admission.NewHandler(admission.Create), err}, plugin)
		if m, ok := d.(admission.MutationInterface); ok {
			if err := m.Admit(t.Context(), nil, nil); err != nil {
				t.Errorf("a plugin that does not change anything: %v", err)
			}
		}
		a := admission.NewAttributesRecord(newPod(ns), nil, core.Kind("Pod").WithVersion("v1"), ns, "web", core.Resource("pods").WithVersion("v1"), "", admission.Create, nil, false, anna())
		return d.(admission.ValidationInterface).Validate(t.Context(), a, nil)
	}
	got := send("ResourceQuota", shopNS, refused)
	want := `pods "web" is forbidden: exceeded quota: shop-quota, requested: limits.cpu=4, used: limits.cpu=2, limited: limits.cpu=4; ` +
		`namespace "shop": administrators can change it: atoll ns edit shop; owners: sso:anna@atoll.local, group sso:devs@example.org`
	if got == nil || got.Error() != want || !apierrors.IsForbidden(got) {
		t.Errorf("got %v", got)
	}
	if strings.Contains(refused.Error(), "atoll ns") {
		t.Error("upstream's error was changed")
	}
	for _, c := range []struct {
		plugin, ns string
		err        error
	}{{"ResourceQuota", plainNS, refused}, {"NodeRestriction", shopNS, refused}, {"ResourceQuota", shopNS, nil}, {"ResourceQuota", shopNS, errors.New("etcd")}} {
		if got := send(c.plugin, c.ns, c.err); !errors.Is(got, c.err) {
			t.Errorf("%s in %s: %v", c.plugin, c.ns, got)
		}
	}
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, image string
		want           bool
	}{
		{"registry.atoll.local/shop/*", "registry.atoll.local/shop/web", true},
		{"registry.atoll.local/shop/*", "registry.atoll.local/shop/web:1", true},
		{"registry.atoll.local/shop/*", "registry.atoll.local/shop/a/web", false},
		{"registry.atoll.local/shop/**", "registry.atoll.local/shop/a/b/web@sha256:" + strings.Repeat("a", 64), true},
		{"registry.atoll.local/**/web", "registry.atoll.local/web", true},
		{"registry.atoll.local/shop/*", "registry.atoll.local.evil.example/shop/web", false},
		{"registry.atoll.local/shop/*", "evil.example/registry.atoll.local/shop/web", false},
		{"registry.atoll.local:5000/shop/web", "registry.atoll.local:5000/shop/web:2", true},
		{"registry.atoll.local/shop/web:1.*", "registry.atoll.local/shop/web:1.2", true},
		{"registry.atoll.local/shop/web:1.*", "registry.atoll.local/shop/web:2.0", false},
		{"registry.atoll.local/shop/web:latest", "registry.atoll.local/shop/web", true},
		{"busybox", "busybox:1.36", true},
		{"docker.io/library/*", "busybox", true},
		{"busybox", "evil.example/busybox", false},
		{"**", "anything.example/at/all", true},
		{"**", "UPPER CASE", false},
		{"[", "busybox", false},
		{strings.Repeat("**/", 200) + "x", "registry.atoll.local/" + strings.Repeat("a/", 60) + "y", false},
	} {
		if got := imageAllowed([]string{c.pattern}, c.image); got != c.want {
			t.Errorf("%s matches %s: %v", c.pattern, c.image, got)
		}
	}
}

// BenchmarkPod is what the plugin adds to the creation of a pod.
func BenchmarkPod(b *testing.B) {
	for name, ns := range map[string]string{"plain": plainNS, "bounded": shopNS} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, spec{
				Images: []string{"docker.io/library/*", "registry.atoll.local/shop/**"}, Hosts: []string{"host-1", "host-2"},
				StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold"}},
			})
			for i := range 200 {
				w.source.ledger.reserve(&atoll.SupervisorNamespace{
					ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("other-", i)},
				})
				w.source.ledger.pod(running(fmt.Sprint("other-", i), fmt.Sprint(i), "1m", "1Mi"))
			}
			for b.Loop() {
				r := podAsk(admission.Create, "", newPod(ns, ephemeral("gold")), nil)
				if err := w.send(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
