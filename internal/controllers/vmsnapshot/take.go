package vmsnapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

// purpose is what the claim with the memory is attached for.
const purpose = "snapshot"

// Bounds of how long file systems may stand still.
const (
	quiesceDefault = 30 * time.Second
	quiesceLongest = 5 * time.Minute
)

// take does the next step towards a snapshot.
func (r *Reconciler) take(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan) (time.Duration, error) {
	if err := r.claim(ctx, snap, vm); err != nil {
		return 0, err
	}
	if p == nil {
		why, err := r.turn(ctx, snap, vm)
		if err != nil {
			return 0, err
		}
		if why != "" {
			waiting(snap, "%s", why)
			return lookEvery, nil
		}
		if p, err = r.decide(ctx, snap, vm); err != nil {
			if errors.Is(err, errBetween) {
				waiting(snap, "%s", err)
				return lookEvery, nil
			}
			return 0, err
		}
		if err := r.keep(ctx, snap, p); err != nil {
			return 0, err
		}
	}
	if p.Pod != "" {
		return r.takeRunning(ctx, snap, vm, p)
	}
	return r.takeOff(ctx, snap, vm, p)
}

// turn tells what has to be over before a snapshot is begun.
func (r *Reconciler) turn(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) (string, error) {
	if vm.DeletionTimestamp != nil {
		return "the virtual machine is being deleted", nil
	}
	if !condition.IsTrue(vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated) {
		return "the virtual machine has not been made yet; see its conditions", nil
	}
	if vm.Spec.CurrentSnapshotName != "" {
		return fmt.Sprintf("the virtual machine is being taken back to snapshot %s", vm.Spec.CurrentSnapshotName), nil
	}
	all, err := r.of(ctx, snap.Namespace, snap.Spec.VMName)
	if err != nil {
		return "", err
	}
	for _, other := range all {
		if other.UID == snap.UID || taken(other) || failed(other) || other.DeletionTimestamp != nil {
			continue
		}
		if planOf(other) != nil || before(other, snap) < 0 {
			return fmt.Sprintf("snapshot %s of the virtual machine comes first", other.Name), nil
		}
	}
	return "", nil
}

// takeRunning has the host take the snapshot.
func (r *Reconciler) takeRunning(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan) (time.Duration, error) {
	pod, err := running.Pod(ctx, r.Client, vm)
	if err != nil {
		return 0, err
	}
	if pod == nil || string(pod.UID) != p.Pod || running.Ended(pod) || pod.DeletionTimestamp != nil {
		// What the host may have begun is made visible, so that it is deleted with this object.
		if err := r.publish(ctx, snap, p); err != nil {
			return 0, err
		}
		return 0, impossible("the virtual machine has stopped while the snapshot was being taken")
	}
	result := running.Result(pod, operation(snap))
	if result == nil {
		op := machinev1.Operation{ID: operation(snap), Kind: machinev1.Snapshot, Snapshots: map[string]string{}}
		for _, d := range p.Disks {
			op.Snapshots[d.Name] = snapshotID(snap, d.Name)
		}
		if q := snap.Spec.Quiesce; q != nil {
			op.Quiesce, op.QuiesceSeconds = true, int(quiesceDefault.Seconds())
			if q.Timeout != nil {
				op.QuiesceSeconds = int(min(max(q.Timeout.Duration, time.Second), quiesceLongest).Seconds())
			}
		}
		if p.Memory != "" {
			handle, err := r.memory(ctx, snap, vm, p, pod.Spec.NodeName)
			if err != nil || handle == "" {
				return lookEvery, err
			}
			op.Memory = &machinev1.MemoryState{Volume: handle}
		}
		progressing(snap, "the host is asked to take it")
		if err := running.Request(ctx, r.Client, pod, op); err != nil && !errors.Is(err, running.ErrNotRunning) {
			return 0, err
		}
		return lookEvery, nil
	}
	if !result.Done {
		progressing(snap, "%d%% are done", result.Percent)
		return lookEvery, nil
	}
	if err := r.publish(ctx, snap, p); err != nil {
		return 0, err
	}
	// The host keeps the result until advance has read back that the snapshot is taken.
	if result.Error != "" {
		return 0, impossible("the host could not take it: %s", clean(result.Error))
	}
	snap.Status.Quiesced = result.Quiesced
	snap.Status.PowerState = vmopv1.VirtualMachinePowerStateOff
	if p.Memory != "" {
		snap.Status.PowerState = vmopv1.VirtualMachinePowerStateOn
		snap.Status.Storage = &vmopv1.VirtualMachineSnapshotStorageStatus{Used: resource.NewQuantity(result.Bytes, resource.BinarySI)}
	}
	r.Events.Eventf(snap, vm, corev1.EventTypeNormal, "SnapshotTaken", "Take", "the guest stood still for %d ms", result.PauseMillis)
	return 0, r.created(ctx, snap, vm, p)
}

