package podruntime

import (
	"context"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/apis/core"
)

const (
	plainNS = "plain"
	hostNS  = "host"
	freshNS = "fresh" // not in the cache yet
)

// newPlugin returns a ready plugin over three namespaces and three classes.
func newPlugin(t *testing.T) *Plugin {
	t.Helper()
	allowed := map[string]string{HostAccessLabel: HostAccessAllowed}
	client := fake.NewClientset(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: freshNS, Labels: allowed}},
	)
	factory := informers.NewSharedInformerFactory(client, 0)
	p := New()
	p.SetExternalKubeClientSet(client)
	p.SetExternalKubeInformerFactory(factory)
	p.SetReadyFunc(func() bool { return true })
	if err := p.ValidateInitialization(); err != nil {
		t.Fatal(err)
	}
	for _, ns := range []*corev1.Namespace{
		{ObjectMeta: metav1.ObjectMeta{Name: plainNS, Labels: map[string]string{HostAccessLabel: "no"}}},
		{ObjectMeta: metav1.ObjectMeta{Name: hostNS, Labels: allowed}},
	} {
		if err := factory.Core().V1().Namespaces().Informer().GetStore().Add(ns); err != nil {
			t.Fatal(err)
		}
	}
	for name, handler := range map[string]string{ClassMicroVM: ClassMicroVM, ClassHost: ClassHost, "sneaky": ClassHost, "other": "other"} {
		rc := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler}
		if err := factory.Node().V1().RuntimeClasses().Informer().GetStore().Add(rc); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

type change func(*core.Pod)

func class(name string) change {
	return func(p *core.Pod) { p.Spec.RuntimeClassName = &name }
}

func hostNetwork(p *core.Pod) { p.Spec.SecurityContext.HostNetwork = true }
func hostPID(p *core.Pod)     { p.Spec.SecurityContext.HostPID = true }
func hostIPC(p *core.Pod)     { p.Spec.SecurityContext.HostIPC = true }

func hostPath(p *core.Pod) {
	p.Spec.Volumes = append(p.Spec.Volumes, core.Volume{Name: "h", VolumeSource: core.VolumeSource{HostPath: &core.HostPathVolumeSource{Path: "/"}}})
}

func nfs(p *core.Pod) {
	p.Spec.Volumes = append(p.Spec.Volumes, core.Volume{Name: "n", VolumeSource: core.VolumeSource{NFS: &core.NFSVolumeSource{Server: "192.0.2.1", Path: "/"}}})
}

func privilegedMain(p *core.Pod) {
	yes := true
	p.Spec.Containers[0].SecurityContext = &core.SecurityContext{Privileged: &yes}
}

func privilegedInit(p *core.Pod) {
	yes := true
	p.Spec.InitContainers = []core.Container{{Name: "i", SecurityContext: &core.SecurityContext{Privileged: &yes}}}
}

func privilegedDebug(p *core.Pod) {
	yes := true
	p.Spec.EphemeralContainers = []core.EphemeralContainer{{EphemeralContainerCommon: core.EphemeralContainerCommon{Name: "d", SecurityContext: &core.SecurityContext{Privileged: &yes}}}}
}

func plainDebug(p *core.Pod) {
	p.Spec.EphemeralContainers = []core.EphemeralContainer{{EphemeralContainerCommon: core.EphemeralContainerCommon{Name: "d"}}}
}

func device(p *core.Pod) {
	p.Spec.Containers[0].Resources.Limits = core.ResourceList{"example.com/gpu": resource.MustParse("1")}
}

func claim(p *core.Pod) { p.Spec.ResourceClaims = []core.PodResourceClaim{{Name: "c"}} }

func hugepages(p *core.Pod) {
	p.Spec.Containers[0].Resources.Limits = core.ResourceList{"hugepages-2Mi": resource.MustParse("2Mi")}
}

func mirror(p *core.Pod) {
	p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
}

func newPod(namespace string, changes []change) *core.Pod {
	pod := &core.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: namespace},
		Spec: core.PodSpec{
			SecurityContext: &core.PodSecurityContext{},
			Containers:      []core.Container{{Name: "c"}},
		},
	}
	for _, change := range changes {
		change(pod)
	}
	return pod
}

