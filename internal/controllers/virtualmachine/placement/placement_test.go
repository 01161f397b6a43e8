package placement

import (
	"fmt"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
)

func volume(name string, typ vmopv1.VirtualControllerType, place ...int32) vmopv1.VirtualMachineVolume {
	v := vmopv1.VirtualMachineVolume{Name: name, ControllerType: typ}
	if len(place) > 0 {
		v.ControllerBusNumber = new(place[0])
	}
	if len(place) > 1 {
		v.UnitNumber = new(place[1])
	}
	return v
}

func TestAssign(t *testing.T) {
	many := make([]vmopv1.VirtualMachineVolume, 9)
	for _, c := range []struct {
		name    string
		volumes []vmopv1.VirtualMachineVolume
		cdroms  int
		want    string
		err     string
	}{
		{"beside the boot disk", []vmopv1.VirtualMachineVolume{volume("a", ""), volume("b", "")}, 0, "SCSI 0:1, SCSI 0:2", ""},
		{"named places first", []vmopv1.VirtualMachineVolume{volume("a", ""), volume("b", "SCSI", 0, 1)}, 0, "SCSI 0:2, SCSI 0:1", ""},
		{"seven is skipped", many, 0, "SCSI 0:1, SCSI 0:2, SCSI 0:3, SCSI 0:4, SCSI 0:5, SCSI 0:6, SCSI 0:8, SCSI 0:9, SCSI 0:10", ""},
		{"other types", []vmopv1.VirtualMachineVolume{volume("a", "NVME"), volume("b", "SATA", 1), volume("c", "IDE", 1, 1)}, 1, "NVME 0:0, SATA 1:0, IDE 1:1, SATA 0:0", ""},
		{"only a unit", []vmopv1.VirtualMachineVolume{{Name: "a", UnitNumber: new(int32(0))}}, 0, "SCSI 1:0", ""},
		{"boot disk's place", []vmopv1.VirtualMachineVolume{volume("a", "SCSI", 0, 0)}, 0, "", "spec.volumes[0].unitNumber: Invalid value: 0: SCSI 0:0 is the place of the boot disk"},
		{"twice", []vmopv1.VirtualMachineVolume{volume("a", "SATA", 0, 3), volume("b", "SATA", 0, 3)}, 0, "", "is the place of spec.volumes[0]"},
		{"seven", []vmopv1.VirtualMachineVolume{volume("a", "SCSI", 0, 7)}, 0, "", "controller's own unit"},
		{"no such controller", []vmopv1.VirtualMachineVolume{volume("a", "IDE", 2)}, 0, "", "numbers 0 to 1"},
		{"no such unit", []vmopv1.VirtualMachineVolume{volume("a", "SATA", 0, 30)}, 0, "", "units 0 to 29"},
		{"no such type", []vmopv1.VirtualMachineVolume{volume("a", "FLOPPY")}, 0, "", "controllerType"},
		{"full", []vmopv1.VirtualMachineVolume{volume("a", "IDE"), volume("b", "IDE"), volume("c", "IDE"), volume("d", "IDE"), volume("e", "IDE")}, 0, "", "no free place on the IDE controllers"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := &vmopv1.VirtualMachineSpec{Volumes: c.volumes}
			if c.cdroms > 0 {
				spec.Hardware = &vmopv1.VirtualMachineHardwareSpec{Cdrom: make([]vmopv1.VirtualMachineCdromSpec, c.cdroms)}
			}
			boot := Boot(nil)
			errs := Assign(spec, &boot)
			if c.err != "" {
				if len(errs) == 0 || !strings.Contains(errs.ToAggregate().Error(), c.err) {
					t.Fatalf("error %v", errs)
				}
				return
			}
			if len(errs) > 0 {
				t.Fatal(errs.ToAggregate())
			}
			var got []string
			for _, d := range devices(spec) {
				got = append(got, fmt.Sprintf("%s %d:%d", *d.typ, **d.bus, **d.unit))
			}
			if text := strings.Join(got, ", "); text != c.want {
				t.Fatalf("got %s", text)
			}
			again := spec.DeepCopy()
			if errs := Assign(again, &boot); len(errs) > 0 || fmt.Sprint(again.Hardware.SCSIControllers) != fmt.Sprint(spec.Hardware.SCSIControllers) {
				t.Fatalf("a second time: %v", errs)
			}
		})
	}
}

func TestBootFollowsTheImage(t *testing.T) {
	image := &vmopv1.VirtualMachineImageStatus{Disks: []vmopv1.VirtualMachineImageDiskInfo{{
		ControllerType: vmopv1.VirtualControllerTypeSATA, ControllerBusNumber: new(int32(1)), UnitNumber: new(int32(2)),
	}}}
	if got := Boot(image).String(); got != "SATA 1:2" {
		t.Fatal(got)
	}
	image.Disks[0].UnitNumber = new(int32(99))
	if got := Boot(image).String(); got != "SATA 0:0" {
		t.Fatal(got)
	}
}
