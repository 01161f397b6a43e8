package namespacebounds

import (
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/testkit/golden"
)

// claimOf is a claim of a class; "-" is none.
func claimOf(class string, annotations ...string) *core.PersistentVolumeClaim {
	c := &core.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "data", Namespace: shopNS, Annotations: map[string]string{}}}
	if class != "-" {
		c.Spec.StorageClassName = &class
	}
	for i := 0; i+1 < len(annotations); i += 2 {
		c.Annotations[annotations[i]] = annotations[i+1]
	}
	return c
}

func withAttributes(c *core.PersistentVolumeClaim, class string) *core.PersistentVolumeClaim {
	c.Spec.VolumeAttributesClassName = &class
	return c
}

func claimAsk(op admission.Operation, c, old *core.PersistentVolumeClaim) ask {
	r := ask{obj: c, gvk: core.Kind("PersistentVolumeClaim").WithVersion("v1"), gvr: core.Resource("persistentvolumeclaims").WithVersion("v1"), ns: shopNS, name: c.Name, op: op}
	if old != nil {
		r.old = old
	}
	return r
}

// anImage is an image of a library, with its item.
func anImage(cluster bool, name, library string) []runtime.Object {
	kind, item, ns := "VirtualMachineImage", "ContentLibraryItem", shopNS
	if cluster {
		kind, item, ns = "ClusterVirtualMachineImage", "ClusterContentLibraryItem", ""
	}
	object := func(api, kind, name string, spec map[string]any) runtime.Object {
		u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": api, "kind": kind, "spec": spec}}
		u.SetName(name)
		u.SetNamespace(ns)
		_ = unstructured.SetNestedField(u.Object, "called "+name, "status", "name")
		return u
	}
	return []runtime.Object{
		object("vmoperator.vmware.com/v1alpha5", kind, name, map[string]any{"providerRef": map[string]any{"name": "item-" + name}}),
		object("imageregistry.vmware.com/v1alpha1", item, "item-"+name, map[string]any{"library": library}),
	}
}

func images3() []runtime.Object {
	return append(append(anImage(true, "vmi-blessed", "blessed"), anImage(true, "vmi-other", "other")...), anImage(false, "vmi-own", "default")...)
}