// memory makes the claim for the memory and attaches it where the machine runs. The handle is empty until that is done.
func (r *Reconciler) memory(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan, node string) (string, error) {
	claim, err := r.memoryClaim(ctx, snap, vm, p, nil)
	if err != nil || claim == nil {
		return "", err
	}
	handle, err := attachment.Attach(ctx, r.Client, vm, claim, node, purpose)
	if err != nil {
		text, retry := attachment.Text(err)
		if retry {
			return "", err
		}
		progressing(snap, "its memory has no place yet: %s", text)
		return "", nil
	}
	return handle, nil
}

// memoryClaim makes the claim for the memory, empty or as a copy of another. It is nil when it is refused, which a
// condition says.
func (r *Reconciler) memoryClaim(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan, of *string) (*corev1.PersistentVolumeClaim, error) {
	claim := &corev1.PersistentVolumeClaim{}
	err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: p.Memory}, claim)
	if err == nil && claim.DeletionTimestamp == nil {
		return claim, nil
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("reading PersistentVolumeClaim %s: %w", p.Memory, err)
	}
	claim = &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: snap.Namespace, Name: p.Memory, Labels: map[string]string{vmopv1.VMNameForSnapshotLabel: vm.Name}},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			VolumeMode:  new(corev1.PersistentVolumeBlock),
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(p.MemoryBytes, resource.BinarySI)}},
		},
	}
	if class := p.Spec.StorageClass; class != "" {
		claim.Spec.StorageClassName = &class
	}
	if of != nil {
		claim.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: *of}
	}
	if err := controllerutil.SetControllerReference(snap, claim, r.Scheme()); err != nil {
		return nil, fmt.Errorf("owning PersistentVolumeClaim %s: %w", p.Memory, err)
	}
	err = r.Create(ctx, claim)
	switch {
	case apierrors.IsForbidden(err) || apierrors.IsInvalid(err):
		progressing(snap, "there is no place for its memory: %s", err)
		return nil, nil
	case err != nil && !apierrors.IsAlreadyExists(err):
		return nil, fmt.Errorf("making PersistentVolumeClaim %s: %w", p.Memory, err)
	}
	return claim, nil
}

// takeOff takes the snapshot of a machine that is off: disk by disk, while the machine is held off.
func (r *Reconciler) takeOff(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan) (time.Duration, error) {
	if err := r.hold(ctx, vm, snap, true); err != nil {
		return 0, err
	}
	pod, err := running.Pod(ctx, r.Client, vm)
	if err != nil {
		return 0, err
	}
	if pod != nil {
		return 0, impossible("the virtual machine was powered on while the snapshot was being taken")
	}
	progressing(snap, "snapshots of %d disks are being taken", len(p.Disks))
	done := 0
	for _, d := range p.Disks {
		object, err := r.volumeSnapshot(ctx, snap, d, snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: new(d.Claim)})
		if err != nil {
			return 0, err
		}
		if object.Status != nil && object.Status.Error != nil && object.Status.Error.Message != nil {
			progressing(snap, "the snapshot of disk %s: %s", d.Name, *object.Status.Error.Message)
		}
		if object.Status != nil && object.Status.CreationTime != nil {
			done++
		}
	}
	if p.Memory != "" {
		// The claim must be there before the machine may go on, and is bound later: it is a copy of what does not change.
		saved := virtualmachine.MemoryClaim(vm)
		claim, err := r.memoryClaim(ctx, snap, vm, p, &saved)
		if err != nil || claim == nil {
			return lookEvery, err
		}
		if claim.Spec.VolumeName == "" {
			if _, err := attachment.Volume(ctx, r.Client, claim, r.anyNode(ctx, p)); err != nil {
				if text, retry := attachment.Text(err); retry {
					return 0, err
				} else if done == len(p.Disks) {
					progressing(snap, "%s", text)
				}
			}
			return lookEvery, nil
		}
	}
	if done < len(p.Disks) {
		return lookEvery, nil
	}
	if err := r.hold(ctx, vm, snap, false); err != nil {
		return 0, err
	}
	snap.Status.PowerState = p.Power
	return 0, r.created(ctx, snap, vm, p)
}

