// Package health says in a condition of a VirtualMachine what is wrong with its guest: that its kernel has crashed, that
// it stands still since a datastore is full, that a disk fails, that its machine has ended without having been asked to.
//
// What is wrong now goes away with its cause. A crash is named for a while longer, since the machine is started again so
// soon that nobody would see it. It is pure, and called by the controller of VirtualMachines; it cannot fail.
package health

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
)

const (
	// Condition is False when something is wrong with the guest, and not there when nothing is.
	Condition = "atoll.dev/GuestHealthy"
	// RestartCondition is False when the guest has not restarted as it was asked to last, and not there otherwise.
	RestartCondition = "atoll.dev/Restarted"
	// remembered is how long a machine must have run for its last crash not to be named any more.
	remembered = 10 * time.Minute
	maxWords   = 1024
)

// Inputs are what is known of a machine.
type Inputs struct {
	VM      *vmopv1.VirtualMachine
	Pod     *corev1.Pod // nil when there is none
	Machine machinev1.Machine
	State   machinev1.State
	Now     time.Time
}

// Set sets the condition or removes it. It is to be called again after a while, if that is not 0.
func Set(in Inputs) (again time.Duration) {
	list, s := &in.VM.Status.Conditions, in.State
	if c := condition.Get(*list, RestartCondition); c != nil && in.startedSince(c.LastTransitionTime.Time) {
		condition.Remove(list, RestartCondition)
	}
	if in.Pod != nil && s.Phase == machinev1.Ended && (s.End.Reason == machinev1.EndPanicked || s.End.Reason == machinev1.EndCrashed) {
		condition.False(list, Condition, reasonOf(s.End), "the machine has ended at %s (%s); it is started again as long as spec.powerState is PoweredOn",
			Clean(s.End.At), WhyEnded(in.Pod, s))
		return 0
	}
	if s.Trouble != nil {
		condition.False(list, Condition, string(s.Trouble.Reason), "%s", words(in))
		return 0
	}
	if left := in.remember(condition.Get(*list, Condition)); left > 0 {
		return left
	}
	condition.Remove(list, Condition)
	return 0
}

// Restarted says how a restart that was asked for has ended: well, or why not. A guest that has begun anew after all
// has restarted.
func Restarted(vm *vmopv1.VirtualMachine, s machinev1.State, asked time.Time, failed string) {
	if started, err := time.Parse(time.RFC3339, s.Started); failed == "" || err == nil && started.After(asked) {
		condition.Remove(&vm.Status.Conditions, RestartCondition)
		return
	}
	condition.False(&vm.Status.Conditions, RestartCondition, "RestartFailed", "%s", Clean(failed))
}

// startedSince tells whether the guest has begun anew since then, or will.
func (in Inputs) startedSince(then time.Time) bool {
	started, err := time.Parse(time.RFC3339, in.State.Started)
	return in.Pod == nil || in.State.Phase == machinev1.Ended || err == nil && started.After(then)
}

// reasonOf is the condition's reason for an end.
func reasonOf(e machinev1.End) string {
	if e.Reason == machinev1.EndPanicked {
		return string(machinev1.GuestPanicked)
	}
	return string(e.Reason)
}

// remember is for how much longer a condition that is there names a crash.
func (in Inputs) remember(c *metav1.Condition) time.Duration {
	if c == nil || c.Reason != string(machinev1.GuestPanicked) && c.Reason != string(machinev1.EndCrashed) ||
		in.VM.Spec.PowerState != "" && in.VM.Spec.PowerState != vmopv1.VirtualMachinePowerStateOn {
		return 0
	}
	started, err := time.Parse(time.RFC3339, in.State.Started)
	if err != nil {
		return remembered // it is not running yet
	}
	return min(started.Add(remembered).Sub(in.Now), remembered)
}

// words say what is wrong with a guest that is there, and what to do.
func words(in Inputs) string {
	t := in.State.Trouble
	at := Clean(t.At)
	switch t.Reason {
	case machinev1.GuestPanicked:
		text := fmt.Sprintf("the kernel of the guest has crashed at %s; kubectl logs %s shows what it printed on its serial console. ", at, in.VM.Name)
		if in.Machine.KeepCrashed {
			return text + "It is left as it is, as annotation " + machine.CrashAnnotation + " says: atoll vm restart " + in.VM.Name + " --hard ends that"
		}
		return text + "It is restarted unless it restarts itself"
	case machinev1.DatastoreFull:
		return fmt.Sprintf("%s: the datastore is full since %s, and the guest stands still. It goes on by itself when there is room: "+
			"delete volumes or snapshots that are on the datastore, or make it larger", disk(in), at)
	case machinev1.DiskError:
		return fmt.Sprintf("%s: requests have failed since %s, and the guest was told so: look at its kernel log and at the datastore, then restart it", disk(in), at)
	}
	return Clean(string(t.Reason))
}

// disk is the disk that something is wrong with, and its datastore.
func disk(in Inputs) string {
	name := in.State.Trouble.Disk
	for _, d := range in.Machine.Disks {
		if store, volume, ok := strings.Cut(d.Volume, "/"); ok && d.Name == name {
			return fmt.Sprintf("disk %s (volume %s on datastore %s)", name, volume, store)
		}
	}
	return "disk " + Clean(name)
}

// EndedAt is when the machine of a pod has ended.
func EndedAt(p *corev1.Pod, s machinev1.State, now time.Time) time.Time {
	if at, err := time.Parse(time.RFC3339, s.End.At); err == nil && at.Before(now) {
		return at
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Terminated != nil && !c.State.Terminated.FinishedAt.IsZero() {
			return c.State.Terminated.FinishedAt.Time
		}
	}
	return now
}

// WhyEnded says why the machine of a pod has ended.
func WhyEnded(p *corev1.Pod, s machinev1.State) string {
	e := s.End
	switch {
	case e.Reason != "" && e.Message != "":
		return string(e.Reason) + ": " + Clean(e.Message)
	case e.Reason != "":
		return string(e.Reason)
	case p.Status.Reason != "":
		return strings.TrimSuffix(p.Status.Reason+": "+p.Status.Message, ": ")
	}
	for _, c := range p.Status.ContainerStatuses {
		if t := c.State.Terminated; t != nil {
			return strings.TrimSuffix(fmt.Sprintf("%s: %s", t.Reason, Clean(t.Message)), ": ")
		}
	}
	return "for a reason that its host did not name"
}

// Clean makes words of a guest or a host fit for a status: bounded, and without control characters.
func Clean(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if len(text) > maxWords {
		text = strings.ToValidUTF8(text[:maxWords], "") + "…"
	}
	return strings.Map(func(c rune) rune {
		if unicode.IsControl(c) || c == '\u2028' || c == '\u2029' {
			return ' '
		}
		return c
	}, text)
}
