package vmsnapshot

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// planAnnotation of a VirtualMachineSnapshot is its plan as JSON.
const planAnnotation = "atoll.dev/snapshot-plan"

// maxPlan bounds the annotation; all annotations together have 256 KiB.
const maxPlan = 160 << 10

// plan is what a snapshot is of. It is decided once.
type plan struct {
	// Machine is the uid of the VirtualMachine, Power its state when the snapshot was begun.
	Machine string                          `json:"machine"`
	Power   vmopv1.VirtualMachinePowerState `json:"power"`
	// Parent is the snapshot that the machine was at.
	Parent string `json:"parent,omitempty"`
	Disks  []disk `json:"disks"`
	// Memory is the name of the claim with the memory, MemoryBytes the size that it must have.
	Memory      string `json:"memory,omitempty"`
	MemoryBytes int64  `json:"memoryBytes,omitempty"`
	// Pod is the uid of the pod of a running machine.
	Pod string `json:"pod,omitempty"`
	// Spec of the VirtualMachine, for going back.
	Spec *vmopv1.VirtualMachineSpec `json:"spec"`
}

// disk is one disk of a snapshot.
type disk struct {
	Name   string `json:"name"`
	Claim  string `json:"claim"`
	Volume string `json:"volume"` // PersistentVolume
	Class  string `json:"class,omitempty"`
	Bytes  int64  `json:"bytes,omitempty"`
	// Snapshot is the CSI handle of the disk's snapshot, when it is known. It is not kept.
	Snapshot string `json:"-"`
	// Object is the name of the VolumeSnapshot.
	Object string `json:"object"`
}

// impossibleError is what keeps a snapshot from ever being taken.
type impossibleError string

// Error implements error.
func (e impossibleError) Error() string { return string(e) }

func impossible(format string, args ...any) error {
	return impossibleError(fmt.Sprintf(format, args...))
}

// planOf reads a snapshot's plan, nil when there is none yet.
func planOf(snap *vmopv1.VirtualMachineSnapshot) *plan {
	var p plan
	text := snap.Annotations[planAnnotation]
	if text == "" || json.Unmarshal([]byte(text), &p) != nil {
		return nil
	}
	return &p
}

// keep writes a plan into the snapshot.
func (r *Reconciler) keep(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, p *plan) error {
	text, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encoding the plan: %w", err)
	}
	if len(text) > maxPlan {
		return impossible("the spec of the virtual machine has %d bytes, a snapshot has room for %d; move user data into a Secret", len(text), maxPlan)
	}
	if snap.Annotations[planAnnotation] == string(text) {
		return nil
	}
	status := snap.Status
	base := snap.DeepCopy()
	metav1.SetMetaDataAnnotation(&snap.ObjectMeta, planAnnotation, string(text))
	if err := r.Patch(ctx, snap, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("keeping the plan: %w", err)
	}
	snap.Status = status
	return nil
}

// decide makes the plan of a snapshot.
func (r *Reconciler) decide(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) (*plan, error) {
	p := &plan{Machine: string(vm.UID), Power: vm.Status.PowerState, Spec: vm.Spec.DeepCopy()}
	if vm.Status.CurrentSnapshot != nil {
		p.Parent = vm.Status.CurrentSnapshot.Name
	}
	pod, err := running.Pod(ctx, r.Client, vm)
	if err != nil {
		return nil, err
	}
	switch {
	case p.Power == vmopv1.VirtualMachinePowerStateOn && pod != nil && !running.Ended(pod) && pod.DeletionTimestamp == nil:
		err = r.decideRunning(ctx, snap, p, pod)
	case p.Power != vmopv1.VirtualMachinePowerStateOn && p.Power != "" && pod == nil:
		err = r.decideOff(ctx, snap, vm, p)
	default:
		return nil, errBetween
	}
	if err != nil {
		return nil, err
	}
	if len(p.Disks) == 0 {
		return nil, impossible("virtual machine %s has no disk that a snapshot could be taken of", vm.Name)
	}
	return p, nil
}

// errBetween: the machine is being powered on or off.
var errBetween = errors.New("the virtual machine is changing its power state")

// excluded tells whether a volume is none of a snapshot's business, as its disk mode says.
func excluded(spec *vmopv1.VirtualMachineSpec, diskName string) bool {
	return slices.ContainsFunc(spec.Volumes, func(v vmopv1.VirtualMachineVolume) bool {
		return machine.VolumeDisk(v.Name) == diskName &&
			(v.DiskMode == vmopv1.VolumeDiskModeIndependentPersistent || v.DiskMode == vmopv1.VolumeDiskModeIndependentNonPersistent)
	})
}

// decideRunning plans the snapshot of a machine that runs: of the disks that it has now.
func (r *Reconciler) decideRunning(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, p *plan, pod *corev1.Pod) error {
	m, err := running.Machine(pod)
	if err != nil {
		return err
	}
	state := running.State(pod)
	if state.Phase != machinev1.Running {
		return errBetween
	}
	var volumes corev1.PersistentVolumeList
	if err := r.List(ctx, &volumes); err != nil {
		return fmt.Errorf("listing PersistentVolumes: %w", err)
	}
	for _, d := range m.Disks {
		if d.CDROM || d.ReadOnly || d.NonPersistent || d.Volume == "" || excluded(p.Spec, d.Name) {
			continue
		}
		if d.Shared {
			return impossible("disk %s is shared with other machines (sharingMode MultiWriter), of which no snapshot can be taken; give it disk mode IndependentPersistent to leave it out", d.Name)
		}
		i := slices.IndexFunc(volumes.Items, func(pv corev1.PersistentVolume) bool {
			return pv.Spec.CSI != nil && pv.Spec.CSI.VolumeHandle == d.Volume && pv.Spec.ClaimRef != nil && pv.Spec.ClaimRef.Namespace == snap.Namespace
		})
		if i < 0 {
			return fmt.Errorf("the volume of disk %s is not known", d.Name)
		}
		p.Disks = append(p.Disks, newDisk(snap, d.Name, &volumes.Items[i]))
	}
	p.Pod = string(pod.UID)
	if snap.Spec.Memory {
		p.Memory, p.MemoryBytes = memoryClaim(snap), max(state.Memory, m.Memory.Bytes)+memoryExtra
	}
	return nil
}

