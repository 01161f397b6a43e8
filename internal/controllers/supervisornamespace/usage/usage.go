// Package usage says what a namespace uses of its limits, and which objects use most.
//
// It is pure. CPU and memory of a pod are what a ResourceQuota counts: the limits of its containers and the overhead of
// its RuntimeClass; a container without a limit counts with its request. Pods that have ended count nothing. A pod of a
// VirtualMachine is named as the VirtualMachine. Counts and storage by class are those of the ResourceQuotas, so that
// the numbers are the ones that refusals are made by.
package usage

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

// TopCount is how many objects are named for each resource.
const TopCount = 5

// Input is what there is.
type Input struct {
	Name   string
	Spec   *atoll.SupervisorNamespaceSpec
	Pods   []corev1.Pod
	Claims []corev1.PersistentVolumeClaim
	Quotas []corev1.ResourceQuota
	// Registry is what its images take, nil when that is not known.
	Registry *int64
}

// Report is the part of the status that is about use.
type Report struct {
	CPU, Memory, Storage string
	Usage                []atoll.NamespaceUsage
	Top                  []atoll.NamespaceTop
	// Over says what is above its limit, empty when nothing is.
	Over []string
}

// Of makes the report.
func Of(in Input) Report {
	cpu, memory, top := pods(in.Pods)
	storage, claims := volumes(in.Claims)
	top = append(top, claims...)
	used := quotaUse(in.Quotas)
	r := in.Spec.Resources
	report := Report{
		Top: top,
		Usage: []atoll.NamespaceUsage{
			{Resource: "cpu", Used: cpu, Limit: r.CPULimit, Reservation: r.CPUReservation},
			{Resource: "memory", Used: memory, Limit: r.MemoryLimit, Reservation: r.MemoryReservation},
			{Resource: "storage", Used: storage, Limit: r.StorageRequestLimit},
		},
		CPU: text(cpu, r.CPULimit), Memory: text(memory, r.MemoryLimit), Storage: text(storage, r.StorageRequestLimit),
	}
	for _, c := range in.Spec.StorageClasses {
		report.Usage = append(report.Usage, atoll.NamespaceUsage{Resource: "storageclass/" + c.Name, Used: used[expand.StorageQuotaKey(c.Name)], Limit: c.Limit})
	}
	for _, c := range resolve.Counts(&r.Counts) {
		if *c.Value != nil {
			limit := resource.NewQuantity(**c.Value, resource.DecimalSI)
			report.Usage = append(report.Usage, atoll.NamespaceUsage{Resource: "count/" + c.Resource, Used: used[corev1.ResourceName(c.Quota)], Limit: limit})
		}
	}
	if in.Registry != nil || in.Spec.Registry.Quota != nil {
		var bytes int64
		if in.Registry != nil {
			bytes = *in.Registry
		}
		report.Usage = append(report.Usage, atoll.NamespaceUsage{Resource: "registry", Used: *resource.NewQuantity(bytes, resource.BinarySI), Limit: in.Spec.Registry.Quota})
	}
	for i, u := range report.Usage {
		report.Usage[i].Used = plain(u.Used)
		if u.Limit != nil && u.Used.Cmp(*u.Limit) > 0 {
			report.Over = append(report.Over, fmt.Sprintf("%s: %s used, the limit is %s", u.Resource, u.Used.String(), u.Limit.String()))
		}
	}
	return report
}

// plain is a quantity without what it was made by, so that two that print the same are the same.
func plain(q resource.Quantity) resource.Quantity {
	if parsed, err := resource.ParseQuantity(q.String()); err == nil {
		return parsed
	}
	return q
}

func text(used resource.Quantity, limit *resource.Quantity) string {
	if limit == nil {
		return used.String()
	}
	return used.String() + "/" + limit.String()
}

func quotaUse(quotas []corev1.ResourceQuota) corev1.ResourceList {
	out := corev1.ResourceList{}
	for _, q := range quotas {
		maps.Copy(out, q.Status.Used)
	}
	return out
}

