package size

import (
	"fmt"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Boot is the size of the boot disk, or why there is none.
func Boot(vm *vmopv1.VirtualMachine, image *vmopv1.VirtualMachineImageStatus) (size resource.Quantity, why string) {
	var least *resource.Quantity
	if image != nil && len(image.Disks) > 0 {
		least = image.Disks[0].Limit
		if least == nil {
			least = image.Disks[0].Requested
		}
	}
	wanted := BootCapacity(vm)
	switch {
	case wanted == nil && least == nil:
		return size, fmt.Sprintf("the size of %s %s is not known: set spec.advanced.bootDiskCapacity", vm.Spec.Image.Kind, vm.Spec.Image.Name)
	case wanted == nil:
		return *least, ""
	case least != nil && wanted.Cmp(*least) < 0:
		return size, fmt.Sprintf("spec.advanced.bootDiskCapacity is %s, but the disk of %s %s has %s: set at least that", wanted, vm.Spec.Image.Kind, vm.Spec.Image.Name, least)
	}
	return *wanted, ""
}

// efiMemory is what boot loaders need under EFI.
const efiMemory = 256 * mib

// TooLittle says why a machine may have too little memory to boot, or is empty. GRUB does not find memory for a kernel
// then, and says so only on the screen.
func TooLittle(s Size, efi bool) string {
	if !efi || s.Memory >= efiMemory {
		return ""
	}
	return fmt.Sprintf("the machine has %d MiB of memory, and boot loaders such as GRUB need %d MiB with the firmware EFI: if it does not boot, name a larger class in spec.className, or bios in spec.bootOptions.firmware",
		s.Memory/mib, efiMemory/mib)
}

// BootCapacity is what the machine asks for, nil for nothing.
func BootCapacity(vm *vmopv1.VirtualMachine) *resource.Quantity {
	if vm.Spec.Advanced == nil || vm.Spec.Advanced.BootDiskCapacity == nil || vm.Spec.Advanced.BootDiskCapacity.IsZero() {
		return nil
	}
	return vm.Spec.Advanced.BootDiskCapacity
}
