//go:build integration

package server

import (
	"strings"
	"testing"

	vmopv1a3 "github.com/vmware-tanzu/vm-operator/api/v1alpha3"
	vmopv1a4 "github.com/vmware-tanzu/vm-operator/api/v1alpha4"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// checkDrive has a drive of spec.cdrom, as versions before v1alpha5 have it, in its place, and as it is.
func checkDrive(t *testing.T, vm *vmopv1.VirtualMachine, image string, connected bool) {
	t.Helper()
	if vm.Spec.Hardware == nil || len(vm.Spec.Hardware.Cdrom) != 1 {
		t.Fatalf("hardware %+v", vm.Spec.Hardware)
	}
	d := vm.Spec.Hardware.Cdrom[0]
	if d.Name != "cd1" || d.Image.Kind != "VirtualMachineImage" || d.Image.Name != image || d.Connected == nil || *d.Connected != connected {
		t.Errorf("drive %+v", d)
	}
	if d.ControllerType != "SATA" || d.ControllerBusNumber == nil || d.UnitNumber == nil || len(vm.Spec.Hardware.SATAControllers) != 1 {
		t.Errorf("place of the drive %+v, controllers %+v", d, vm.Spec.Hardware.SATAControllers)
	}
}

// checkV1alpha3 writes, reads and changes a machine in v1alpha3.
func checkV1alpha3(t *testing.T, c client.Client) {
	ctx := t.Context()
	vm := &vmopv1a3.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "third"},
		Spec: vmopv1a3.VirtualMachineSpec{
			ImageName: "debian-12", ClassName: "best-effort-xsmall", StorageClass: "atoll", PowerState: vmopv1a3.VirtualMachinePowerStateOff, GuestID: "debian12_64Guest",
			Cdrom:   []vmopv1a3.VirtualMachineCdromSpec{{Name: "cd1", Image: vmopv1a3.VirtualMachineImageRef{Kind: "VirtualMachineImage", Name: "vmi-disc"}, Connected: new(true)}},
			Network: &vmopv1a3.VirtualMachineNetworkSpec{HostName: "host", DomainName: "example.org"},
		},
	}
	if err := c.Create(ctx, vm); err != nil {
		t.Fatal(err)
	}
	now := eventually(t, c, &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "third"}}, func(*vmopv1.VirtualMachine) bool { return true })
	checkDrive(t, now, "vmi-disc", true)
	if now.Spec.GuestID != "debian12_64Guest" || now.Spec.Network.HostName != "host" || now.Spec.Network.DomainName != "example.org" || now.Spec.BiosUUID == "" {
		t.Errorf("%+v", now.Spec)
	}
	eventually(t, c, now, func(vm *vmopv1.VirtualMachine) bool {
		c := meta.FindStatusCondition(vm.Status.Conditions, vmopv1.VirtualMachineHardwareCDROMVerified)
		return c != nil && c.Status == metav1.ConditionFalse && strings.Contains(c.Message, "VirtualMachineImage vmi-disc does not exist: name an image as kubectl get vmi,cvmi does")
	})
	// What only the newest version has is kept when an older one changes something.
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := c.Get(ctx, client.ObjectKeyFromObject(now), now); err != nil {
			return err
		}
		now.Spec.BootOptions = &vmopv1.VirtualMachineBootOptions{Firmware: "efi"}
		return c.Update(ctx, now)
	})
	if err != nil {
		t.Fatal(err)
	}
	err = retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := c.Get(ctx, client.ObjectKeyFromObject(vm), vm); err != nil {
			return err
		}
		if len(vm.Spec.Cdrom) != 1 || vm.Spec.BiosUUID != now.Spec.BiosUUID || vm.Spec.Image == nil || vm.Spec.Image.Name != "vmi-0123456789abcdef0" {
			t.Errorf("read in v1alpha3: %+v", vm.Spec)
		}
		vm.Spec.Cdrom[0].Connected, vm.Spec.PowerOffMode = new(false), vmopv1a3.VirtualMachinePowerOpModeHard
		return c.Update(ctx, vm)
	})
	if err != nil {
		t.Fatal(err)
	}
	again := eventually(t, c, now.DeepCopy(), func(vm *vmopv1.VirtualMachine) bool {
		return vm.Spec.PowerOffMode == vmopv1.VirtualMachinePowerOpModeHard
	})
	checkDrive(t, again, "vmi-disc", false)
	if again.Spec.BootOptions == nil || again.Spec.BootOptions.Firmware != "efi" || again.Spec.BiosUUID != now.Spec.BiosUUID {
		t.Errorf("after a change in v1alpha3: %+v", again.Spec)
	}
}

