package machine

import (
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Controllers lists controllers with what is on them.
func Controllers(disks []machinev1.Disk) []vmopv1.VirtualControllerStatus {
	var out []vmopv1.VirtualControllerStatus
	keys := map[machinev1.Bus]int32{machinev1.IDE: 200, machinev1.SCSI: 1000, machinev1.SATA: 15000, machinev1.NVMe: 31000}
	types := map[machinev1.Bus]vmopv1.VirtualControllerType{
		machinev1.IDE: vmopv1.VirtualControllerTypeIDE, machinev1.SCSI: vmopv1.VirtualControllerTypeSCSI,
		machinev1.SATA: vmopv1.VirtualControllerTypeSATA, machinev1.NVMe: vmopv1.VirtualControllerTypeNVME,
	}
	for _, bus := range []machinev1.Bus{machinev1.IDE, machinev1.SCSI, machinev1.SATA, machinev1.NVMe} {
		for number := range 4 {
			c := vmopv1.VirtualControllerStatus{BusNumber: int32(number), Type: types[bus], DeviceKey: keys[bus] + int32(number)}
			for _, d := range disks {
				if d.Bus != bus || d.Controller != number {
					continue
				}
				device := vmopv1.VirtualDeviceStatus{Type: vmopv1.VirtualDeviceTypeDisk, UnitNumber: int32(d.Unit)}
				if d.CDROM {
					device.Type = vmopv1.VirtualDeviceTypeCDROM
				}
				c.Devices = append(c.Devices, device)
			}
			if len(c.Devices) > 0 {
				out = append(out, c)
			}
		}
	}
	return out
}