func TestClaims(t *testing.T) {
	only := spec{StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold"}, {Name: "silver", VolumeAttributesClasses: []string{"slow"}}}}
	required := spec{Encryption: atoll.NamespaceEncryption{Required: true}}
	named := spec{Encryption: atoll.NamespaceEncryption{Required: true, ClassName: "corp"}}
	sources := spec{ContentSources: []atoll.NamespaceContentSource{{Name: "blessed"}}}
	annotation := encryption.ClaimAnnotation
	var out strings.Builder
	for _, c := range []struct {
		name       string
		spec       spec
		claim, old *core.PersistentVolumeClaim
	}{
		{"allowed", only, claimOf("gold"), nil},
		{"not allowed", only, claimOf("standard"), nil},
		{"the default is not allowed", only, claimOf("-"), nil},
		{"volumes without a class", only, claimOf(""), nil},
		{"attributes of a class that offers none", only, withAttributes(claimOf("gold"), "fast"), nil},
		{"a claim gets attributes", only, withAttributes(claimOf("gold"), "fast"), withAttributes(claimOf("gold"), "slow")},
		{"a claim without attributes gets some", only, withAttributes(claimOf("gold"), "fast"), claimOf("gold")},
		{"a claim keeps its attributes", only, withAttributes(claimOf("gold"), "fast"), withAttributes(claimOf("gold"), "fast")},
		{"a claim goes without attributes", only, claimOf("gold"), withAttributes(claimOf("gold"), "fast")},
		{"attributes that are offered", only, withAttributes(claimOf("silver"), "slow"), claimOf("silver")},
		{"attributes that are not offered", only, withAttributes(claimOf("silver"), "fast"), claimOf("silver")},
		{"attributes where no class is bounded", required, withAttributes(claimOf("gold"), "fast"), nil},
		{"none allowed", spec{StorageClasses: []atoll.NamespaceStorageClass{}}, claimOf("gold"), nil},
		{"an old claim grows", only, claimOf("standard"), claimOf("standard")},
		{"an old claim gets a class", only, claimOf("standard"), claimOf("bronze")},
		{"encrypted by its class", required, claimOf("gold"), nil},
		{"encrypted by an EncryptionClass", required, claimOf("standard", annotation, "mine"), nil},
		{"not encrypted", required, claimOf("standard"), nil},
		{"no longer encrypted", required, claimOf("standard"), claimOf("standard", annotation, "mine")},
		{"the EncryptionClass is filled in", named, claimOf("standard"), nil},
		{"another EncryptionClass", named, claimOf("gold", annotation, "mine"), nil},
		{"of an image", sources, claimOf("gold", imageAnnotation, "ClusterVirtualMachineImage/vmi-blessed"), nil},
		{"of an image of another library", sources, claimOf("gold", imageAnnotation, "ClusterVirtualMachineImage/vmi-other"), nil},
		{"of an image that is not there", sources, claimOf("gold", imageAnnotation, "ClusterVirtualMachineImage/vmi-gone"), nil},
		{"of something else", sources, claimOf("gold", imageAnnotation, "Secret/x"), nil},
		{"of an image of its own", sources, claimOf("gold", imageAnnotation, "VirtualMachineImage/vmi-own"), nil},
	} {
		w := newWorld(t, c.spec, images3()...)
		op := admission.Create
		if c.old != nil {
			op = admission.Update
		}
		fmt.Fprintf(&out, "%s: %s\n", c.name, text(w.send(claimAsk(op, c.claim, c.old))))
		if c.name == "the EncryptionClass is filled in" && c.claim.Annotations[annotation] != "corp" {
			t.Errorf("annotations %v", c.claim.Annotations)
		}
	}
	set := &apps.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: shopNS}, Spec: apps.StatefulSetSpec{
		VolumeClaimTemplates: []core.PersistentVolumeClaim{*claimOf("gold"), *claimOf("standard")},
	}}
	r := ask{obj: set, gvk: apps.Kind("StatefulSet").WithVersion("v1"), gvr: apps.Resource("statefulsets").WithVersion("v1"), ns: shopNS, name: "db", op: admission.Create}
	fmt.Fprintf(&out, "a stateful set: %s\n", text(newWorld(t, only).send(r)))
	set.Spec.VolumeClaimTemplates = []core.PersistentVolumeClaim{*withAttributes(claimOf("gold"), "fast")}
	fmt.Fprintf(&out, "a stateful set with attributes: %s\n", text(newWorld(t, only).send(r)))
	golden.Compare(t, "claims.golden", out.String())
}

// vm is a virtual machine of a version.
func vm(version string, spec map[string]any) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "vmoperator.vmware.com/" + version, "kind": "VirtualMachine", "spec": spec}}
	u.SetName("box")
	u.SetNamespace(shopNS)
	return u
}

func vmAsk(op admission.Operation, obj, old *unstructured.Unstructured) ask {
	gv := schema.GroupVersion{Group: "vmoperator.vmware.com", Version: obj.GroupVersionKind().Version}
	r := ask{obj: obj, gvk: obj.GroupVersionKind(), gvr: gv.WithResource("virtualmachines"), ns: shopNS, name: "box", op: op}
	if obj.GetKind() == "VirtualMachineReplicaSet" {
		r.gvr = gv.WithResource("virtualmachinereplicasets")
	}
	if old != nil {
		r.old = old
	}
	return r
}