// anyNode is a node on which the first disk can be had: its copy of the memory is to be there, too.
func (r *Reconciler) anyNode(ctx context.Context, p *plan) string {
	var nodes corev1.NodeList
	pv := &corev1.PersistentVolume{}
	if r.List(ctx, &nodes) != nil || len(nodes.Items) == 0 || r.Get(ctx, client.ObjectKey{Name: p.Disks[0].Volume}, pv) != nil {
		return ""
	}
	for _, n := range nodes.Items {
		if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil || matches(pv.Spec.NodeAffinity.Required, &n) {
			return n.Name
		}
	}
	return ""
}

// matches tells whether a node has the labels that one of the terms asks for.
func matches(s *corev1.NodeSelector, n *corev1.Node) bool {
	return slices.ContainsFunc(s.NodeSelectorTerms, func(t corev1.NodeSelectorTerm) bool {
		return !slices.ContainsFunc(t.MatchExpressions, func(e corev1.NodeSelectorRequirement) bool {
			return e.Operator == corev1.NodeSelectorOpIn && !slices.Contains(e.Values, n.Labels[e.Key])
		})
	})
}

// created says that the snapshot is there, and makes it the one that the machine is at.
func (r *Reconciler) created(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine, p *plan) error {
	if err := r.detach(ctx, snap, vm); err != nil {
		return err
	}
	base := vm.DeepCopy()
	vm.Status.CurrentSnapshot = &vmopv1.VirtualMachineSnapshotReference{Type: vmopv1.VirtualMachineSnapshotReferenceTypeManaged, Name: snap.Name}
	if err := r.Status().Patch(ctx, vm, client.MergeFrom(base)); err != nil {
		return fmt.Errorf("making it the current snapshot: %w", err)
	}
	snap.Status.UniqueID = operation(snap)
	storage := snap.Status.Storage
	if storage == nil {
		storage = &vmopv1.VirtualMachineSnapshotStorageStatus{}
	}
	storage.Requested = requested(p)
	snap.Status.Storage = storage
	condition.True(&snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition)
	return nil
}

// requested adds up what the snapshot may take, by storage class.
func requested(p *plan) []vmopv1.VirtualMachineSnapshotStorageStatusRequested {
	totals, order := map[string]int64{}, []string{}
	add := func(class string, bytes int64) {
		if _, ok := totals[class]; !ok {
			order = append(order, class)
		}
		totals[class] += bytes
	}
	for _, d := range p.Disks {
		add(d.Class, d.Bytes)
	}
	if p.MemoryBytes > 0 {
		add(p.Spec.StorageClass, p.MemoryBytes)
	}
	slices.Sort(order)
	var out []vmopv1.VirtualMachineSnapshotStorageStatusRequested
	for _, class := range order {
		out = append(out, vmopv1.VirtualMachineSnapshotStorageStatusRequested{StorageClass: class, Total: resource.NewQuantity(totals[class], resource.BinarySI)})
	}
	return out
}

// detach ends the attachment of the memory's claim.
func (r *Reconciler) detach(ctx context.Context, snap *vmopv1.VirtualMachineSnapshot, vm *vmopv1.VirtualMachine) error {
	claim := &corev1.PersistentVolumeClaim{}
	err := r.Get(ctx, client.ObjectKey{Namespace: snap.Namespace, Name: memoryClaim(snap)}, claim)
	if err != nil {
		return client.IgnoreNotFound(err)
	}
	attachments, err := attachment.List(ctx, r.Client, vm)
	if err != nil {
		return err
	}
	for i := range attachments {
		if attachments[i].Labels[attachment.ClaimLabel] == string(claim.UID) && attachments[i].Labels[attachment.PurposeLabel] == purpose {
			if err := attachment.Detach(ctx, r.Client, &attachments[i]); err != nil {
				return err
			}
		}
	}
	return nil
}
