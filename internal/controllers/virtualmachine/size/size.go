// Package size reads a VirtualMachineClass: how many processors and how much memory a machine has, and what its pod
// asks of the scheduler.
//
// It is pure. What VMware's classes say maps like this:
//
//	spec.hardware.cpus, memory      processors and memory of the machine
//	policies.resources.requests.cpu the pod's CPU request. A number up to spec.hardware.cpus is in processors; a
//	                                greater one is in MHz, 2000 of which are a processor
//	policies.resources.limits.cpu   the pod's CPU limit, read in the same way; without it all processors
//	policies.resources.*.memory     kept in status only: the pod always asks for all of the machine's memory, since
//	                                a host cannot take memory back from a guest without killing it
//	spec.configSpec                 numCPUs, memoryMB, numCoresPerSocket, firmware, nestedHVEnabled, cpuHotAddEnabled,
//	                                memoryHotAddEnabled, latencySensitivity high (processors pinned), extraConfig
//	                                sched.mem.lpage.enable1GPage (huge pages) and atoll.dev/cpu-model, vTPM and
//	                                reservations
//
// A machine without a CPU reservation asks for 10m for each processor, so that an idle one takes no room of others.
// It can grow without a restart to four times its size, unless configSpec forbids it.
package size

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

const (
	mhzPerCPU = 2000
	// idleMilliCPU is asked for each processor that has no reservation.
	idleMilliCPU = 10
	grow         = 4
	mostCPUs     = 64
	mostMemory   = 1 << 40
	mib          = 1 << 20
	minMemory    = 16 * mib
	maxCPUs      = 1024
	maxMemory    = 16 << 40
	hugePage     = 1 << 30
	hugePageName = corev1.ResourceHugePagesPrefix + "1Gi"
	maxConfig    = 1 << 20
	// ModelOption of a configSpec's extraConfig is the model of processor: "host", or one of QEMU's.
	ModelOption = "atoll.dev/cpu-model"
)

// modelText is what the name of a model can be.
var modelText = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

// Size is what a class says.
type Size struct {
	CPUs, MaxCPUs     int
	CoresPerSocket    int
	Memory, MaxMemory int64
	HugePageBytes     int64
	Pinned, Nested    bool
	CPUModel          string // empty for the baseline of the host
	Firmware          string // empty when the class has no preference
	TPM               bool
	// ReservedMHz and ReservedMemory are for the status.
	ReservedMHz    int64
	ReservedMemory int64
	// Requests and Limits of the pod.
	Requests, Limits corev1.ResourceList
	// Unused are fields that are set and have no effect.
	Unused []string
}

// config is the part of a VirtualMachineConfigSpec that is read.
type config struct {
	NumCPUs             int64            `json:"numCPUs"`
	MemoryMB            int64            `json:"memoryMB"`
	NumCoresPerSocket   int64            `json:"numCoresPerSocket"`
	Firmware            string           `json:"firmware"`
	NestedHVEnabled     bool             `json:"nestedHVEnabled"`
	CPUHotAddEnabled    *bool            `json:"cpuHotAddEnabled"`
	MemoryHotAddEnabled *bool            `json:"memoryHotAddEnabled"`
	LatencySensitivity  sensitivity      `json:"latencySensitivity"`
	CPUAllocation       allocation       `json:"cpuAllocation"`
	MemoryAllocation    allocation       `json:"memoryAllocation"`
	ExtraConfig         []option         `json:"extraConfig"`
	DeviceChange        []map[string]any `json:"deviceChange"`
}

type sensitivity struct {
	Level string `json:"level"`
}

type allocation struct {
	Reservation int64  `json:"reservation"` // MHz, or MiB
	Limit       *int64 `json:"limit"`
}

type option struct {
	Key   string `json:"key"`
	Value any    `json:"value"`
}

// ErrInvalid is in the chain of errors about a class that no machine can be made of.
var ErrInvalid = errors.New("the class cannot be used")