func TestMachines(t *testing.T) {
	type m = map[string]any
	ref := func(kind, name string) m { return m{"kind": kind, "name": name} }
	classes := spec{VMClasses: []atoll.NamespaceReference{{Name: "small"}, {Name: "medium"}}}
	storage := spec{StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold"}}}
	sources := spec{ContentSources: []atoll.NamespaceContentSource{{Name: "blessed"}, {Name: "default", Type: "ContentLibrary"}}}
	required := spec{Encryption: atoll.NamespaceEncryption{Required: true, ClassName: "corp"}}
	instance := &unstructured.Unstructured{Object: m{
		"apiVersion": "vmoperator.vmware.com/v1alpha5", "kind": "VirtualMachineClassInstance",
		"metadata": m{"name": "huge-1", "namespace": shopNS, "annotations": m{classAnnotation: "huge"}},
	}}
	setOf := func(spec m) *unstructured.Unstructured {
		set := vm("v1alpha5", m{"template": m{"spec": spec}})
		set.SetKind("VirtualMachineReplicaSet")
		return set
	}
	var out strings.Builder
	for _, c := range []struct {
		name    string
		spec    spec
		vm, old *unstructured.Unstructured
	}{
		{"class allowed", classes, vm("v1alpha5", m{"className": "small"}), nil},
		{"class not allowed", classes, vm("v1alpha5", m{"className": "huge"}), nil},
		{"class not allowed, oldest version", classes, vm("v1alpha2", m{"className": "huge"}), nil},
		{"instance of a class", classes, vm("v1alpha5", m{"className": "small", "class": ref("VirtualMachineClassInstance", "huge-1")}), nil},
		{"instance that is not there", classes, vm("v1alpha5", m{"class": ref("VirtualMachineClassInstance", "gone")}), nil},
		{"a replica set", classes, setOf(m{"className": "huge"}), nil},
		{"a replica set of an image by name", sources, setOf(m{"imageName": "vmi-blessed"}), nil},
		{"a replica set of an image by display name", sources, setOf(m{"imageName": "called vmi-own"}), nil},
		{"a replica set of another image by name", sources, setOf(m{"imageName": "vmi-other"}), nil},
		{"a replica set of another image by display name", sources, setOf(m{"imageName": "called vmi-other"}), nil},
		{"a replica set of an image that is not there", sources, setOf(m{"imageName": "called nothing"}), nil},
		{"resized", classes, vm("v1alpha4", m{"className": "huge"}), vm("v1alpha4", m{"className": "small"})},
		{"an old one is stopped", classes, vm("v1alpha3", m{"className": "huge", "powerState": "PoweredOff"}), vm("v1alpha3", m{"className": "huge"})},
		{"storage allowed", storage, vm("v1alpha5", m{"storageClass": "gold"}), nil},
		{"storage not allowed", storage, vm("v1alpha2", m{"storageClass": "standard"}), nil},
		{"the default storage is not allowed", storage, vm("v1alpha5", m{"image": ref("ClusterVirtualMachineImage", "vmi-blessed")}), nil},
		{"encrypted by the namespace's class", required, vm("v1alpha5", m{"storageClass": "standard"}), nil},
		{"encrypted by another class", required, vm("v1alpha5", m{"storageClass": "standard", "crypto": m{"encryptionClassName": "mine"}}), nil},
		{"image allowed", sources, vm("v1alpha3", m{"image": ref("ClusterVirtualMachineImage", "vmi-blessed")}), nil},
		{"own image", sources, vm("v1alpha5", m{"image": ref("VirtualMachineImage", "vmi-own")}), nil},
		{"image not allowed", sources, vm("v1alpha5", m{"image": ref("ClusterVirtualMachineImage", "vmi-other")}), nil},
		{"image by name", sources, vm("v1alpha2", m{"imageName": "vmi-other"}), nil},
		{"CD-ROM", sources, vm("v1alpha5", m{"hardware": m{"cdrom": []any{m{"name": "cd", "image": ref("ClusterVirtualMachineImage", "vmi-other")}}}}), nil},
	} {
		w := newWorld(t, c.spec, append(images3(), instance)...)
		op := admission.Create
		if c.old != nil {
			op = admission.Update
		}
		fmt.Fprintf(&out, "%s: %s\n", c.name, text(w.send(vmAsk(op, c.vm, c.old))))
	}
	golden.Compare(t, "machines.golden", out.String())
}