func attributes(pod *core.Pod, subresource string, op admission.Operation) admission.Attributes {
	return admission.NewAttributesRecord(pod, nil, core.Kind("Pod").WithVersion("version"), pod.Namespace, pod.Name,
		core.Resource("pods").WithVersion("version"), subresource, op, &metav1.CreateOptions{}, false, &user.DefaultInfo{Name: "someone"})
}

func TestCreate(t *testing.T) {
	for _, c := range []struct {
		name    string
		ns      string
		changes []change
		class   string // of the admitted pod
		refused string // part of the message
	}{
		{"plain pod", plainNS, nil, ClassMicroVM, ""},
		{"plain pod where the host is allowed", hostNS, nil, ClassMicroVM, ""},
		{"empty class name", plainNS, []change{class("")}, ClassMicroVM, ""},
		{"host network", plainNS, []change{hostNetwork}, "", `spec.hostNetwork needs the host, but pods of namespace "plain" run in micro-VMs; remove it, or have an administrator run: kubectl label namespace plain atoll.dev/host-access=allowed`},
		{"host network, allowed", hostNS, []change{hostNetwork}, ClassHost, ""},
		{"namespace not cached yet", freshNS, []change{hostNetwork}, ClassHost, ""},
		{"unknown namespace", "nowhere", []change{hostNetwork}, "", "spec.hostNetwork"},
		{"host pid", plainNS, []change{hostPID}, "", "spec.hostPID"},
		{"host pid, allowed", hostNS, []change{hostPID}, ClassHost, ""},
		{"host ipc", plainNS, []change{hostIPC}, "", "spec.hostIPC"},
		{"host path", plainNS, []change{hostPath}, "", "spec.volumes[0].hostPath"},
		{"host path, allowed", hostNS, []change{hostPath}, ClassHost, ""},
		{"nfs", plainNS, []change{nfs}, "", `spec.volumes[0].nfs needs the host, but pods of namespace "plain" run in micro-VMs; remove it`},
		{"nfs, allowed", hostNS, []change{nfs}, ClassHost, ""},
		{"explicit micro-VM, nfs", plainNS, []change{class(ClassMicroVM), nfs}, "", "spec.volumes[0].nfs needs the host"},
		{"privileged", plainNS, []change{privilegedMain}, ClassMicroVM, ""},
		{"privileged where the host is allowed", hostNS, []change{privilegedMain}, ClassMicroVM, ""},
		{"privileged init", plainNS, []change{privilegedInit}, ClassMicroVM, ""},
		{"privileged, host path", plainNS, []change{privilegedMain, hostPath}, "", "spec.volumes[0].hostPath needs the host"},
		{"privileged, host path, allowed", hostNS, []change{privilegedMain, hostPath}, ClassHost, ""},
		{"privileged, device, allowed", hostNS, []change{privilegedMain, device}, ClassHost, ""},
		{"explicit micro-VM, privileged", plainNS, []change{class(ClassMicroVM), privilegedMain}, ClassMicroVM, ""},
		{"explicit runc, privileged", plainNS, []change{class(ClassHost), privilegedMain}, "", "spec.runtimeClassName: runc"},
		{"explicit runc, privileged, allowed", hostNS, []change{class(ClassHost), privilegedMain}, ClassHost, ""},
		{"other handler, privileged", plainNS, []change{class("other"), privilegedMain}, "", "spec.containers[0].securityContext.privileged"},
		{"other handler, privileged init", plainNS, []change{class("other"), privilegedInit}, "", "spec.initContainers[0].securityContext.privileged"},
		{"other handler, privileged, allowed", hostNS, []change{class("other"), privilegedMain}, "other", ""},
		{"several needs", plainNS, []change{hostPID, hostPath}, "", "spec.hostPID, spec.volumes[0].hostPath"},
		{"explicit micro-VM", plainNS, []change{class(ClassMicroVM)}, ClassMicroVM, ""},
		{"explicit micro-VM, host network", plainNS, []change{class(ClassMicroVM), hostNetwork}, "", "cannot use"},
		{"explicit micro-VM, host network, allowed", hostNS, []change{class(ClassMicroVM), hostNetwork}, "", "cannot use"},
		{"explicit runc", plainNS, []change{class(ClassHost)}, "", "spec.runtimeClassName: runc"},
		{"explicit runc, allowed", hostNS, []change{class(ClassHost)}, ClassHost, ""},
		{"class with handler runc", plainNS, []change{class("sneaky")}, "", "spec.runtimeClassName: sneaky"},
		{"class with handler runc, allowed", hostNS, []change{class("sneaky")}, "sneaky", ""},
		{"other handler", plainNS, []change{class("other")}, "other", ""},
		{"other handler, host path", plainNS, []change{class("other"), hostPath}, "", "spec.volumes[0].hostPath"},
		{"missing class", plainNS, []change{class("missing")}, "missing", ""},
		{"device", plainNS, []change{device}, ClassMicroVM, ""},
		{"device, allowed", hostNS, []change{device}, ClassHost, ""},
		{"claim, allowed", hostNS, []change{claim}, ClassHost, ""},
		{"huge pages, allowed", hostNS, []change{hugepages}, ClassMicroVM, ""},
		{"mirror pod", plainNS, []change{mirror, hostNetwork}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlugin(t)
			pod := newPod(c.ns, c.changes)
			a := attributes(pod, "", admission.Create)
			err := p.Admit(context.Background(), a, nil)
			if err == nil {
				err = p.Validate(context.Background(), a, nil)
			}
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Fatalf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := className(pod); got != c.class {
				t.Fatalf("class %q, want %q", got, c.class)
			}
		})
	}
}

