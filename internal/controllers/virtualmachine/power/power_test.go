package power

import (
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func TestNext(t *testing.T) {
	on, off, suspended := vmopv1.VirtualMachinePowerStateOn, vmopv1.VirtualMachinePowerStateOff, vmopv1.VirtualMachinePowerStateSuspended
	for _, c := range []struct {
		name string
		s    Situation
		want Action
	}{
		{"start", Situation{Want: on}, Start},
		{"something is missing", Situation{Want: on, Blocked: true}, Rest},
		{"another host still has the disks", Situation{Want: on, Attached: true}, Rest},
		{"running", Situation{Want: on, Pod: PodAlive}, Change},
		{"something is missing, but it runs", Situation{Want: on, Pod: PodAlive, Blocked: true}, Change},
		{"the pod before is not gone", Situation{Want: on, Pod: PodStopping}, Rest},
		{"shut down by its guest", Situation{Want: on, Pod: PodEnded, End: machinev1.EndShutdown}, Remove},
		{"crashed a moment ago", Situation{Want: on, Pod: PodEnded, End: machinev1.EndCrashed, Pausing: true}, Rest},
		{"crashed", Situation{Want: on, Pod: PodEnded, End: machinev1.EndCrashed}, Remove},
		{"crashed, to be off", Situation{Want: off, Pod: PodEnded, End: machinev1.EndCrashed, Pausing: true}, Remove},
		{"power off", Situation{Want: off, Pod: PodAlive}, Stop},
		{"is off", Situation{Want: off}, Rest},
		{"suspend", Situation{Want: suspended, Pod: PodAlive}, Suspend},
		{"has been suspended", Situation{Want: suspended, Pod: PodEnded, End: machinev1.EndSuspended}, Remove},
		{"is suspended", Situation{Want: suspended, Saved: true}, Rest},
		{"resume", Situation{Want: on, Saved: true}, Start},
		{"has ended somehow", Situation{Want: suspended, Pod: PodEnded, Unheard: true}, Rest},
		{"resume before its pod is gone", Situation{Want: on, Pod: PodEnded, End: machinev1.EndSuspended, Pausing: true}, Remove},
		{"suspended, to be off", Situation{Want: off, Saved: true}, Discard},
		{"off, to be suspended", Situation{Want: suspended}, Refuse},
		{"a snapshot wants it off", Situation{Want: on, Pod: PodAlive, Off: true, Busy: true}, Stop},
		{"a snapshot is at work", Situation{Want: on, Busy: true}, Rest},
		{"a snapshot is at work on it", Situation{Want: off, Pod: PodAlive, Busy: true}, Rest},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Next(c.s); got != c.want {
				t.Fatalf("got %d, want %d", got, c.want)
			}
		})
	}
}
