// Package power decides what is done next about the power of a machine.
//
// It is one pure function of a Situation, called by the controller of VirtualMachines, which does what it says.
package power

import (
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// PodPhase is how far a machine's pod is.
type PodPhase int

// The phases.
const (
	PodNone PodPhase = iota
	PodAlive
	PodStopping // deleted, and not gone
	PodEnded    // its machine runs no more, and will not again
)

// Situation is all that decides what is done about the power of a machine.
type Situation struct {
	Want vmopv1.VirtualMachinePowerState
	Pod  PodPhase
	End  machinev1.EndReason // of a pod that has ended
	// Blocked: something is missing for a start.
	Blocked bool
	// Attached: attachments of a machine that is gone are still there.
	Attached bool
	// Unheard: the pod has ended, and its host has not said yet how the machine has. Then nothing is done.
	Unheard bool
	// Pausing: the machine has crashed, and is not started again yet.
	Pausing bool
	// Saved: the memory of the machine is saved.
	Saved bool
	// Off: a snapshot wants the machine off; Busy: and left alone.
	Off, Busy bool
}

// Action is what is done.
type Action int

// The actions.
const (
	Rest    Action = iota // nothing, somebody else is at work
	Start                 // make the pod
	Change                // tell the running machine what is new
	Stop                  // delete the pod
	Remove                // delete a pod that has ended
	Suspend               // have the memory saved
	Discard               // forget the saved memory
	Refuse                // a machine that is off cannot be suspended
)

// Next is what to do.
//
//	          start                  suspend, remove
//	off ------------------> alive -------------------> suspended
//	 ^                      |  |                        |  |
//	 |<--- stop ------------+  |                        |  |
//	 |<--- remove (it ended) --+       start (restore)  |  |
//	 |                                  alive <---------+  |
//	 +<------------------- discard ------------------------+
func Next(s Situation) Action {
	switch {
	case s.Off && s.Pod == PodAlive:
		return Stop
	case s.Busy && s.Pod != PodEnded:
		return Rest
	}
	switch s.Pod {
	case PodStopping:
		return Rest
	case PodEnded:
		if s.Unheard {
			return Rest
		}
		if s.Want == vmopv1.VirtualMachinePowerStateOn && s.Pausing && s.End != machinev1.EndSuspended {
			return Rest
		}
		return Remove
	case PodAlive:
		switch s.Want {
		case vmopv1.VirtualMachinePowerStateOff:
			return Stop
		case vmopv1.VirtualMachinePowerStateSuspended:
			return Suspend
		}
		return Change
	}
	switch s.Want {
	case vmopv1.VirtualMachinePowerStateOff:
		if s.Saved {
			return Discard
		}
		return Rest
	case vmopv1.VirtualMachinePowerStateSuspended:
		if s.Saved {
			return Rest
		}
		return Refuse
	}
	if s.Blocked || s.Attached || s.Off || s.Busy {
		return Rest
	}
	return Start
}