// decideOff plans the snapshot of a machine that is off or suspended.
func (r *Reconciler) decideOff(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan) error {
	claims := map[string]string{}
	names := []string{}
	if vm.Spec.Image != nil || vm.Spec.ImageName != "" {
		claims[machine.BootDisk] = virtualmachine.BootClaim(vm)
		names = append(names, machine.BootDisk)
	}
	for _, v := range vm.Spec.Volumes {
		name := machine.VolumeDisk(v.Name)
		if v.PersistentVolumeClaim == nil || v.PersistentVolumeClaim.ReadOnly || excluded(p.Spec, name) || v.DiskMode == vmopv1.VolumeDiskModeNonPersistent {
			continue
		}
		if v.SharingMode == vmopv1.VolumeSharingModeMultiWriter {
			return impossible("volume %s is shared with other machines (sharingMode MultiWriter), of which no snapshot can be taken; give it disk mode IndependentPersistent to leave it out", v.Name)
		}
		claims[name] = v.PersistentVolumeClaim.ClaimName
		names = append(names, name)
	}
	for _, name := range names {
		claim := &corev1.PersistentVolumeClaim{}
		err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: claims[name]}, claim)
		if apierrors.IsNotFound(err) && name == machine.BootDisk {
			return impossible("the boot disk has not been made yet: power the virtual machine on once")
		}
		if apierrors.IsNotFound(err) {
			return impossible("PersistentVolumeClaim %s of disk %s does not exist; remove the volume from the virtual machine or make the claim", claims[name], name)
		}
		if err != nil {
			return fmt.Errorf("reading PersistentVolumeClaim %s: %w", claims[name], err)
		}
		pv := &corev1.PersistentVolume{}
		if claim.Spec.VolumeName == "" {
			return impossible("PersistentVolumeClaim %s of disk %s has no volume yet: power the virtual machine on once", claim.Name, name)
		}
		if err := r.Get(ctx, client.ObjectKey{Name: claim.Spec.VolumeName}, pv); err != nil {
			return fmt.Errorf("reading PersistentVolume %s: %w", claim.Spec.VolumeName, err)
		}
		if pv.Spec.CSI == nil || pv.Spec.ClaimRef == nil {
			return impossible("the volume of disk %s is not one of the storage driver", name)
		}
		p.Disks = append(p.Disks, newDisk(snap, name, pv))
	}
	if p.Power == vmopv1.VirtualMachinePowerStateSuspended {
		saved := &corev1.PersistentVolumeClaim{}
		if err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: virtualmachine.MemoryClaim(vm)}, saved); err != nil {
			return fmt.Errorf("reading the saved memory: %w", err)
		}
		p.Memory, p.MemoryBytes = memoryClaim(snap), saved.Spec.Resources.Requests.Storage().Value()
	}
	return nil
}

// memoryExtra is what the state of devices may take beside the memory.
const memoryExtra = 256 << 20

func newDisk(snap *vmopv1.VirtualMachineSnapshot, name string, pv *corev1.PersistentVolume) disk {
	return disk{
		Name: name, Claim: pv.Spec.ClaimRef.Name, Volume: pv.Name, Class: pv.Spec.StorageClassName,
		Bytes: pv.Spec.Capacity.Storage().Value(), Object: objectName(snap, name),
	}
}

// objectName is the name of a disk's VolumeSnapshot, unique and at most 253 characters.
func objectName(snap *vmopv1.VirtualMachineSnapshot, disk string) string {
	const longest = 200
	return fmt.Sprintf("%s-%x", (snap.Name + "-" + disk)[:min(longest, len(snap.Name)+1+len(disk))], sum(snap, disk)[:4])
}

// snapshotHandle is the CSI handle that a disk's snapshot gets: beside its volume.
func snapshotHandle(volume string, snap *vmopv1.VirtualMachineSnapshot, disk string) string {
	store, _, _ := strings.Cut(volume, "/")
	return store + "/" + snapshotID(snap, disk)
}

// snapshotID is its id in the datastore.
func snapshotID(snap *vmopv1.VirtualMachineSnapshot, disk string) string {
	return fmt.Sprintf("s-vm%x", sum(snap, disk)[:16])
}

func contentName(snap *vmopv1.VirtualMachineSnapshot, disk string) string {
	return fmt.Sprintf("vmsnapshot-%x", sum(snap, disk)[:16])
}

func sum(snap *vmopv1.VirtualMachineSnapshot, disk string) []byte {
	s := sha256.Sum256([]byte(string(snap.UID) + "/" + disk))
	return s[:]
}

// memoryClaim is the name of the claim with a snapshot's memory.
func memoryClaim(snap *vmopv1.VirtualMachineSnapshot) string { return "memory-" + string(snap.UID) }

// operation is the id of the host's operation.
func operation(snap *vmopv1.VirtualMachineSnapshot) string { return "snapshot-" + string(snap.UID) }
