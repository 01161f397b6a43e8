// Package placement gives disks and CD-ROM drives of a VirtualMachine their places on controllers.
//
// It is pure: it fills in what a spec leaves open, and says what cannot be. The webhook calls it, so that the places are
// in the spec and stay as they are when disks come and go; the controller calls it again for objects that no webhook
// has seen. The rules are VM Operator's: disks go to the first free unit of the first SCSI controller, whose own unit
// is 7. Drives go to SATA, where VM Operator would take IDE: the chipset has no IDE of its own.
package placement

import (
	"fmt"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/ptr"
)

// Slot is a place for a disk or a drive.
type Slot struct {
	Type vmopv1.VirtualControllerType
	Bus  int32
	Unit int32
}

// String is the slot for people.
func (s Slot) String() string { return fmt.Sprintf("%s %d:%d", s.Type, s.Bus, s.Unit) }

// ParseSlot reads what String wrote. What is none is the first place.
func ParseSlot(text string) Slot {
	var s Slot
	var typ string
	if _, err := fmt.Sscanf(text, "%s %d:%d", &typ, &s.Bus, &s.Unit); err != nil {
		return Boot(nil)
	}
	s.Type = vmopv1.VirtualControllerType(typ)
	return s
}

// Boot is the place of the boot disk: that of the image's first disk, or the first on SCSI.
func Boot(image *vmopv1.VirtualMachineImageStatus) Slot {
	slot := Slot{Type: vmopv1.VirtualControllerTypeSCSI}
	if image == nil || len(image.Disks) == 0 {
		return slot
	}
	d := image.Disks[0]
	if d.ControllerType.MaxCount() == 0 {
		return slot
	}
	slot = Slot{Type: d.ControllerType, Bus: ptr.Deref(d.ControllerBusNumber, 0), Unit: ptr.Deref(d.UnitNumber, 0)}
	if slot.Bus < 0 || slot.Bus >= slot.Type.MaxCount() || slot.Unit < 0 || slot.Unit >= slots(slot.Type, vmopv1.SCSIControllerTypeParaVirtualSCSI) || slot.reserved() {
		return Slot{Type: slot.Type}
	}
	return slot
}

// reserved tells whether the slot is the controller's own.
func (s Slot) reserved() bool {
	return s.Type == vmopv1.VirtualControllerTypeSCSI && s.Unit == vmopv1.SCSIControllerSpec{}.ReservedUnitNumber()
}

// slots is how many units a controller has, the highest number plus one.
func slots(typ vmopv1.VirtualControllerType, scsi vmopv1.SCSIControllerType) int32 {
	switch typ {
	case vmopv1.VirtualControllerTypeIDE:
		return vmopv1.IDEControllerSpec{}.MaxSlots()
	case vmopv1.VirtualControllerTypeSATA:
		return vmopv1.SATAControllerSpec{}.MaxSlots()
	case vmopv1.VirtualControllerTypeNVME:
		return vmopv1.NVMEControllerSpec{}.MaxSlots()
	case vmopv1.VirtualControllerTypeSCSI:
		if scsi == "" {
			scsi = vmopv1.SCSIControllerTypeParaVirtualSCSI
		}
		// Unit 64 would be the last of 65 with the controller itself; a host has 64.
		return min(vmopv1.SCSIControllerSpec{Type: scsi}.MaxSlots(), 64)
	}
	return 0
}

// device is a disk or a drive whose place is wanted.
type device struct {
	path *field.Path
	typ  *vmopv1.VirtualControllerType
	bus  **int32
	unit **int32
	// first is the type when none is named.
	first vmopv1.VirtualControllerType
}

// Assign fills in the places of all disks and drives, and adds the controllers they need to spec.hardware. boot is the
// boot disk's, nil when there is none. A place that cannot be had is an error, and left as it is.
func Assign(spec *vmopv1.VirtualMachineSpec, boot *Slot) field.ErrorList {
	var errs field.ErrorList
	taken := map[Slot]string{}
	if boot != nil {
		taken[*boot] = "the boot disk"
	}
	list := devices(spec)
	for _, d := range list {
		if *d.bus == nil || *d.unit == nil {
			continue
		}
		if *d.typ == "" {
			*d.typ = d.first
		}
		slot := Slot{Type: *d.typ, Bus: **d.bus, Unit: **d.unit}
		if err := check(spec, d.path, slot); err != nil {
			errs = append(errs, err)
			continue
		}
		if other, ok := taken[slot]; ok {
			errs = append(errs, field.Invalid(d.path.Child("unitNumber"), slot.Unit, fmt.Sprintf("%s is the place of %s; choose another number, or leave it out", slot, other)))
			continue
		}
		taken[slot] = d.path.String()
	}
	for _, d := range list {
		if *d.bus != nil && *d.unit != nil {
			continue
		}
		if *d.typ == "" {
			*d.typ = d.first
		}
		slot, err := free(spec, d, taken)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		*d.bus, *d.unit = new(slot.Bus), new(slot.Unit)
		taken[slot] = d.path.String()
	}
	addControllers(spec, list)
	return errs
}