// Read reads a class.
func Read(class *vmopv1.VirtualMachineClassSpec) (Size, error) {
	var c config
	if len(class.ConfigSpec) > maxConfig {
		return Size{}, fmt.Errorf("%w: spec.configSpec is larger than 1 MiB", ErrInvalid)
	}
	if len(class.ConfigSpec) > 0 && string(class.ConfigSpec) != "null" {
		if err := json.Unmarshal(class.ConfigSpec, &c); err != nil {
			return Size{}, fmt.Errorf("%w: spec.configSpec: %w", ErrInvalid, err)
		}
	}
	s := Size{Pinned: strings.EqualFold(c.LatencySensitivity.Level, "high"), Nested: c.NestedHVEnabled, Firmware: strings.ToLower(c.Firmware)}
	if err := s.hardware(class, c); err != nil {
		return Size{}, err
	}
	if err := s.extra(c); err != nil {
		return Size{}, err
	}
	s.resources(class, c)
	if len(class.Hardware.Devices.VGPUDevices) > 0 {
		s.Unused = append(s.Unused, "spec.hardware.devices.vgpuDevices")
	}
	if len(class.Hardware.Devices.DynamicDirectPathIODevices) > 0 {
		s.Unused = append(s.Unused, "spec.hardware.devices.dynamicDirectPathIODevices")
	}
	for _, f := range []struct {
		name string
		set  bool
	}{
		{"spec.hardware.instanceStorage", len(class.Hardware.InstanceStorage.Volumes) > 0},
		{"spec.controllerName", class.ControllerName != ""},
		{"spec.reservedProfileID", class.ReservedProfileID != ""},
		{"spec.reservedSlots", class.ReservedSlots != 0},
		{"spec.policies.resources.limits.memory", !class.Policies.Resources.Limits.Memory.IsZero()},
	} {
		if f.set {
			s.Unused = append(s.Unused, f.name)
		}
	}
	return s, nil
}

// hardware sets processors and memory.
func (s *Size) hardware(class *vmopv1.VirtualMachineClassSpec, c config) error {
	cpus, memory := class.Hardware.Cpus, class.Hardware.Memory.Value()
	if cpus == 0 {
		cpus = c.NumCPUs
	}
	if memory == 0 {
		memory = c.MemoryMB * mib
	}
	switch {
	case cpus < 1 || cpus > maxCPUs:
		return fmt.Errorf("%w: spec.hardware.cpus is %d, and must be 1 to %d", ErrInvalid, cpus, maxCPUs)
	case memory < minMemory || memory > maxMemory:
		return fmt.Errorf("%w: spec.hardware.memory is %s, and must be 16Mi to 16Ti", ErrInvalid, class.Hardware.Memory.String())
	}
	memory = (memory + mib - 1) / mib * mib
	s.CPUs, s.Memory = int(cpus), memory
	s.MaxCPUs = max(s.CPUs, min(grow*s.CPUs, mostCPUs))
	s.MaxMemory = max(memory, min(grow*memory, mostMemory))
	if c.CPUHotAddEnabled != nil && !*c.CPUHotAddEnabled {
		s.MaxCPUs = s.CPUs
	}
	if c.MemoryHotAddEnabled != nil && !*c.MemoryHotAddEnabled {
		s.MaxMemory = s.Memory
	}
	if n := c.NumCoresPerSocket; n > 1 && n <= cpus && cpus%n == 0 {
		s.CoresPerSocket = int(n)
	}
	return nil
}

