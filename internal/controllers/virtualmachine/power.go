package virtualmachine

import (
	"context"
	"fmt"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/pod"
	"atoll.dev/atoll/internal/controllers/virtualmachine/power"
	"atoll.dev/atoll/internal/controllers/virtualmachine/running"
)

const (
	// hardGrace is the grace of a machine whose power is cut. With 0 the pod would be gone before its machine is.
	hardGrace = 1
	// hearEnd is how long a pod that has ended is kept for its host to say how the machine has.
	hearEnd = 2 * time.Minute
)

// power does the next step towards the power state that is asked for.
func (r *Reconciler) power(ctx context.Context, v *view) error {
	s, err := r.situation(ctx, v)
	if err != nil {
		return err
	}
	if v.unheard = s.Unheard; s.Unheard {
		return nil // nor is anything done about memory that it was to go on from
	}
	if err := r.memory(ctx, v); err != nil {
		return err
	}
	switch power.Next(s) {
	case power.Start:
		if v.incomplete {
			return nil
		}
		return r.start(ctx, v)
	case power.Change:
		if err := r.unsuspend(ctx, v); err != nil || v.incomplete {
			return err
		}
		return r.change(ctx, v)
	case power.Stop:
		r.restarts.Forget(v.vm.UID)
		how := machine.Stop(v.vm)
		if s.Off {
			how = machinev1.Stop{Mode: machinev1.Hard}
		}
		return r.stop(ctx, v, how)
	case power.Remove:
		return r.remove(ctx, v)
	case power.Suspend:
		return r.suspend(ctx, v)
	case power.Discard:
		return r.discard(ctx, v)
	case power.Refuse:
		v.missing = append(v.missing, "a virtual machine that is powered off cannot be suspended: set spec.powerState to PoweredOn first")
	case power.Rest:
		if s.Pod == power.PodStopping {
			return r.hurry(ctx, v)
		}
	}
	return nil
}

// situation gathers what decides.
func (r *Reconciler) situation(ctx context.Context, v *view) (power.Situation, error) {
	vm := v.vm
	s := power.Situation{
		Want: vm.Spec.PowerState, Pod: v.phase(), End: v.state.End.Reason,
		Off: v.reverting.PowerOff, Busy: v.reverting.Busy,
	}
	if s.Want == "" {
		s.Want = vmopv1.VirtualMachinePowerStateOn
	}
	for key, value := range vm.Annotations {
		if rest, ok := strings.CutPrefix(key, vmopv1.CheckAnnotationPowerOn+"/"); ok && s.Pod == power.PodNone && s.Want == vmopv1.VirtualMachinePowerStateOn {
			v.missing = append(v.missing, fmt.Sprintf("annotation %s of component %s holds the start back (%s)", key, rest, value))
		}
	}
	s.Blocked = len(v.missing) > 0 || !v.sized
	if s.Pod == power.PodNone {
		attachments, err := attachment.List(ctx, r.Client, vm)
		if err != nil {
			return s, err
		}
		if s.Attached = len(attachments) > 0; s.Attached && s.Want == vmopv1.VirtualMachinePowerStateOn {
			v.missing = append(v.missing, fmt.Sprintf("node %s has not let go of all volumes yet", attachments[0].Spec.NodeName))
		}
		claim, err := r.memoryClaim(ctx, vm)
		if err != nil {
			return s, err
		}
		s.Saved = claim != nil && claim.Annotations[memoryAnnotation] == memorySaved
	}
	if s.Pod == power.PodEnded && v.begun() && v.state.Phase != machinev1.Ended {
		// The kubelet was faster than the host. Memory may be saved.
		if left := hearEnd - r.restarts.Waited(v.pod.UID, 0, r.Clock.Now()); left > 0 {
			s.Unheard = true
			v.soon(left)
			v.missing = append(v.missing, fmt.Sprintf("it has ended, and node %s has not said yet how", v.pod.Spec.NodeName))
			return s, nil
		}
	}
	if s.Pod == power.PodEnded && s.End != machinev1.EndSuspended && s.End != machinev1.EndStopped {
		if left := r.restarts.Pause(vm.UID, v.pod.UID, v.pod.CreationTimestamp.Time, health.EndedAt(v.pod, v.state, r.Clock.Now()), r.Clock.Now()); left > 0 {
			s.Pausing = true
			v.soon(left)
			v.missing = append(v.missing, fmt.Sprintf("it has ended (%s), and is started again at %s", health.WhyEnded(v.pod, v.state), r.Clock.Now().Add(left).UTC().Format(time.TimeOnly)))
		}
	}
	return s, nil
}

// build makes the Machine as it should be now.
func (v *view) build(restore *machinev1.MemoryState) machinev1.Machine {
	in := machine.Inputs{VM: v.vm, Size: v.size, Disks: v.disks, Awaiting: v.awaiting, NICs: v.nics, Restore: restore}
	if v.image != nil {
		in.Firmware = v.image.Firmware
	}
	if v.seed != nil {
		in.SeedLabel = v.seed.Label
	}
	return machine.Build(in)
}