// devices are the disks and drives of a spec.
func devices(spec *vmopv1.VirtualMachineSpec) []device {
	var out []device
	for i := range spec.Volumes {
		v := &spec.Volumes[i]
		out = append(out, device{
			path: field.NewPath("spec", "volumes").Index(i), typ: &v.ControllerType, bus: &v.ControllerBusNumber, unit: &v.UnitNumber,
			first: vmopv1.VirtualControllerTypeSCSI,
		})
	}
	if spec.Hardware == nil {
		return out
	}
	for i := range spec.Hardware.Cdrom {
		c := &spec.Hardware.Cdrom[i]
		out = append(out, device{
			path: field.NewPath("spec", "hardware", "cdrom").Index(i), typ: &c.ControllerType, bus: &c.ControllerBusNumber, unit: &c.UnitNumber,
			first: vmopv1.VirtualControllerTypeSATA,
		})
	}
	return out
}

// check tells whether there is such a slot.
func check(spec *vmopv1.VirtualMachineSpec, path *field.Path, s Slot) *field.Error {
	if s.Type.MaxCount() == 0 {
		return field.NotSupported(path.Child("controllerType"), s.Type, []string{"IDE", "NVME", "SATA", "SCSI"})
	}
	if s.Bus < 0 || s.Bus >= s.Type.MaxCount() {
		return field.Invalid(path.Child("controllerBusNumber"), s.Bus, fmt.Sprintf("%s controllers have the numbers 0 to %d", s.Type, s.Type.MaxCount()-1))
	}
	if n := slots(s.Type, scsiType(spec, s.Bus)); s.Unit < 0 || s.Unit >= n {
		return field.Invalid(path.Child("unitNumber"), s.Unit, fmt.Sprintf("this %s controller has the units 0 to %d", s.Type, n-1))
	}
	if s.reserved() {
		return field.Invalid(path.Child("unitNumber"), s.Unit, "7 is the SCSI controller's own unit; choose another number, or leave it out")
	}
	return nil
}

// free finds a place on the controllers that d allows.
func free(spec *vmopv1.VirtualMachineSpec, d device, taken map[Slot]string) (Slot, *field.Error) {
	first, last := int32(0), d.typ.MaxCount()
	if *d.bus != nil {
		first, last = **d.bus, **d.bus+1
	}
	for bus := first; bus < last; bus++ {
		slot := Slot{Type: *d.typ, Bus: bus}
		if *d.unit != nil {
			slot.Unit = **d.unit
		}
		if err := check(spec, d.path, slot); err != nil {
			return slot, err
		}
		if *d.unit != nil {
			if _, ok := taken[slot]; !ok {
				return slot, nil
			}
			continue
		}
		for ; slot.Unit < slots(slot.Type, scsiType(spec, bus)); slot.Unit++ {
			if _, ok := taken[slot]; !ok && !slot.reserved() {
				return slot, nil
			}
		}
	}
	if d.typ.MaxCount() == 0 {
		return Slot{}, check(spec, d.path, Slot{Type: *d.typ})
	}
	return Slot{}, field.Invalid(d.path.Child("controllerType"), *d.typ, fmt.Sprintf("there is no free place on the %s controllers it allows; name another type or controller", *d.typ))
}

// scsiType is the model of a SCSI controller.
func scsiType(spec *vmopv1.VirtualMachineSpec, bus int32) vmopv1.SCSIControllerType {
	if spec.Hardware != nil {
		for _, c := range spec.Hardware.SCSIControllers {
			if c.BusNumber == bus {
				return c.Type
			}
		}
	}
	return vmopv1.SCSIControllerTypeParaVirtualSCSI
}

// addControllers adds those that disks and drives are on.
func addControllers(spec *vmopv1.VirtualMachineSpec, list []device) {
	for _, d := range list {
		if *d.bus == nil || *d.typ == "" || **d.bus < 0 || **d.bus >= d.typ.MaxCount() {
			continue // there is none, or no such
		}
		if spec.Hardware == nil {
			spec.Hardware = &vmopv1.VirtualMachineHardwareSpec{}
		}
		h, bus := spec.Hardware, **d.bus
		switch *d.typ {
		case vmopv1.VirtualControllerTypeIDE:
			if !slices.ContainsFunc(h.IDEControllers, func(c vmopv1.IDEControllerSpec) bool { return c.BusNumber == bus }) {
				h.IDEControllers = append(h.IDEControllers, vmopv1.IDEControllerSpec{BusNumber: bus})
			}
		case vmopv1.VirtualControllerTypeSATA:
			if !slices.ContainsFunc(h.SATAControllers, func(c vmopv1.SATAControllerSpec) bool { return c.BusNumber == bus }) {
				h.SATAControllers = append(h.SATAControllers, vmopv1.SATAControllerSpec{BusNumber: bus})
			}
		case vmopv1.VirtualControllerTypeNVME:
			if !slices.ContainsFunc(h.NVMEControllers, func(c vmopv1.NVMEControllerSpec) bool { return c.BusNumber == bus }) {
				h.NVMEControllers = append(h.NVMEControllers, vmopv1.NVMEControllerSpec{BusNumber: bus, SharingMode: vmopv1.VirtualControllerSharingModeNone})
			}
		case vmopv1.VirtualControllerTypeSCSI:
			if !slices.ContainsFunc(h.SCSIControllers, func(c vmopv1.SCSIControllerSpec) bool { return c.BusNumber == bus }) {
				h.SCSIControllers = append(h.SCSIControllers, vmopv1.SCSIControllerSpec{
					BusNumber: bus, SharingMode: vmopv1.VirtualControllerSharingModeNone, Type: vmopv1.SCSIControllerTypeParaVirtualSCSI,
				})
			}
		}
	}
}