// extra reads the options and devices of a configSpec.
func (s *Size) extra(c config) error {
	for _, o := range c.ExtraConfig {
		switch {
		case o.Key == "sched.mem.lpage.enable1GPage" && strings.EqualFold(fmt.Sprint(o.Value), "true"):
			if s.Memory%hugePage == 0 {
				s.HugePageBytes, s.MaxMemory = hugePage, s.Memory
			}
		case o.Key == ModelOption:
			s.CPUModel = fmt.Sprint(o.Value)
			if !modelText.MatchString(s.CPUModel) {
				return fmt.Errorf("%w: spec.configSpec.extraConfig[%s] is %q, and must be host or one of the models that qemu-system-x86_64 -cpu help lists", ErrInvalid, o.Key, s.CPUModel)
			}
		case o.Key != "":
			s.Unused = append(s.Unused, "spec.configSpec.extraConfig["+o.Key+"]")
		}
	}
	// The host's own processor has virtualisation. Under KVM, QEMU takes svm from models that have it by their definition,
	// and none has vmx.
	if s.Nested && !slices.Contains([]string{"", "host", "max"}, s.CPUModel) {
		return fmt.Errorf("%w: spec.configSpec.nestedHVEnabled is true, and spec.configSpec.extraConfig[%s] is %s, a model without virtualisation of its own; name host or no model, or set nestedHVEnabled to false", ErrInvalid, ModelOption, s.CPUModel)
	}
	for _, d := range c.DeviceChange {
		device, _ := d["device"].(map[string]any)
		if name, _ := device["_typeName"].(string); name == "VirtualTPM" {
			s.TPM = true
		} else if name != "" {
			s.Unused = append(s.Unused, "spec.configSpec.deviceChange["+name+"]")
		}
	}
	return nil
}

// resources sets what the pod asks for.
func (s *Size) resources(class *vmopv1.VirtualMachineClassSpec, c config) {
	p := class.Policies.Resources
	request := milli(p.Requests.Cpu, s.CPUs)
	if request == 0 && c.CPUAllocation.Reservation > 0 {
		request = fromMHz(c.CPUAllocation.Reservation, s.CPUs)
	}
	limit := milli(p.Limits.Cpu, s.CPUs)
	if limit == 0 && c.CPUAllocation.Limit != nil && *c.CPUAllocation.Limit > 0 {
		limit = fromMHz(*c.CPUAllocation.Limit, s.CPUs)
	}
	s.ReservedMHz = request * mhzPerCPU / 1000
	s.ReservedMemory = p.Requests.Memory.Value()
	if s.ReservedMemory == 0 {
		s.ReservedMemory = c.MemoryAllocation.Reservation * mib
	}
	if request == 0 {
		request = idleMilliCPU * int64(s.CPUs)
	}
	if limit == 0 {
		limit = 1000 * int64(s.CPUs)
	}
	limit = max(limit, request)
	memory := *resource.NewQuantity(s.Memory, resource.BinarySI)
	s.Requests = corev1.ResourceList{corev1.ResourceCPU: *resource.NewMilliQuantity(request, resource.DecimalSI)}
	s.Limits = corev1.ResourceList{corev1.ResourceCPU: *resource.NewMilliQuantity(limit, resource.DecimalSI)}
	if s.HugePageBytes > 0 {
		// What is in huge pages is not in the pod's other memory, of which there must be some.
		little := resource.MustParse("64Mi")
		s.Requests[hugePageName], s.Limits[hugePageName] = memory, memory
		s.Requests[corev1.ResourceMemory], s.Limits[corev1.ResourceMemory] = little, little
		return
	}
	s.Requests[corev1.ResourceMemory], s.Limits[corev1.ResourceMemory] = memory, memory
}

// milli reads a CPU quantity as thousandths of a processor.
func milli(q resource.Quantity, cpus int) int64 {
	if q.CmpInt64(int64(cpus)) <= 0 {
		return q.MilliValue()
	}
	mhz := q.Value()
	if mhz >= mib { // 1000Mi
		mhz /= mib
	}
	return fromMHz(mhz, cpus)
}

func fromMHz(mhz int64, cpus int) int64 {
	return min(max(1, mhz*1000/mhzPerCPU), 1000*int64(cpus))
}
