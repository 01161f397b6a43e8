package virtualmachine

import (
	"context"
	"fmt"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/fields"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/netstatus"
	"atoll.dev/atoll/internal/controllers/virtualmachine/power"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
)

const (
	// hardwareVersion is VMware's number for hardware of about the age of ours.
	hardwareVersion = 21
	// FieldsCondition names fields of the spec that have no effect.
	FieldsCondition = fields.Condition
	// MemoryCondition is False when there may be too little memory to boot.
	MemoryCondition = "atoll.dev/EnoughMemory"
	// computeSynced is a type of VM Operator without a constant in its API.
	computeSynced = "VirtualMachineComputeConfigSynced"
	// readyCondition follows the readiness probe.
	readyCondition = "Ready"
)

// status writes down how the machine is.
func (r *Reconciler) status(ctx context.Context, v *view) error {
	s := &v.vm.Status
	s.UniqueID = "vm-" + strings.ReplaceAll(string(v.vm.UID), "-", "")[:min(12, len(strings.ReplaceAll(string(v.vm.UID), "-", "")))]
	s.BiosUUID, s.InstanceUUID = v.vm.Spec.BiosUUID, v.vm.Spec.InstanceUUID
	s.HardwareVersion = max(hardwareVersion, v.vm.Spec.MinHardwareVersion)
	saved, err := r.memoryClaim(ctx, v.vm)
	if err != nil {
		return err
	}
	suspended := saved != nil && saved.Annotations[memoryAnnotation] == memorySaved
	if !v.unheard {
		s.PowerState = v.powerState(suspended)
	}
	if err := r.where(ctx, v); err != nil {
		return err
	}
	s.Network = netstatus.Of(v.vm, v.nics, v.live())
	s.Volumes = v.volumeState
	if len(s.Volumes) == 0 {
		s.Volumes = nil
	}
	v.storageStatus()
	v.hardwareStatus()
	v.guestStatus()
	v.crypto()
	v.powerCondition()
	v.placementCondition()
	v.readiness()
	v.pendingCondition()
	v.enoughMemory()
	if left := health.Set(health.Inputs{VM: v.vm, Pod: v.pod, Machine: v.machine, State: v.state, Now: r.Clock.Now()}); left > 0 {
		v.soon(left)
	}
	v.withoutEffect()
	condition.True(&s.Conditions, vmopv1.VirtualMachineReconcileReady)
	return nil
}

// powerState is what the machine really is.
func (v *view) powerState(suspended bool) vmopv1.VirtualMachinePowerState {
	saved := v.pod != nil && v.state.End.Reason == machinev1.EndSuspended
	switch {
	case v.pod != nil && v.phase() != power.PodEnded && (v.state.Phase == machinev1.Running || v.state.Phase == machinev1.Paused),
		saved && v.phase() == power.PodAlive: // until its pod has ended, too
		return vmopv1.VirtualMachinePowerStateOn
	case suspended, saved, v.alive() && v.machine.Restore != nil && v.state.Started == "":
		return vmopv1.VirtualMachinePowerStateSuspended
	}
	return vmopv1.VirtualMachinePowerStateOff
}

// where sets the node and its zone.
func (r *Reconciler) where(ctx context.Context, v *view) error {
	v.vm.Status.NodeName = v.node()
	if v.vm.Status.NodeName == "" {
		return nil // the zone stays: its disks are there
	}
	node := &corev1.Node{}
	err := r.Get(ctx, client.ObjectKey{Name: v.vm.Status.NodeName}, node)
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("reading Node %s: %w", v.vm.Status.NodeName, err)
	}
	if err == nil {
		v.vm.Status.Zone = node.Labels[corev1.LabelTopologyZone]
	}
	return nil
}

// storageStatus adds up the disks.
func (v *view) storageStatus() {
	var disks, total resource.Quantity
	for _, vol := range v.vm.Status.Volumes {
		if vol.Requested == nil {
			continue
		}
		total.Add(*vol.Requested)
		if vol.Type == vmopv1.VolumeTypeClassic {
			disks.Add(*vol.Requested)
		}
	}
	if total.IsZero() {
		v.vm.Status.Storage = nil
		return
	}
	v.vm.Status.Storage = &vmopv1.VirtualMachineStorageStatus{
		Total:     &total,
		Requested: &vmopv1.VirtualMachineStorageStatusRequested{Disks: &disks},
	}
}

