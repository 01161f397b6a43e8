package claims

import (
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
)

func TestOfImage(t *testing.T) {
	vm := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "app", UID: "u"}}
	vm.Spec.StorageClass = "fast"
	vm.Spec.Crypto = &vmopv1.VirtualMachineCryptoSpec{EncryptionClassName: "keys"}
	size := new(resource.MustParse("2Gi"))
	image := &vmopv1.VirtualMachineImageStatus{Disks: []vmopv1.VirtualMachineImageDiskInfo{
		{Limit: size}, {Limit: size, ControllerType: "NVME"}, {Requested: size}, {},
	}}
	got := OfImage(vm, image)
	if len(got) != 2 || got[0].Name != "image-disk-1" || got[0].ControllerType != "NVME" || got[1].Name != "image-disk-2" {
		t.Fatalf("%+v", got)
	}
	claim := got[1].PersistentVolumeClaim
	if claim.InstanceVolumeClaim.StorageClass != "fast" || claim.InstanceVolumeClaim.Size.Cmp(*size) != 0 || Number(vm, claim.ClaimName) != 2 || Number(vm, "data") != 0 {
		t.Errorf("%+v", claim)
	}
	vm.Spec.Volumes = got[:1]
	if left := OfImage(vm, image); len(left) != 1 || left[0].Name != "image-disk-2" {
		t.Errorf("%+v", left)
	}
	made := New(vm, claim.ClaimName, *size)
	FromImage(made, vm, "VirtualMachineImage/a", 2)
	if made.Annotations[ImageAnnotation] != "VirtualMachineImage/a" || made.Annotations[DiskAnnotation] != "2" || made.Annotations[encryption.ClaimAnnotation] != "keys" || *made.Spec.StorageClassName != "fast" {
		t.Errorf("%+v", made)
	}
	if OfImage(vm, nil) != nil {
		t.Error("volumes of no image")
	}
}
