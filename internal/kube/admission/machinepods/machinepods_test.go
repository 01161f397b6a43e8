package machinepods

import (
	"context"
	"strings"
	"testing"

	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/apis/core"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func newPlugin(t *testing.T) *Plugin {
	t.Helper()
	factory := informers.NewSharedInformerFactory(fake.NewClientset(), 0)
	p := New()
	p.SetExternalKubeInformerFactory(factory)
	p.SetReadyFunc(func() bool { return true })
	if err := p.ValidateInitialization(); err != nil {
		t.Fatal(err)
	}
	for name, handler := range map[string]string{machinev1.RuntimeClass: machinev1.RuntimeClass, "sneaky": machinev1.RuntimeClass, "atoll": "atoll"} {
		rc := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler}
		if err := factory.Node().V1().RuntimeClasses().Informer().GetStore().Add(rc); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// pod is a pod of a class, with the metadata that the controller gives to machines.
func pod(class string) *core.Pod {
	p := &core.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: "db-0", Namespace: "team", Labels: map[string]string{machinev1.NameLabel: "db-0"},
			Annotations: map[string]string{}, OwnerReferences: []metav1.OwnerReference{{Kind: "VirtualMachine", Name: "db-0", UID: "u"}},
		},
		Spec: core.PodSpec{RuntimeClassName: &class, Containers: []core.Container{{Name: "vm", Image: "a"}}},
	}
	if class != "atoll" {
		p.Annotations[machinev1.Annotation], p.Annotations[machinev1.AddressAnnotation] = "{}", "vm-u"
		p.Labels[machinev1.UIDLabel] = "u"
	}
	return p
}

func TestRules(t *testing.T) {
	p := newPlugin(t)
	admin := user.DefaultInfo{Name: "admin", Groups: []string{user.SystemPrivilegedGroup}}
	node := user.DefaultInfo{Name: "system:node:h", Groups: []string{user.NodesGroup}}
	account := func(name string) user.DefaultInfo {
		return user.DefaultInfo{Name: "system:serviceaccount:kube-system:" + name, Groups: []string{"system:serviceaccounts:kube-system"}}
	}
	edit := func(f func(*core.Pod)) func(*core.Pod) { return f }
	state := edit(func(p *core.Pod) { p.Annotations[machinev1.StateAnnotation] = "{}" })
	spec := edit(func(p *core.Pod) { p.Spec.Containers[0].Image = "b" })
	machine := edit(func(p *core.Pod) { p.Annotations[machinev1.Annotation] = `{"x":1}` })
	for _, c := range []struct {
		name    string
		class   string
		op      admission.Operation
		sub     string
		change  func(*core.Pod)
		by      user.DefaultInfo
		refused string
	}{
		{"create", machinev1.RuntimeClass, admission.Create, "", nil, admin, "make a VirtualMachine"},
		{"create by the controller", machinev1.RuntimeClass, admission.Create, "", nil, user.DefaultInfo{Name: Controller}, ""},
		{"create under another name of the class", "sneaky", admission.Create, "", nil, admin, "make a VirtualMachine"},
		{"create another pod", "atoll", admission.Create, "", nil, admin, ""},
		{"another pod with a kept address", "atoll", admission.Create, "", func(p *core.Pod) { p.Annotations[machinev1.AddressAnnotation] = "vm-u" }, admin, machinev1.AddressAnnotation},
		{"another pod takes a kept address", "atoll", admission.Update, "", func(p *core.Pod) { p.Annotations[machinev1.AddressAnnotation] = "vm-u" }, admin, "the system's"},
		{"change the machine", machinev1.RuntimeClass, admission.Update, "", machine, admin, "change the VirtualMachine"},
		{"change the machine, by the controller", machinev1.RuntimeClass, admission.Update, "", machine, user.DefaultInfo{Name: Controller}, ""},
		{"change the machine, by a node", machinev1.RuntimeClass, admission.Update, "status", machine, node, "the system's"},
		{"change the spec", machinev1.RuntimeClass, admission.Update, "", spec, admin, "kubectl edit vm db-0"},
		{"resize", machinev1.RuntimeClass, admission.Update, "resize", spec, admin, "kubectl edit vm db-0"},
		{"a label of one's own", machinev1.RuntimeClass, admission.Update, "", func(p *core.Pod) { p.Labels["x"] = "y" }, admin, ""},
		{"the uid's label", machinev1.RuntimeClass, admission.Update, "", func(p *core.Pod) { p.Labels[machinev1.UIDLabel] = "v" }, admin, "the system's"},
		{"owners", machinev1.RuntimeClass, admission.Update, "", func(p *core.Pod) { p.OwnerReferences = nil }, admin, "owners"},
		{"owners, by the garbage collector", machinev1.RuntimeClass, admission.Update, "", func(p *core.Pod) { p.OwnerReferences = nil }, account("generic-garbage-collector"), ""},
		{"state", machinev1.RuntimeClass, admission.Update, "status", state, node, ""},
		{"state, by a user", machinev1.RuntimeClass, admission.Update, "status", state, admin, "the system's"},
		{"state of another pod", "atoll", admission.Update, "status", state, node, "the system's"},
		{"status", machinev1.RuntimeClass, admission.Update, "status", func(p *core.Pod) { p.Status.Phase = core.PodFailed }, node, ""},
		{"ephemeral containers", machinev1.RuntimeClass, admission.Update, "ephemeralcontainers", nil, admin, "kubectl exec"},
		{"delete", machinev1.RuntimeClass, admission.Delete, "", nil, admin, `kubectl patch vm db-0 -n team --type merge -p '{"spec":{"powerState":"PoweredOff"}}'`},
		{"delete another pod", "atoll", admission.Delete, "", nil, admin, ""},
		{"delete what nothing owns", machinev1.RuntimeClass, admission.Delete, "", func(p *core.Pod) { p.OwnerReferences = nil }, admin, ""},
		{"delete, by the controller", machinev1.RuntimeClass, admission.Delete, "", nil, user.DefaultInfo{Name: Controller}, ""},
		{"delete, by the node", machinev1.RuntimeClass, admission.Delete, "", nil, node, ""},
		{"delete, by the garbage collector", machinev1.RuntimeClass, admission.Delete, "", nil, account("generic-garbage-collector"), ""},
		{"delete, with the namespace", machinev1.RuntimeClass, admission.Delete, "", nil, account("namespace-controller"), ""},
		{"delete, by preemption", machinev1.RuntimeClass, admission.Delete, "", nil, user.DefaultInfo{Name: user.KubeScheduler}, ""},
		{"delete, by a controller of users'", machinev1.RuntimeClass, admission.Delete, "", nil, account("replicaset-controller"), "powerState"},
		{"delete, by an account with a telling name", machinev1.RuntimeClass, admission.Delete, "", nil, user.DefaultInfo{
			Name: "system:serviceaccount:team:namespace-controller", Groups: []string{"system:serviceaccounts:team"},
		}, "powerState"},
	} {
		var object, old runtime.Object
		changed := pod(c.class)
		if c.change != nil {
			c.change(changed)
		}
		switch c.op {
		case admission.Create:
			object = changed
		case admission.Delete:
			old = changed
		default:
			object, old = changed, pod(c.class)
		}
		a := admission.NewAttributesRecord(object, old, core.Kind("Pod").WithVersion("version"), "team", "db-0",
			core.Resource("pods").WithVersion("version"), c.sub, c.op, nil, false, &c.by)
		err := p.Validate(context.Background(), a, nil)
		if c.refused == "" && err != nil || c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.refused)
		}
	}
}
