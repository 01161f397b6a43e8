package usage

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func quantity(s string) *resource.Quantity { return new(resource.MustParse(s)) }

func pod(name, cpuLimit, memoryLimit, memoryRequest string) corev1.Pod {
	list := func(cpu, memory string) corev1.ResourceList {
		out := corev1.ResourceList{}
		if cpu != "" {
			out[corev1.ResourceCPU] = resource.MustParse(cpu)
		}
		if memory != "" {
			out[corev1.ResourceMemory] = resource.MustParse(memory)
		}
		return out
	}
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			Overhead:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")},
			Containers: []corev1.Container{{Resources: corev1.ResourceRequirements{Limits: list(cpuLimit, memoryLimit), Requests: list("", memoryRequest)}}},
		},
	}
}

func TestOf(t *testing.T) {
	done := pod("done", "9", "9Gi", "")
	done.Status.Phase = corev1.PodSucceeded
	vm := pod("vm-pod", "2", "2Gi", "")
	vm.Labels = map[string]string{machinev1.NameLabel: "db"}
	in := Input{
		Name: "shop",
		Spec: &atoll.SupervisorNamespaceSpec{
			Resources: atoll.NamespaceResources{
				MemoryLimit: quantity("1Gi"), MemoryReservation: quantity("512Mi"), Counts: atoll.NamespaceCounts{Services: new(int64(2))},
			},
			StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold", Limit: quantity("5Gi")}, {Name: "silver"}},
			Registry:       atoll.NamespaceRegistry{Quota: quantity("1Ki")},
		},
		Pods: []corev1.Pod{done, vm, pod("web", "500m", "", "100Mi")},
		Claims: []corev1.PersistentVolumeClaim{{
			ObjectMeta: metav1.ObjectMeta{Name: "data"},
			Spec:       corev1.PersistentVolumeClaimSpec{Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("3Gi")}}},
		}},
		Quotas: []corev1.ResourceQuota{{Status: corev1.ResourceQuotaStatus{Used: corev1.ResourceList{
			"gold.storageclass.storage.k8s.io/requests.storage": resource.MustParse("3Gi"), "count/services": resource.MustParse("3"),
		}}}},
		Registry: new(int64(4096)),
	}
	r := Of(in)
	if r.CPU != "2500m" || r.Memory != "2276Mi/1Gi" || r.Storage != "3Gi" {
		t.Errorf("%q, %q, %q", r.CPU, r.Memory, r.Storage)
	}
	var text []string
	for _, u := range r.Usage {
		text = append(text, u.Resource+" "+u.Used.String())
	}
	if got := strings.Join(text, ", "); got != "cpu 2500m, memory 2276Mi, storage 3Gi, storageclass/gold 3Gi, storageclass/silver 0, count/services 3, registry 4Ki" {
		t.Error(got)
	}
	if got := strings.Join(r.Over, "; "); got != "memory: 2276Mi used, the limit is 1Gi; count/services: 3 used, the limit is 2; registry: 4Ki used, the limit is 1Ki" {
		t.Error(got)
	}
	text = nil
	for _, top := range r.Top {
		text = append(text, fmt.Sprintf("%s %s/%s %s", top.Resource, top.Kind, top.Name, top.Used.String()))
	}
	if got := strings.Join(text, ", "); got != "cpu VirtualMachine/db 2, cpu Pod/web 500m, memory VirtualMachine/db 2112Mi, memory Pod/web 164Mi, storage PersistentVolumeClaim/data 3Gi" {
		t.Error(got)
	}
}

func TestCapacity(t *testing.T) {
	list := func(memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(memory)}
	}
	c := Capacity{
		Allocatable: list("8Gi"),
		Reserved:    map[string]corev1.ResourceList{"a": list("4Gi"), "b": list("2Gi")},
		Requested:   map[string]corev1.ResourceList{"a": list("1Gi"), "other": list("2Gi")},
	}
	if missing := c.Missing(); len(missing) != 0 {
		t.Errorf("missing %v", missing)
	}
	c.Requested["a"] = list("5Gi")
	if missing := c.Missing(); len(missing) != 1 || missing[0] != "memory: 9Gi is reserved or requested, the hosts have 8Gi" {
		t.Errorf("missing %v", missing)
	}
}