// hardwareStatus says what the machine has, or will have.
func (v *view) hardwareStatus() {
	if !v.sized {
		return
	}
	cpus, memory := v.size.CPUs, v.size.Memory
	if v.alive() && v.state.CPUs > 0 && v.state.Memory > 0 {
		cpus, memory = v.state.CPUs, v.state.Memory
	}
	h := &vmopv1.VirtualMachineHardwareStatus{
		CPU:    &vmopv1.VirtualMachineCPUAllocationStatus{Total: int32(cpus), Reservation: v.size.ReservedMHz},
		Memory: &vmopv1.VirtualMachineMemoryAllocationStatus{Total: resource.NewQuantity(memory, resource.BinarySI)},
	}
	if v.size.ReservedMemory > 0 {
		h.Memory.Reservation = resource.NewQuantity(v.size.ReservedMemory, resource.BinarySI)
	}
	disks := v.machine.Disks
	if v.pod == nil {
		disks = v.disks
	}
	h.Controllers = machine.Controllers(disks)
	v.vm.Status.Hardware = h
}

// guestStatus says what the guest agent knows.
func (v *view) guestStatus() {
	s := &v.vm.Status
	g := v.state.Guest
	s.Guest = nil
	if v.vm.Spec.GuestID != "" || g != nil && g.OSName != "" {
		s.Guest = &vmopv1.VirtualMachineGuestStatus{GuestID: v.vm.Spec.GuestID}
		if g != nil {
			s.Guest.GuestFullName = health.Clean(g.OSName)
		}
	}
	switch {
	case !v.alive() || v.state.Phase != machinev1.Running:
		condition.False(&s.Conditions, vmopv1.VirtualMachineToolsCondition, vmopv1.VirtualMachineToolsNotRunningReason, "the machine is not running")
	case g == nil:
		condition.Unknown(&s.Conditions, vmopv1.VirtualMachineToolsCondition, "Unknown", "the guest agent has not answered yet: install qemu-guest-agent in the guest if it has none")
	case !g.Agent:
		condition.False(&s.Conditions, vmopv1.VirtualMachineToolsCondition, vmopv1.VirtualMachineToolsNotRunningReason, "the guest agent does not answer any more")
	default:
		condition.True(&s.Conditions, vmopv1.VirtualMachineToolsCondition)
	}
	if g == nil || g.CloudInit == "" {
		return
	}
	switch g.CloudInit {
	case "done":
		condition.True(&s.Conditions, vmopv1.GuestBootstrapCondition)
	case "error":
		condition.False(&s.Conditions, vmopv1.GuestBootstrapCondition, "CloudInitFailed", "cloud-init has failed in the guest: %s", health.Clean(g.Detail))
	default:
		condition.Unknown(&s.Conditions, vmopv1.GuestBootstrapCondition, "CloudInitRunning", "cloud-init is still at work in the guest")
	}
}

func (v *view) crypto() {
	c := v.vm.Spec.Crypto
	v.vm.Status.Crypto = nil
	if !v.machine.Firmware.TPM && (c == nil || c.EncryptionClassName == "") {
		return
	}
	s := &vmopv1.VirtualMachineCryptoStatus{HasVTPM: v.machine.Firmware.TPM}
	if c != nil && c.EncryptionClassName != "" && v.boot != nil {
		s.Encrypted = []vmopv1.VirtualMachineEncryptionType{vmopv1.VirtualMachineEncryptionTypeDisks}
		condition.True(&v.vm.Status.Conditions, vmopv1.VirtualMachineEncryptionSynced)
	}
	v.vm.Status.Crypto = s
}

// powerCondition says whether the machine is as it should be, and why not.
func (v *view) powerCondition() {
	list, want := &v.vm.Status.Conditions, v.vm.Spec.PowerState
	if want == "" || v.vm.Status.PowerState == want {
		condition.True(list, vmopv1.VirtualMachinePowerStateSynced)
		return
	}
	why := v.why()
	switch {
	case v.phase() == power.PodStopping && v.pod.Spec.NodeName != "":
		why = fmt.Sprintf("node %s is ending the machine (%s); if the guest does not react, set spec.powerOffMode to Hard", v.pod.Spec.NodeName, v.machine.Stop.Mode)
	case why == "" && v.state.Phase == machinev1.Starting && v.state.Message != "":
		why = strings.TrimSuffix(health.Clean(v.state.Message)+": "+v.volumeProblem(), ": ")
	case why == "" && v.alive() && v.volumeProblem() != "":
		why = v.volumeProblem()
	case why == "" && v.alive():
		why = "it is being started"
		if want != vmopv1.VirtualMachinePowerStateOn {
			why = "it is being ended"
		}
		if v.pod.Spec.NodeName == "" {
			why = "its pod has no node yet"
		}
	case why == "":
		why = "it is not yet"
	}
	condition.False(list, vmopv1.VirtualMachinePowerStateSynced, "NotSynced", "it is to be %s: %s", want, why)
}

