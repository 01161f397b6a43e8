package virtualmachine

import (
	"context"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/claims"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
)

const cdromClaim = "cdrom-"

// cdroms makes the drives, with discs that are copies-on-write of images.
func (r *Reconciler) cdroms(ctx context.Context, v *view) error {
	vm := v.vm
	wanted := map[string]bool{}
	spec := vm.Spec.DeepCopy()
	_ = placement.Assign(spec, &v.slot) // what cannot be placed is in the conditions of volumes
	var problems []string
	if h := spec.Hardware; h != nil {
		for i := range h.Cdrom {
			c := &h.Cdrom[i]
			if c.UnitNumber == nil || c.ControllerBusNumber == nil {
				problems = append(problems, fmt.Sprintf("spec.hardware.cdrom[%d] has no place on a controller", i))
				continue
			}
			handle, problem, err := r.disc(ctx, v, c, wanted)
			if err != nil {
				return err
			}
			if problem != "" {
				problems = append(problems, fmt.Sprintf("spec.hardware.cdrom[%d]: %s", i, problem))
			}
			v.disks = append(v.disks, machine.CDROM(vm, c, handle))
		}
	}
	switch {
	case len(problems) > 0:
		condition.False(&vm.Status.Conditions, vmopv1.VirtualMachineHardwareCDROMVerified, vmopv1.VirtualMachineHardwareCDROMMismatchReason, "%s", strings.Join(problems, "; "))
	case spec.Hardware != nil && len(spec.Hardware.Cdrom) > 0:
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineHardwareCDROMVerified)
	default:
		condition.Remove(&vm.Status.Conditions, vmopv1.VirtualMachineHardwareCDROMVerified)
	}
	if err := r.release(ctx, v); err != nil {
		return err
	}
	return r.deleteDiscs(ctx, v, wanted)
}

// disc is the volume handle of what is in a drive. It is empty for an empty drive, and as long as the disc is not there,
// which then is a problem.
func (r *Reconciler) disc(ctx context.Context, v *view, c *vmopv1.VirtualMachineCdromSpec, wanted map[string]bool) (handle, problem string, err error) {
	if c.Connected != nil && !*c.Connected || c.Image.Name == "" {
		return "", "", nil
	}
	vm, ref := v.vm, c.Image.Kind+" "+c.Image.Name
	name := cdromClaim + machine.DiskUUID(string(vm.UID), c.Name, c.Image.Kind, c.Image.Name)
	wanted[name] = true
	claim := &corev1.PersistentVolumeClaim{}
	err = r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: name}, claim)
	if apierrors.IsNotFound(err) {
		image, err := r.imageStatus(ctx, vm.Namespace, c.Image)
		switch {
		case err != nil:
			return "", "", err
		case image == nil:
			v.missing = append(v.missing, ref+" does not exist")
			return "", ref + " does not exist: name an image as kubectl get vmi,cvmi does (vmi-...), drives do not know display names", nil
		case !meta.IsStatusConditionTrue(image.Conditions, "Ready"): // and it has no type yet
			v.missing = append(v.missing, ref+" is not ready")
			return "", ref + " is not ready yet", nil
		case image.Type != "ISO":
			v.missing = append(v.missing, ref+" is no CD-ROM")
			return "", ref + " is not an ISO image: name one of type ISO", nil
		}
		size := resource.MustParse("1Gi")
		if len(image.Disks) > 0 && image.Disks[0].Limit != nil {
			size = *image.Disks[0].Limit
		}
		claim = claims.New(vm, name, size)
		claim.Annotations = map[string]string{claims.ImageAnnotation: c.Image.Kind + "/" + c.Image.Name}
		if err := r.Create(ctx, claim); err != nil {
			if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) || apierrors.IsAlreadyExists(err) {
				v.missing = append(v.missing, "the disc of a drive cannot be made")
				v.soon(lookAgain)
				return "", fmt.Sprintf("its disc cannot be made: %v", err), nil
			}
			return "", "", fmt.Errorf("making the disc of drive %s: %w", c.Name, err)
		}
	} else if err != nil {
		return "", "", err
	}
	v.claims = append(v.claims, claim)
	handle, err = r.attach(ctx, v, claim)
	if err != nil && claim.Spec.VolumeName != "" {
		if pv, problem := attachment.Volume(ctx, r.Client, claim, ""); problem == nil {
			if has, ok := v.told(machine.CDROMDisk(c.Name), func(d machinev1.Disk) bool { return d.Volume == pv.Spec.CSI.VolumeHandle }); ok {
				handle = has.Volume // it stays in the drive
			}
		}
	}
	if handle == "" {
		v.await(machine.CDROMDisk(c.Name))
	}
	if err != nil {
		text, retry := attachment.Text(err)
		if retry {
			return "", "", err
		}
		return handle, text, nil
	}
	return handle, "", nil
}

// deleteDiscs deletes claims of discs that are in no drive any more.
func (r *Reconciler) deleteDiscs(ctx context.Context, v *view, wanted map[string]bool) error {
	var list corev1.PersistentVolumeClaimList
	if err := r.List(ctx, &list, client.InNamespace(v.vm.Namespace), client.MatchingLabels{machinev1.UIDLabel: string(v.vm.UID)}); err != nil {
		return fmt.Errorf("listing PersistentVolumeClaims: %w", err)
	}
	for i := range list.Items {
		c := &list.Items[i]
		if !strings.HasPrefix(c.Name, cdromClaim) || wanted[c.Name] || c.DeletionTimestamp != nil {
			continue
		}
		attachments, err := attachment.List(ctx, r.Client, v.vm)
		if err != nil {
			return err
		}
		busy := false
		for _, a := range attachments {
			busy = busy || a.Labels[attachment.ClaimLabel] == string(c.UID)
		}
		if busy {
			continue
		}
		if err := r.Delete(ctx, c); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting the disc %s: %w", c.Name, err)
		}
	}
	return nil
}