// checkV1alpha4 does it in v1alpha4, with a volume as well.
func checkV1alpha4(t *testing.T, c client.Client) {
	ctx := t.Context()
	vm := &vmopv1a4.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "fourth"},
		Spec: vmopv1a4.VirtualMachineSpec{
			Image:     &vmopv1a4.VirtualMachineImageRef{Kind: "ClusterVirtualMachineImage", Name: "vmi-0123456789abcdef0"},
			ClassName: "best-effort-xsmall", StorageClass: "atoll", PowerState: vmopv1a4.VirtualMachinePowerStateOff, GuestID: "debian12_64Guest",
			PromoteDisksMode: vmopv1a4.VirtualMachinePromoteDisksModeDisabled,
			Cdrom:            []vmopv1a4.VirtualMachineCdromSpec{{Name: "cd1", Image: vmopv1a4.VirtualMachineImageRef{Kind: "VirtualMachineImage", Name: "vmi-disc"}, Connected: new(true)}},
			Volumes: []vmopv1a4.VirtualMachineVolume{{Name: "data", VirtualMachineVolumeSource: vmopv1a4.VirtualMachineVolumeSource{
				PersistentVolumeClaim: &vmopv1a4.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}},
			}}},
		},
	}
	if err := c.Create(ctx, vm); err != nil {
		t.Fatal(err)
	}
	now := eventually(t, c, &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "fourth"}}, func(*vmopv1.VirtualMachine) bool { return true })
	checkDrive(t, now, "vmi-disc", true)
	if now.Spec.PromoteDisksMode != vmopv1.VirtualMachinePromoteDisksModeDisabled || now.Spec.Volumes[0].UnitNumber == nil || now.Spec.Volumes[0].ControllerType != "SCSI" {
		t.Errorf("%+v", now.Spec)
	}
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := c.Get(ctx, client.ObjectKeyFromObject(vm), vm); err != nil {
			return err
		}
		vm.Spec.Cdrom[0].Image.Name, vm.Spec.PowerOffMode = "vmi-other", vmopv1a4.VirtualMachinePowerOpModeHard
		return c.Update(ctx, vm)
	})
	if err != nil {
		t.Fatal(err)
	}
	again := eventually(t, c, now.DeepCopy(), func(vm *vmopv1.VirtualMachine) bool {
		return vm.Spec.PowerOffMode == vmopv1.VirtualMachinePowerOpModeHard
	})
	checkDrive(t, again, "vmi-other", true)
	if again.Spec.Volumes[0].UnitNumber == nil || *again.Spec.Volumes[0].UnitNumber != *now.Spec.Volumes[0].UnitNumber || again.Spec.InstanceUUID != now.Spec.InstanceUUID {
		t.Errorf("after a change in v1alpha4: %+v", again.Spec)
	}
	vm = &vmopv1a4.VirtualMachine{ObjectMeta: vm.ObjectMeta}
	eventually(t, c, vm, func(vm *vmopv1a4.VirtualMachine) bool {
		return vm.Status.BiosUUID == now.Spec.BiosUUID && vm.Status.PowerState == vmopv1a4.VirtualMachinePowerStateOff
	})
}