// Every kind of volume that is not known to be harmless needs the host, also kinds to come.
func TestVolumesNeedTheHost(t *testing.T) {
	inside := map[string]bool{
		"EmptyDir": true, "ConfigMap": true, "Secret": true, "Projected": true, "DownwardAPI": true,
		"PersistentVolumeClaim": true, "Ephemeral": true, "Image": true,
	}
	kinds := reflect.TypeFor[core.VolumeSource]()
	for i := range kinds.NumField() {
		field := kinds.Field(i)
		var source core.VolumeSource
		reflect.ValueOf(&source).Elem().Field(i).Set(reflect.New(field.Type.Elem()))
		pod := newPod(plainNS, []change{func(p *core.Pod) { p.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: source}} }})
		needs := HostNeeds(pod)
		if inside[field.Name] != (len(needs) == 0) {
			t.Errorf("%s: %v", field.Name, needs)
		}
		if len(needs) > 0 && !strings.EqualFold(needs[0], "spec.volumes[0]."+field.Name) {
			t.Errorf("%s is called %s", field.Name, needs[0])
		}
	}
}

func TestValidateSeesWhatWebhooksDid(t *testing.T) {
	p := newPlugin(t)
	pod := newPod(plainNS, nil)
	a := attributes(pod, "", admission.Create)
	if err := p.Admit(context.Background(), a, nil); err != nil {
		t.Fatal(err)
	}
	pod.Spec.RuntimeClassName = nil
	if err := p.Validate(context.Background(), a, nil); err == nil {
		t.Fatal("a pod without a class passed")
	}
}

func TestEphemeralContainers(t *testing.T) {
	for _, c := range []struct {
		name    string
		ns      string
		changes []change
		refused bool
	}{
		{"plain", plainNS, []change{class(ClassMicroVM), plainDebug}, false},
		{"privileged", plainNS, []change{class(ClassMicroVM), privilegedDebug}, false},
		{"privileged on another handler", plainNS, []change{class("other"), privilegedDebug}, true},
		{"privileged on runc", hostNS, []change{class(ClassHost), privilegedDebug}, false},
		{"runc, no longer allowed", plainNS, []change{class(ClassHost), plainDebug}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := attributes(newPod(c.ns, c.changes), "ephemeralcontainers", admission.Update)
			if err := newPlugin(t).Validate(context.Background(), a, nil); (err != nil) != c.refused {
				t.Fatalf("error %v", err)
			}
		})
	}
}

func TestOtherRequestsPass(t *testing.T) {
	p := newPlugin(t)
	pod := newPod(plainNS, []change{hostNetwork})
	for _, a := range []admission.Attributes{
		attributes(pod, "", admission.Update),
		attributes(pod, "status", admission.Update),
		attributes(pod, "binding", admission.Create),
	} {
		if err := p.Admit(context.Background(), a, nil); err != nil {
			t.Fatal(err)
		}
		if err := p.Validate(context.Background(), a, nil); err != nil {
			t.Fatal(err)
		}
	}
}
