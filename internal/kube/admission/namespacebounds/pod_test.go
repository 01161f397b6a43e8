package namespacebounds

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/testkit/golden"
)

type spec = atoll.SupervisorNamespaceSpec

func image(name string) func(*core.Pod) {
	return func(p *core.Pod) { p.Spec.Containers[0].Image = name }
}

func class(name string) func(*core.Pod) {
	return func(p *core.Pod) { p.Spec.RuntimeClassName = &name }
}

func noClass(p *core.Pod)     { p.Spec.RuntimeClassName = nil }
func hostNetwork(p *core.Pod) { p.Spec.SecurityContext.HostNetwork = true }

func hostPort(p *core.Pod) {
	p.Spec.Containers[0].Ports = []core.ContainerPort{{ContainerPort: 80}, {ContainerPort: 80, HostPort: 443}}
}

func probe(p *core.Pod) {
	p.Spec.Containers[0].LivenessProbe = &core.Probe{ProbeHandler: core.ProbeHandler{HTTPGet: &core.HTTPGetAction{Host: "127.0.0.1"}}}
}

func privilegedMain(p *core.Pod) {
	yes := true
	p.Spec.Containers[0].SecurityContext = &core.SecurityContext{Privileged: &yes}
}

func debugger(image string, privileged bool) func(*core.Pod) {
	return func(p *core.Pod) {
		p.Spec.EphemeralContainers = []core.EphemeralContainer{{EphemeralContainerCommon: core.EphemeralContainerCommon{
			Name: "debug", Image: image, SecurityContext: &core.SecurityContext{Privileged: &privileged},
		}}}
	}
}

func imageVolume(p *core.Pod) {
	p.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: core.VolumeSource{Image: &core.ImageVolumeSource{Reference: "evil.example/data"}}}}
}

func ephemeral(class string) func(*core.Pod) {
	return func(p *core.Pod) {
		p.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: core.VolumeSource{Ephemeral: &core.EphemeralVolumeSource{
			VolumeClaimTemplate: &core.PersistentVolumeClaimTemplate{Spec: core.PersistentVolumeClaimSpec{StorageClassName: &class}},
		}}}}
	}
}

func volume(source core.VolumeSource) func(*core.Pod) {
	return func(p *core.Pod) { p.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: source}} }
}

func nodeName(name string) func(*core.Pod) { return func(p *core.Pod) { p.Spec.NodeName = name } }

func mirror(p *core.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} }