// volumeProblem is the first volume that cannot be had, and why.
func (v *view) volumeProblem() string {
	for _, s := range v.volumeState {
		if s.Error != "" {
			return fmt.Sprintf("volume %s: %s", s.Name, s.Error)
		}
	}
	return ""
}

// placementCondition says whether there is a node for the machine.
func (v *view) placementCondition() {
	list := &v.vm.Status.Conditions
	if v.pod == nil {
		return // said where it failed, or as it was
	}
	if v.pod.Spec.NodeName != "" {
		condition.True(list, vmopv1.VirtualMachineConditionPlacementReady)
		return
	}
	for _, c := range v.pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			condition.False(list, vmopv1.VirtualMachineConditionPlacementReady, reasonNotReady, "no node can run it (%s): %s", c.Reason, c.Message)
			return
		}
	}
	condition.Unknown(list, vmopv1.VirtualMachineConditionPlacementReady, reasonNotReady, "a node is being looked for")
}

// readiness follows the probe of the pod.
func (v *view) readiness() {
	list := &v.vm.Status.Conditions
	if v.vm.Spec.ReadinessProbe == nil {
		condition.Remove(list, readyCondition)
		return
	}
	if !v.alive() {
		condition.False(list, readyCondition, reasonNotReady, "the machine is not running")
		return
	}
	for _, c := range v.pod.Status.Conditions {
		switch {
		case c.Type != corev1.ContainersReady:
		case c.Status == corev1.ConditionTrue:
			condition.True(list, readyCondition)
			return
		default:
			condition.False(list, readyCondition, reasonNotReady, "the readiness probe has not succeeded: %s", c.Message)
			return
		}
	}
	condition.Unknown(list, readyCondition, "Unknown", "the readiness probe has not run yet")
}

// pendingCondition names what waits for a power cycle.
func (v *view) pendingCondition() {
	list := &v.vm.Status.Conditions
	pending := v.pending
	if v.alive() {
		for _, p := range v.state.Pending {
			pending = append(pending, health.Clean(p))
		}
	}
	switch {
	case len(pending) > 0:
		text := strings.Join(pending, "; ")
		condition.False(list, computeSynced, "PowerCyclePending", "power the machine off and on for: %s", text)
		if v.resized == "" {
			condition.False(list, vmopv1.VirtualMachineClassConfigurationSynced, "PowerCyclePending", "power the machine off and on for: %s", text)
		}
	case v.sized:
		condition.True(list, computeSynced)
	}
}

// enoughMemory warns of a machine that is likely not to boot.
func (v *view) enoughMemory() {
	if why := size.TooLittle(v.size, v.build(nil).Firmware.Type == machinev1.EFI); v.sized && why != "" {
		condition.False(&v.vm.Status.Conditions, MemoryCondition, "FirmwareEFI", "%s", why)
	} else {
		condition.Remove(&v.vm.Status.Conditions, MemoryCondition)
	}
}

// withoutEffect names fields that are set and change nothing.
func (v *view) withoutEffect() {
	list := &v.vm.Status.Conditions
	set := slices.Concat(fields.WithoutEffect(v.vm), v.size.Unused, v.policyUnused)
	for i, n := range v.nics {
		if s := v.vm.Spec.Network; n.Pod && s != nil && i < len(s.Interfaces) {
			for name, is := range map[string]bool{"addresses": len(s.Interfaces[i].Addresses) > 0, "gateway4": s.Interfaces[i].Gateway4 != "", "gateway6": s.Interfaces[i].Gateway6 != ""} {
				if is {
					set = append(set, fmt.Sprintf("spec.network.interfaces[%d].%s (the pod network assigns it)", i, name))
				}
			}
		}
	}
	if len(set) == 0 {
		condition.Remove(list, FieldsCondition)
		return
	}
	condition.False(list, FieldsCondition, fields.Reason, "%s", strings.Join(slices.Compact(slices.Sorted(slices.Values(set))), ", "))
	for i := range *list {
		if c := &(*list)[i]; c.Type == FieldsCondition {
			c.Status = "True"
		}
	}
}