// Pod is what one pod takes: limits, or requests where there are none, with overhead.
func Pod(pod *corev1.Pod) (cpu, memory resource.Quantity) {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return resource.Quantity{Format: resource.DecimalSI}, resource.Quantity{Format: resource.BinarySI}
	}
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})
	requests := Requests(pod)
	pick := func(name corev1.ResourceName) resource.Quantity {
		limit, request := limits[name], requests[name]
		if limit.Cmp(request) < 0 {
			return request
		}
		return limit
	}
	return pick(corev1.ResourceCPU), pick(corev1.ResourceMemory)
}

// Requests are what the scheduler sees of a pod.
func Requests(pod *corev1.Pod) corev1.ResourceList {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil
	}
	return resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
}

func pods(list []corev1.Pod) (cpu, memory resource.Quantity, top []atoll.NamespaceTop) {
	cpu, memory = resource.Quantity{Format: resource.DecimalSI}, resource.Quantity{Format: resource.BinarySI}
	var byCPU, byMemory []atoll.NamespaceTop
	for i := range list {
		pod := &list[i]
		kind, name := "Pod", pod.Name
		if vm := pod.Labels[machinev1.NameLabel]; vm != "" {
			kind, name = "VirtualMachine", vm
		}
		c, m := Pod(pod)
		cpu.Add(c)
		memory.Add(m)
		byCPU = append(byCPU, atoll.NamespaceTop{Resource: "cpu", Kind: kind, Name: name, Used: c})
		byMemory = append(byMemory, atoll.NamespaceTop{Resource: "memory", Kind: kind, Name: name, Used: m})
	}
	return cpu, memory, append(greatest(byCPU), greatest(byMemory)...)
}

func volumes(list []corev1.PersistentVolumeClaim) (total resource.Quantity, top []atoll.NamespaceTop) {
	total = resource.Quantity{Format: resource.BinarySI}
	for i := range list {
		size := list[i].Spec.Resources.Requests[corev1.ResourceStorage]
		total.Add(size)
		top = append(top, atoll.NamespaceTop{Resource: "storage", Kind: "PersistentVolumeClaim", Name: list[i].Name, Used: size})
	}
	return total, greatest(top)
}

// greatest are the first of a list, those that use nothing left out.
func greatest(list []atoll.NamespaceTop) []atoll.NamespaceTop {
	list = slices.DeleteFunc(list, func(t atoll.NamespaceTop) bool { return t.Used.IsZero() })
	slices.SortFunc(list, func(a, b atoll.NamespaceTop) int {
		return cmp.Or(b.Used.Cmp(a.Used), strings.Compare(a.Name, b.Name))
	})
	list = list[:min(len(list), TopCount)]
	for i := range list {
		list[i].Used = plain(list[i].Used)
	}
	return list
}

// Capacity says whether hosts have what is reserved. Each namespace needs what it has reserved, or what its pods
// request where that is more.
type Capacity struct {
	Allocatable corev1.ResourceList
	// Reserved and Requested are by namespace.
	Reserved, Requested map[string]corev1.ResourceList
}

// Missing says what is not there, empty when everything is.
func (c Capacity) Missing() []string {
	var out []string
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		need := resource.Quantity{Format: c.Allocatable[name].Format}
		for ns, requested := range c.Requested {
			need.Add(larger(c.Reserved[ns][name], requested[name]))
		}
		for ns, reserved := range c.Reserved {
			if _, counted := c.Requested[ns]; !counted {
				need.Add(reserved[name])
			}
		}
		have := c.Allocatable[name]
		if need.Cmp(have) > 0 {
			out = append(out, fmt.Sprintf("%s: %s is reserved or requested, the hosts have %s", name, need.String(), have.String()))
		}
	}
	return out
}

func larger(a, b resource.Quantity) resource.Quantity {
	if a.Cmp(b) < 0 {
		return b
	}
	return a
}