func TestPods(t *testing.T) {
	only := spec{Images: []string{"registry.atoll.local/shop/**", "busybox"}}
	places := spec{Hosts: []string{"host-1"}}
	zones := spec{Zones: []atoll.NamespaceReference{{Name: "a"}}}
	storage := spec{StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold"}}}
	var out strings.Builder
	for _, c := range []struct {
		name    string
		spec    spec
		op      admission.Operation
		sub     string
		changes []func(*core.Pod)
	}{
		{"nothing bounded", spec{}, admission.Create, "", nil},
		{"image allowed", only, admission.Create, "", nil},
		{"image allowed by a short name", only, admission.Create, "", []func(*core.Pod){image("busybox:1.36")}},
		{"image of another project", only, admission.Create, "", []func(*core.Pod){image("registry.atoll.local/bank/web:1")}},
		{"image that is no reference", only, admission.Create, "", []func(*core.Pod){image("../shop/web")}},
		{"no image allowed", spec{Images: []string{}}, admission.Create, "", nil},
		{"image changed", only, admission.Update, "", []func(*core.Pod){image("evil.example/web")}},
		{"image volume", only, admission.Create, "", []func(*core.Pod){imageVolume}},
		{"ephemeral container", only, admission.Update, "ephemeralcontainers", []func(*core.Pod){debugger("evil.example/sh", false)}},
		{"privileged", spec{}, admission.Create, "", []func(*core.Pod){privilegedMain}},
		{"privileged allowed", spec{PodRuntime: atoll.NamespacePodRuntime{PrivilegedAllowed: true}}, admission.Create, "", []func(*core.Pod){privilegedMain}},
		{"privileged ephemeral container", spec{}, admission.Update, "ephemeralcontainers", []func(*core.Pod){debugger("busybox", true)}},
		{"privileged under runc", spec{PodRuntime: atoll.NamespacePodRuntime{Policy: atoll.RuntimeRunc}}, admission.Create, "", []func(*core.Pod){class("runc"), privilegedMain}},
		{"privileged ephemeral container under runc", spec{PodRuntime: atoll.NamespacePodRuntime{Policy: atoll.RuntimeRunc}}, admission.Update, "ephemeralcontainers", []func(*core.Pod){class("runc"), debugger("busybox", true)}},
		{"privileged allowed under runc", spec{PodRuntime: atoll.NamespacePodRuntime{Policy: atoll.RuntimeRunc, PrivilegedAllowed: true}}, admission.Create, "", []func(*core.Pod){class("runc"), privilegedMain}},
		{"host network", spec{}, admission.Create, "", []func(*core.Pod){noClass, hostNetwork}},
		{"host port", spec{}, admission.Create, "", []func(*core.Pod){hostPort}},
		{"a probe of another address", spec{PodRuntime: atoll.NamespacePodRuntime{PrivilegedAllowed: true}}, admission.Create, "", []func(*core.Pod){probe}},
		{"host port under runc", spec{PodRuntime: atoll.NamespacePodRuntime{Policy: atoll.RuntimeRunc}}, admission.Create, "", []func(*core.Pod){hostPort}},
		{"host network under runc", spec{PodRuntime: atoll.NamespacePodRuntime{Policy: atoll.RuntimeRunc}}, admission.Create, "", []func(*core.Pod){class("runc"), hostNetwork}},
		{"a volume of a server", spec{}, admission.Create, "", []func(*core.Pod){volume(core.VolumeSource{NFS: &core.NFSVolumeSource{Server: "192.0.2.1", Path: "/"}})}},
		{"a volume of a driver", spec{}, admission.Create, "", []func(*core.Pod){volume(core.VolumeSource{CSI: &core.CSIVolumeSource{Driver: "nfs.example"}})}},
		{"runc", spec{}, admission.Create, "", []func(*core.Pod){class("runc")}},
		{"runc by another name", spec{}, admission.Create, "", []func(*core.Pod){class("sneaky")}},
		{"runc allowed", spec{PodRuntime: atoll.NamespacePodRuntime{Policy: atoll.RuntimeRunc}}, admission.Create, "", []func(*core.Pod){class("sneaky")}},
		{"ephemeral container of a pod under runc", spec{PodRuntime: atoll.NamespacePodRuntime{PrivilegedAllowed: true}}, admission.Update, "ephemeralcontainers", []func(*core.Pod){class("runc"), debugger("busybox", true)}},
		{"labels of a pod under runc", spec{}, admission.Update, "", []func(*core.Pod){class("runc")}},
		{"a virtual machine's pod", only, admission.Create, "", []func(*core.Pod){class("atoll-vm"), image("registry.k8s.example/machine"), privilegedMain}},
		{"a mirror pod", only, admission.Create, "", []func(*core.Pod){mirror, image("x")}},
		{"priority of the system", spec{}, admission.Create, "", []func(*core.Pod){func(p *core.Pod) { p.Spec.PriorityClassName = "system-node-critical" }}},
		{"host allowed", places, admission.Create, "", []func(*core.Pod){nodeName("host-1")}},
		{"host not allowed", places, admission.Create, "", []func(*core.Pod){nodeName("host-2")}},
		{"host of the zone", zones, admission.Create, "", []func(*core.Pod){nodeName("host-1")}},
		{"host of another zone", zones, admission.Create, "", []func(*core.Pod){nodeName("host-2")}},
		{"unknown host", zones, admission.Create, "", []func(*core.Pod){nodeName("host-9")}},
		{"ephemeral volume allowed", storage, admission.Create, "", []func(*core.Pod){ephemeral("gold")}},
		{"ephemeral volume", storage, admission.Create, "", []func(*core.Pod){ephemeral("standard")}},
	} {
		w := newWorld(t, c.spec)
		var old *core.Pod
		if c.op == admission.Update {
			old = newPod(shopNS)
		}
		fmt.Fprintf(&out, "%s: %s\n", c.name, text(w.send(podAsk(c.op, c.sub, newPod(shopNS, c.changes...), old))))
		if err := w.send(podAsk(c.op, c.sub, newPod(plainNS, c.changes...), old)); err != nil {
			t.Errorf("%s in a plain namespace: %v", c.name, err)
		}
	}
	golden.Compare(t, "pods.golden", out.String())
}

// An ID of an image is on no list, whatever the patterns are; a digest of a repository is as good as the repository.
func TestImageIDs(t *testing.T) {
	hex := strings.Repeat("0123456789abcdef", 4)
	all := []string{"**", "docker.io/**", "docker.io/library/*", "sha256", "sha256:*", "*"}
	for image, want := range map[string]bool{
		"sha256:" + hex:                    false,
		"sha256:" + hex[:8]:                false, // containerd finds an image by the beginning of its ID
		"sha256":                           false,
		"sha512:" + hex + hex:              false,
		hex:                                false,
		"busybox@sha256:" + hex:            true,
		"docker.io/library/sha256:" + hex:  true, // no ID: it has to be pulled
		"registry.atoll.local/shop/sha256": true,
	} {
		if got := imageAllowed(all, image); got != want {
			t.Errorf("%s: %v", image, got)
		}
	}
	project := []string{"registry.atoll.local/shop/**"}
	for image, want := range map[string]bool{
		"registry.atoll.local/shop/web":          true,
		"registry.atoll.local/shop/a/b/c:1":      true,
		"registry.atoll.local/shop2/web":         false,
		"registry.atoll.local/bank/shop/web":     false,
		"registry.atoll.local/shop/../bank/web":  false,
		"registry.atoll.local:443/shop/web":      false,
		"registry.atoll.local.evil/shop/web":     false,
		"evil/registry.atoll.local/shop/web":     false,
		"sha256:" + hex:                          false,
		"registry.atoll.local/shop/web@sha256:1": false,
	} {
		if got := imageAllowed(project, image); got != want {
			t.Errorf("%s: %v", image, got)
		}
	}
}

func TestWhatIsNotKnownIsRefused(t *testing.T) {
	w := newWorld(t, spec{})
	for ns, want := range map[string]string{
		orphanNS: `namespace "orphan" has the label atoll.dev/supervisor-namespace, but there is no SupervisorNamespace orphan`,
		laterNS:  `limit spec.images: only registry.atoll.local/later/** may be used`,
		"gone":   "accepted", // for NamespaceLifecycle to refuse
	} {
		if got := text(w.send(podAsk(admission.Create, "", newPod(ns), nil))); !strings.Contains(got, want) {
			t.Errorf("%s: %s", ns, got)
		}
	}
	synctest.Test(t, func(t *testing.T) { // time passes at once
		w := newWorld(t, spec{})
		w.SetReadyFunc(func() bool { return false })
		if got := text(w.send(podAsk(admission.Create, "", newPod(plainNS), nil))); !strings.Contains(got, "still starting") {
			t.Error(got)
		}
	})
}

func TestPlaces(t *testing.T) {
	w := newWorld(t, spec{Hosts: []string{"host-1", "host-3"}, Zones: []atoll.NamespaceReference{{Name: "a"}}})
	pod := newPod(shopNS, func(p *core.Pod) {
		term := func(r ...core.NodeSelectorRequirement) core.NodeSelectorTerm {
			return core.NodeSelectorTerm{MatchExpressions: r}
		}
		p.Spec.Affinity = &core.Affinity{NodeAffinity: &core.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &core.NodeSelector{
			NodeSelectorTerms: []core.NodeSelectorTerm{
				term(core.NodeSelectorRequirement{Key: "disk", Operator: core.NodeSelectorOpExists}),
				{},
				term(core.NodeSelectorRequirement{Key: corev1.LabelHostname, Operator: core.NodeSelectorOpIn, Values: []string{"host-2"}}),
			},
		}}}
	})
	if err := w.send(podAsk(admission.Create, "", pod, nil)); err != nil {
		t.Fatal(err)
	}
	terms := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if got, want := fmt.Sprint(terms), "[{[{disk Exists []} {topology.kubernetes.io/zone In [a]} {kubernetes.io/hostname In [host-1.example host-3]}] []} {[] []} "+
		"{[{kubernetes.io/hostname In [host-2]} {topology.kubernetes.io/zone In [a]} {kubernetes.io/hostname In [host-1.example host-3]}] []}]"; got != want {
		t.Errorf("terms %s", got)
	}
	// Somebody takes it away between.
	a := podAsk(admission.Create, "", newPod(shopNS), nil)
	attrs := admission.NewAttributesRecord(a.obj, nil, a.gvk, a.ns, a.name, a.gvr, "", a.op, nil, false, anna())
	if got := text(w.Validate(t.Context(), attrs, nil)); !strings.Contains(got, "limit spec.hosts, spec.zones: only host-1, host-3, a may be used; asked: a pod whose required node affinity") {
		t.Error(got)
	}
	binding := ask{
		obj: &core.Binding{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: shopNS}, Target: core.ObjectReference{Kind: "Node", Name: "host-2"}},
		gvk: core.Kind("Binding").WithVersion("v1"), ns: shopNS, name: "web", op: admission.Create,
	}
	for _, where := range []struct{ resource, subresource string }{{"pods", "binding"}, {"bindings", ""}} {
		binding.gvr, binding.subresource = core.Resource(where.resource).WithVersion("v1"), where.subresource
		if got := text(w.send(binding)); !strings.Contains(got, "limit spec.hosts: only host-1, host-3 may be used; asked: a binding to host host-2") {
			t.Error(got)
		}
	}
}

