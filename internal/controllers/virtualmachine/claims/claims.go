// Package claims makes the PersistentVolumeClaims that belong to a VirtualMachine and go with it, and adds those of an
// image's further disks to the volumes of a VirtualMachine.
//
// It is pure: the controller of VirtualMachines creates what it returns. An image with several disks (an OVA) becomes a
// boot disk, and one volume in spec.volumes for each of the others, where it can be seen, snapshotted and removed like
// any other. What can go wrong: nothing here.
package claims

import (
	"fmt"
	"slices"
	"strconv"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
)

// Annotations of claims.
const (
	// ImageAnnotation is the image that the volume is made of, VirtualMachineImage/NAME or
	// ClusterVirtualMachineImage/NAME.
	ImageAnnotation = "atoll.dev/image"
	// DiskAnnotation is which of the image's disks, the first when there is none.
	DiskAnnotation = "atoll.dev/image-disk"
)

// maxDisks bounds how many disks of an image a machine gets.
const maxDisks = 32

// New is a claim of a block volume that goes with the VirtualMachine.
func New(vm *vmopv1.VirtualMachine, name string, size resource.Quantity) *corev1.PersistentVolumeClaim {
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: vm.Namespace, Name: name,
			Labels:          map[string]string{machinev1.NameLabel: vm.Name, machinev1.UIDLabel: string(vm.UID)},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(vm, vmopv1.GroupVersion.WithKind("VirtualMachine"))},
		},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			VolumeMode:  new(corev1.PersistentVolumeBlock),
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: size}},
		},
	}
	if vm.Spec.StorageClass != "" {
		claim.Spec.StorageClassName = &vm.Spec.StorageClass
	}
	return claim
}

// FromImage makes a claim one of a copy of the image's disk of that number, encrypted if the machine is to be.
func FromImage(claim *corev1.PersistentVolumeClaim, vm *vmopv1.VirtualMachine, image string, disk int) {
	metav1.SetMetaDataAnnotation(&claim.ObjectMeta, ImageAnnotation, image)
	if disk > 0 {
		metav1.SetMetaDataAnnotation(&claim.ObjectMeta, DiskAnnotation, strconv.Itoa(disk))
	}
	if c := vm.Spec.Crypto; c != nil && c.EncryptionClassName != "" {
		metav1.SetMetaDataAnnotation(&claim.ObjectMeta, encryption.ClaimAnnotation, c.EncryptionClassName)
	}
}

// disk is the name of the claim of a further disk of the image.
func disk(vm *vmopv1.VirtualMachine, number int) string {
	return "disk-" + machine.DiskUUID(string(vm.UID), "image", strconv.Itoa(number))
}

// Number is which disk of the image a claim of this name is of, 0 for one that is of none.
func Number(vm *vmopv1.VirtualMachine, name string) int {
	for i := 1; i < maxDisks; i++ {
		if disk(vm, i) == name {
			return i
		}
	}
	return 0
}

// OfImage are the volumes for the further disks of an image, without those that the machine has.
func OfImage(vm *vmopv1.VirtualMachine, image *vmopv1.VirtualMachineImageStatus) []vmopv1.VirtualMachineVolume {
	if image == nil {
		return nil
	}
	var out []vmopv1.VirtualMachineVolume
	for i := 1; i < min(len(image.Disks), maxDisks); i++ {
		d, claim, name := image.Disks[i], disk(vm, i), fmt.Sprintf("image-disk-%d", i)
		size := d.Limit
		if size == nil {
			size = d.Requested
		}
		has := slices.ContainsFunc(vm.Spec.Volumes, func(v vmopv1.VirtualMachineVolume) bool {
			return v.Name == name || v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claim
		})
		if has || size == nil {
			continue
		}
		v := vmopv1.VirtualMachineVolume{Name: name, ControllerType: d.ControllerType}
		v.PersistentVolumeClaim = &vmopv1.PersistentVolumeClaimVolumeSource{
			InstanceVolumeClaim: &vmopv1.InstanceVolumeClaimVolumeSource{StorageClass: vm.Spec.StorageClass, Size: *size},
		}
		v.PersistentVolumeClaim.ClaimName = claim
		out = append(out, v)
	}
	return out
}