// start makes the pod.
func (r *Reconciler) start(ctx context.Context, v *view) error {
	vm := v.vm
	restore, reach, err := r.restore(ctx, v)
	if err != nil || len(v.missing) > 0 {
		return err
	}
	secret, err := r.seedSecret(ctx, v)
	if err != nil || len(v.missing) > 0 {
		return err
	}
	in := pod.Inputs{VM: vm, Machine: v.build(restore), Size: v.size, SeedSecret: secret, Reach: append(v.reach, reach...)}
	if restore != nil {
		in.Machine.Awaiting = append(in.Machine.Awaiting, awaitMemory)
	}
	if v.boot != nil {
		in.BootClaim = v.boot.Name
	}
	p, err := pod.Build(in)
	if err != nil {
		v.lacks(vmopv1.VirtualMachineConditionPlacementReady, reasonInvalid, "%v", err)
		return nil
	}
	err = r.Create(ctx, p)
	switch {
	case apierrors.IsAlreadyExists(err):
		return r.nameTaken(ctx, v)
	case apierrors.IsForbidden(err) || apierrors.IsInvalid(err):
		v.lacks(vmopv1.VirtualMachineConditionPlacementReady, reasonNotReady, "the pod cannot be made: %v", err)
		v.soon(retryMost)
		return nil
	case err != nil:
		return fmt.Errorf("making the pod: %w", err)
	}
	v.pod, v.machine, v.state = p, in.Machine, machinev1.State{}
	r.event(vm, normal, "PoweringOn", "PowerOn", "pod %s was made", p.Name)
	return nil
}

// nameTaken finds out whose the pod of our name is.
func (r *Reconciler) nameTaken(ctx context.Context, v *view) error {
	p := &corev1.Pod{}
	if err := r.Live.Get(ctx, client.ObjectKeyFromObject(v.vm), p); err != nil {
		return client.IgnoreNotFound(err)
	}
	v.soon(lookAgain)
	if metav1.IsControlledBy(p, v.vm) {
		v.soon(retryFirst) // not in the cache yet
		return nil
	}
	v.lacks(vmopv1.VirtualMachineConditionPlacementReady, reasonNotReady,
		"there is another pod called %s in namespace %s: delete that pod, or give the virtual machine another name", p.Name, p.Namespace)
	return nil
}

// stop has the machine end. First it is told how, since the deletion of a pod says only that.
func (r *Reconciler) stop(ctx context.Context, v *view, how machinev1.Stop) error {
	if v.machine.Stop != how {
		m := v.machine
		m.Stop = how
		m.Revision++
		if err := running.Write(ctx, r.Client, v.pod, m); err != nil {
			return err
		}
		v.machine = m
		if how.Mode != machinev1.Hard && v.state.Revision > 0 {
			v.soon(time.Second)
			return nil
		}
	}
	if how.Mode != machinev1.Hard && v.state.Revision > 0 && v.state.Applied < v.machine.Revision && v.pod.DeletionTimestamp == nil &&
		r.restarts.Waited(v.pod.UID, v.machine.Revision, r.Clock.Now()) < lookAgain {
		v.soon(time.Second) // the host has not taken it up yet
		return nil
	}
	return r.deletePod(ctx, v, how)
}

func (r *Reconciler) deletePod(ctx context.Context, v *view, how machinev1.Stop) error {
	grace := pod.Grace(how)
	if how.Mode == machinev1.Hard {
		grace = hardGrace
	}
	if err := r.deleteSeed(ctx, v.pod); err != nil {
		return err
	}
	err := r.Delete(ctx, v.pod, client.GracePeriodSeconds(grace), client.Preconditions{UID: &v.pod.UID})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting the pod: %w", err)
	}
	r.event(v.vm, normal, "PoweringOff", "PowerOff", "pod %s is deleted (%s)", v.pod.Name, how.Mode)
	return nil
}

// hurry shortens a stop that is under way, when the mode has become a harder one.
func (r *Reconciler) hurry(ctx context.Context, v *view) error {
	how := machine.Stop(v.vm)
	going, err := r.namespaceGoing(ctx, v.vm.Namespace)
	if err != nil {
		return err
	}
	if v.vm.DeletionTimestamp != nil || v.reverting.PowerOff || going {
		how = machinev1.Stop{Mode: machinev1.Hard}
	}
	grace := pod.Grace(how)
	if how.Mode == machinev1.Hard {
		grace = hardGrace
	}
	if v.pod.DeletionGracePeriodSeconds == nil || grace >= *v.pod.DeletionGracePeriodSeconds {
		return nil
	}
	if v.machine.Stop != how {
		m := v.machine
		m.Stop = how
		m.Revision++
		if err := running.Write(ctx, r.Client, v.pod, m); err != nil {
			return err
		}
	}
	return r.deletePod(ctx, v, how)
}

// namespaceGoing tells whether a namespace is being deleted. Then pods are deleted first, and machines after them; none of
// them is to hold that up.
func (r *Reconciler) namespaceGoing(ctx context.Context, name string) (bool, error) {
	n := &corev1.Namespace{}
	err := r.Get(ctx, client.ObjectKey{Name: name}, n)
	return err == nil && n.DeletionTimestamp != nil, client.IgnoreNotFound(err)
}

// remove deletes a pod whose machine has ended, with its seed.
func (r *Reconciler) remove(ctx context.Context, v *view) error {
	if v.state.End.Reason == machinev1.EndSuspended {
		if err := r.keepMemory(ctx, v); err != nil {
			return err
		}
	} else if v.vm.Spec.PowerState == vmopv1.VirtualMachinePowerStateOn {
		kind := normal
		if v.state.End.Reason != machinev1.EndShutdown && v.state.End.Reason != machinev1.EndStopped {
			kind = warning
		}
		r.event(v.vm, kind, "Ended", "Restart", "the machine has ended (%s) and is started again", health.WhyEnded(v.pod, v.state))
	}
	if err := r.deleteSeed(ctx, v.pod); err != nil {
		return err
	}
	err := r.Delete(ctx, v.pod, client.GracePeriodSeconds(hardGrace), client.Preconditions{UID: new(v.pod.UID)})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting the pod: %w", err)
	}
	return nil
}