func TestServices(t *testing.T) {
	w := newWorld(t, spec{})
	svc := func(ips ...string) *core.Service {
		return &core.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: shopNS}, Spec: core.ServiceSpec{ExternalIPs: ips}}
	}
	r := ask{obj: svc(), gvk: core.Kind("Service").WithVersion("v1"), gvr: core.Resource("services").WithVersion("v1"), ns: shopNS, name: "web", op: admission.Create}
	if err := w.send(r); err != nil {
		t.Error(err)
	}
	r.obj = svc("192.0.2.1")
	if got := text(w.send(r)); !strings.Contains(got, `namespace "shop": a Service may not take addresses by spec.externalIPs`) {
		t.Error(got)
	}
	r.old, r.op = svc("192.0.2.1"), admission.Update
	if err := w.send(r); err != nil {
		t.Error(err)
	}
}

func TestNothingElseIsLookedAt(t *testing.T) {
	w := newWorld(t, spec{Images: []string{}})
	w.SetReadyFunc(func() bool { t.Error("the caches are waited for"); return true })
	for _, r := range []ask{
		podAsk(admission.Update, "status", newPod(shopNS), newPod(shopNS)),
		{
			obj: &core.ConfigMap{}, gvr: core.Resource("configmaps").WithVersion("v1"), gvk: core.Kind("ConfigMap").WithVersion("v1"),
			ns: shopNS, op: admission.Create,
		},
		{old: newPod(shopNS), gvr: core.Resource("pods").WithVersion("v1"), ns: shopNS, op: admission.Delete},
	} {
		if err := w.send(r); err != nil {
			t.Error(err)
		}
	}
}
