package virtualmachine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachine/power"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
)

// view is what is known about one VirtualMachine in one look at it.
type view struct {
	vm *vmopv1.VirtualMachine

	pod     *corev1.Pod       // nil when there is none
	machine machinev1.Machine // what the pod's machine was told last
	state   machinev1.State   // how it is

	size size.Size
	// policyUnused names fields of the resource policy that change nothing.
	policyUnused []string
	sized        bool
	class        string // the class instance in use
	resized      string // why another is not, for a condition
	image        *vmopv1.VirtualMachineImageStatus
	imageRef     string // annotation of claims: Kind/NAME
	seed         *Seed
	nics         []machinev1.NIC
	networks     map[string]string // network of each interface by name, for NetworkInterfaces
	boot         *corev1.PersistentVolumeClaim
	slot         placement.Slot
	disks        []machinev1.Disk
	claims       []*corev1.PersistentVolumeClaim // all that the machine has, of spec.volumes and drives
	awaiting     []string
	reach        []*corev1.NodeSelector
	volumeState  []vmopv1.VirtualMachineVolumeStatus
	reverting    Revert

	// missing are why the machine cannot be started.
	missing []string
	pending []string // what waits for a power cycle
	stop    bool     // no further step makes sense
	// incomplete: a step has failed, so that it is not known what the machine should be. Then it is neither started nor
	// changed, and nothing of it is detached.
	incomplete bool
	// unheard: how the machine has ended is not known yet, so that what was known last stays.
	unheard bool
	again   time.Duration
}

// node is where the machine runs, empty when that is not decided.
func (v *view) node() string {
	if v.pod == nil || running.Ended(v.pod) {
		return ""
	}
	return v.pod.Spec.NodeName
}

// alive tells that there is a machine that runs, or may.
func (v *view) alive() bool {
	return v.pod != nil && v.pod.DeletionTimestamp == nil && !running.Ended(v.pod)
}

// begun tells that the machine was begun on its host, whatever came of it.
func (v *view) begun() bool {
	return v.state.Revision > 0 || slices.ContainsFunc(v.pod.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.State.Terminated != nil })
}

// live is how the machine is that runs, the zero State of none.
func (v *view) live() machinev1.State {
	if !v.alive() {
		return machinev1.State{}
	}
	return v.state
}

// look finds the pod.
func (r *Reconciler) look(ctx context.Context, v *view) error {
	var err error
	v.pod, err = running.Pod(ctx, r.Client, v.vm)
	if errors.Is(err, running.ErrForeign) {
		v.lacks(vmopv1.VirtualMachineConditionPlacementReady, reasonNotReady, "%v", err)
		v.soon(lookAgain)
		return nil
	}
	if err != nil {
		v.stop = true
		return err
	}
	if v.pod == nil {
		return nil
	}
	if v.machine, err = running.Machine(v.pod); err != nil {
		v.stop = true
		return err
	}
	v.state = running.State(v.pod)
	return nil
}

// told is what the machine was told of a disk, if that is still the same disk.
func (v *view) told(name string, same func(machinev1.Disk) bool) (machinev1.Disk, bool) {
	if v.pod == nil {
		return machinev1.Disk{}, false
	}
	at := slices.IndexFunc(v.machine.Disks, func(d machinev1.Disk) bool { return d.Name == name && d.Volume != "" && same(d) })
	if at < 0 {
		return machinev1.Disk{}, false
	}
	return v.machine.Disks[at], true
}

// lacks says that something is missing: in a condition, and for the start.
func (v *view) lacks(conditionType, reason, format string, args ...any) {
	condition.False(&v.vm.Status.Conditions, conditionType, reason, format, args...)
	v.missing = append(v.missing, fmt.Sprintf(format, args...))
}

// soon has the VirtualMachine looked at again after d at the latest.
func (v *view) soon(d time.Duration) {
	if v.again == 0 || d < v.again {
		v.again = d
	}
}

// why is all that keeps the machine from being started, in one sentence.
func (v *view) why() string {
	list := slices.Clone(v.missing)
	return strings.Join(slices.Compact(list), "; ")
}

// phase is that of the view's pod.
func (v *view) phase() power.PodPhase {
	switch {
	case v.pod == nil:
		return power.PodNone
	case v.pod.DeletionTimestamp != nil:
		return power.PodStopping
	case running.Ended(v.pod):
		return power.PodEnded
	}
	return power.PodAlive
}
