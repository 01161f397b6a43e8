package admission

import (
	"context"
	"fmt"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// changes refuses what cannot change, at all or while the machine has power.
func changes(before, vm *vmopv1.VirtualMachine) field.ErrorList {
	spec := field.NewPath("spec")
	was, now := before.Spec, vm.Spec
	var errs field.ErrorList
	never := func(name string, a, b any) {
		if !equality.Semantic.DeepEqual(a, b) {
			errs = append(errs, field.Forbidden(spec.Child(name), "cannot be changed: make another virtual machine"))
		}
	}
	never("image", was.Image, now.Image)
	never("storageClass", was.StorageClass, now.StorageClass)
	never("reserved", was.Reserved, now.Reserved)
	never("affinity", was.Affinity, now.Affinity)
	never("policies", was.Policies, now.Policies)
	never("biosUUID", strings.ToLower(was.BiosUUID), strings.ToLower(now.BiosUUID))
	never("instanceUUID", strings.ToLower(was.InstanceUUID), strings.ToLower(now.InstanceUUID))
	if provider(was.Bootstrap) != "" && provider(now.Bootstrap) != provider(was.Bootstrap) {
		errs = append(errs, field.Forbidden(spec.Child("bootstrap"), fmt.Sprintf("the bootstrap provider %s cannot be changed: make another virtual machine", provider(was.Bootstrap))))
	}
	switch {
	case now.PowerState == "" && was.PowerState != "":
		errs = append(errs, field.Invalid(spec.Child("powerState"), now.PowerState, "cannot set power state to empty string"))
	case now.PowerState == vmopv1.VirtualMachinePowerStateSuspended && was.PowerState == vmopv1.VirtualMachinePowerStateOff:
		errs = append(errs, field.Invalid(spec.Child("powerState"), now.PowerState, "cannot suspend a VM that is powered off: power it on first"))
	case now.PowerState == vmopv1.VirtualMachinePowerStateOff && was.PowerState == vmopv1.VirtualMachinePowerStateSuspended && before.Status.PowerState == vmopv1.VirtualMachinePowerStateSuspended:
		// The memory is given up, as when a suspended machine of vSphere is powered off.
	}
	if now.MinHardwareVersion < was.MinHardwareVersion {
		errs = append(errs, field.Invalid(spec.Child("minHardwareVersion"), now.MinHardwareVersion, "cannot downgrade hardware version"))
	}
	if a, b := was.Advanced, now.Advanced; a != nil && a.BootDiskCapacity != nil && b != nil && b.BootDiskCapacity != nil && b.BootDiskCapacity.Cmp(*a.BootDiskCapacity) < 0 {
		errs = append(errs, field.Invalid(spec.Child("advanced", "bootDiskCapacity"), b.BootDiskCapacity.String(), "a disk cannot shrink"))
	}
	if before.Status.PowerState == vmopv1.VirtualMachinePowerStateOn || before.Status.PowerState == vmopv1.VirtualMachinePowerStateSuspended {
		errs = append(errs, powered(was, now)...)
	}
	return errs
}

// powered refuses what can only change while the machine is off.
func powered(was, now vmopv1.VirtualMachineSpec) field.ErrorList {
	spec := field.NewPath("spec")
	var errs field.ErrorList
	off := func(path *field.Path, a, b any) {
		if !equality.Semantic.DeepEqual(a, b) {
			errs = append(errs, field.Forbidden(path, "updates to this field are not allowed when VM power is on: power it off first"))
		}
	}
	off(spec.Child("guestID"), was.GuestID, now.GuestID)
	off(spec.Child("minHardwareVersion"), was.MinHardwareVersion, now.MinHardwareVersion)
	if a, b := was.Network, now.Network; a != nil && b != nil {
		off(spec.Child("network", "disabled"), a.Disabled, b.Disabled)
		off(spec.Child("network", "interfaces"), a.Interfaces, b.Interfaces)
	}
	for i, v := range now.Volumes {
		at := slices.IndexFunc(was.Volumes, func(o vmopv1.VirtualMachineVolume) bool {
			return o.Name == v.Name && equality.Semantic.DeepEqual(o.PersistentVolumeClaim, v.PersistentVolumeClaim)
		})
		if at < 0 {
			continue
		}
		o, path := was.Volumes[at], spec.Child("volumes").Index(i)
		off(path.Child("controllerType"), o.ControllerType, v.ControllerType)
		off(path.Child("controllerBusNumber"), o.ControllerBusNumber, v.ControllerBusNumber)
		off(path.Child("unitNumber"), o.UnitNumber, v.UnitNumber)
		off(path.Child("diskMode"), o.DiskMode, v.DiskMode)
		off(path.Child("sharingMode"), o.SharingMode, v.SharingMode)
	}
	a, b := was.Hardware, now.Hardware
	if a == nil || b == nil {
		return errs
	}
	places := func(list []vmopv1.VirtualMachineCdromSpec) []string {
		var out []string
		for _, c := range list {
			place := c.DeepCopy()
			place.Connected, place.AllowGuestControl, place.Image = nil, nil, vmopv1.VirtualMachineImageRef{}
			bus, unit := int32(-1), int32(-1)
			if c.ControllerBusNumber != nil && c.UnitNumber != nil {
				bus, unit = *c.ControllerBusNumber, *c.UnitNumber
			}
			out = append(out, fmt.Sprintf("%s %s %d:%d", c.Name, c.ControllerType, bus, unit))
		}
		return out
	}
	off(spec.Child("hardware", "cdrom"), places(a.Cdrom), places(b.Cdrom))
	for _, c := range a.SCSIControllers {
		for i, d := range b.SCSIControllers {
			if c.BusNumber == d.BusNumber {
				off(spec.Child("hardware", "scsiControllers").Index(i).Child("type"), c.Type, d.Type)
			}
		}
	}
	return errs
}

// provider is the name of the bootstrap provider.
func provider(b *vmopv1.VirtualMachineBootstrapSpec) string {
	switch {
	case b == nil:
		return ""
	case b.CloudInit != nil:
		return "cloudInit"
	case b.LinuxPrep != nil:
		return "linuxPrep"
	case b.Sysprep != nil:
		return "sysprep"
	case b.VAppConfig != nil:
		return "vAppConfig"
	}
	return ""
}

// unique lists what no two machines may have.
func unique(obj client.Object) []string {
	vm, ok := obj.(*vmopv1.VirtualMachine)
	if !ok {
		return nil
	}
	var out []string
	for _, id := range []string{"bios/" + vm.Spec.BiosUUID, "instance/" + vm.Spec.InstanceUUID} {
		if !strings.HasSuffix(id, "/") {
			out = append(out, strings.ToLower(id))
		}
	}
	if vm.Spec.Network != nil {
		for _, n := range vm.Spec.Network.Interfaces {
			if n.MACAddr != "" {
				out = append(out, "mac/"+strings.ToLower(n.MACAddr))
			}
		}
	}
	return out
}

// duplicates refuses what another machine has already.
func (w *Webhook) duplicates(ctx context.Context, vm *vmopv1.VirtualMachine) (field.ErrorList, error) {
	var errs field.ErrorList
	check := func(path *field.Path, value, key string) error {
		if value == "" {
			return nil
		}
		var list vmopv1.VirtualMachineList
		if err := w.Cached.List(ctx, &list, client.MatchingFields{uniqueIndex: strings.ToLower(key + "/" + value)}); err != nil {
			return fmt.Errorf("looking for duplicates: %w", err)
		}
		for _, other := range list.Items {
			if other.Namespace == vm.Namespace && other.Name == vm.Name {
				continue
			}
			who := "a VirtualMachine of another namespace"
			if other.Namespace == vm.Namespace {
				who = "VirtualMachine " + other.Name
			}
			errs = append(errs, field.Invalid(path, value, "is that of "+who+": choose another, or leave it out"))
			return nil
		}
		return nil
	}
	spec := field.NewPath("spec")
	if err := check(spec.Child("biosUUID"), vm.Spec.BiosUUID, "bios"); err != nil {
		return nil, err
	}
	if err := check(spec.Child("instanceUUID"), vm.Spec.InstanceUUID, "instance"); err != nil {
		return nil, err
	}
	if vm.Spec.Network == nil {
		return errs, nil
	}
	for i, n := range vm.Spec.Network.Interfaces {
		if err := check(spec.Child("network", "interfaces").Index(i).Child("macAddr"), n.MACAddr, "mac"); err != nil {
			return nil, err
		}
	}
	return errs, nil
}
