// Package virtualmachineclass looks after VirtualMachineClasses: it provides the default ones in each namespace, and keeps
// a VirtualMachineClassInstance of each.
//
// An instance is what a class said at one time. It never changes, so a machine that was made of it keeps its size when
// the class does. The one that says what the class says now has the label vmoperator.vmware.com/active; others stay
// for as long as a VirtualMachine has them. Default classes are made when they are missing and never changed, so edits
// stay; a namespace with the label atoll.dev/vm-classes=none gets none, and neither do the system's namespaces.
//
// It is called by the server role, and its names are used by the controller of VirtualMachines. What can go wrong: a
// namespace's ResourceQuota refuses a class; that is tried again, with pauses.
package virtualmachineclass

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names of labels and annotations.
const (
	// ProvideLabel of a namespace with the value ProvideNone keeps default classes out of it.
	ProvideLabel = "atoll.dev/vm-classes"
	ProvideNone  = "none"
	// DefaultLabel marks default classes.
	DefaultLabel = "atoll.dev/default-class"
	// classAnnotation of an instance is the name of its class.
	classAnnotation = "atoll.dev/vm-class"
	active          = "true"
	maxName         = 63
)

// shape is one size of the default classes.
type shape struct {
	name     string
	cpus     int64
	memoryGi int64
}

func shapes() []shape {
	return []shape{
		{"xsmall", 2, 2},
		{"small", 2, 4},
		{"medium", 2, 8},
		{"large", 4, 16},
		{"xlarge", 4, 32},
		{"2xlarge", 8, 64},
		{"4xlarge", 16, 128},
		{"8xlarge", 32, 128},
	}
}

// Defaults are the classes that a namespace gets.
func Defaults(namespace string) []*vmopv1.VirtualMachineClass {
	var out []*vmopv1.VirtualMachineClass
	for _, kind := range []string{"best-effort", "guaranteed"} {
		for _, s := range shapes() {
			memory := *resource.NewQuantity(s.memoryGi<<30, resource.BinarySI)
			c := &vmopv1.VirtualMachineClass{
				ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: kind + "-" + s.name, Labels: map[string]string{DefaultLabel: "true"}},
				Spec: vmopv1.VirtualMachineClassSpec{
					Hardware:    vmopv1.VirtualMachineClassHardware{Cpus: s.cpus, Memory: memory},
					Description: fmt.Sprintf("%d processors and %d GiB of memory, processors not reserved", s.cpus, s.memoryGi),
				},
			}
			if kind == "guaranteed" {
				all := vmopv1.VirtualMachineResourceSpec{Cpu: *resource.NewQuantity(s.cpus, resource.DecimalSI), Memory: memory}
				c.Spec.Policies.Resources = vmopv1.VirtualMachineClassResources{Requests: all, Limits: all}
				c.Spec.Description = fmt.Sprintf("%d processors and %d GiB of memory, all reserved", s.cpus, s.memoryGi)
			}
			out = append(out, c)
		}
	}
	return out
}

// InstanceName is the name of the instance that says what the class says now.
func InstanceName(class *vmopv1.VirtualMachineClass) string {
	text, err := json.Marshal(class.Spec)
	if err != nil {
		text = []byte(class.ResourceVersion)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(append([]byte(class.Name+"/"), text...)))[:10]
	name := class.Name
	if most := maxName - len(sum) - 1; len(name) > most {
		name = strings.TrimRight(name[:most], "-.")
	}
	return name + "-" + sum
}

// NewInstance is that instance.
func NewInstance(class *vmopv1.VirtualMachineClass) *vmopv1.VirtualMachineClassInstance {
	return &vmopv1.VirtualMachineClassInstance{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: class.Namespace, Name: InstanceName(class),
			Labels:      map[string]string{vmopv1.VMClassInstanceActiveLabelKey: active},
			Annotations: map[string]string{classAnnotation: class.Name},
		},
		Spec: vmopv1.VirtualMachineClassInstanceSpec{VirtualMachineClassSpec: *class.Spec.DeepCopy()},
	}
}

// ClassOf is the name of an instance's class.
func ClassOf(i *vmopv1.VirtualMachineClassInstance) string { return i.Annotations[classAnnotation] }

// System tells whether a namespace is one of the system's own.
func System(namespace string) bool {
	for _, prefix := range []string{"kube-", "atoll-", "vmware-system-"} {
		if strings.HasPrefix(namespace, prefix) {
			return true
		}
	}
	return false
}
