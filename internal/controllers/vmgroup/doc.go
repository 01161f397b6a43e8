// Package vmgroup makes VirtualMachineGroups work: it links members to their group, hands the group's power state to
// them in the order and with the delays of spec.bootOrder, and sums up in the group's status how they are.
//
// A member is linked when it exists and names the group in spec.groupName; the group then becomes one of its owners,
// so that it is deleted with the group, and ceases to be when the link is gone. A group may be a member of another.
//
// The power state is handed over once for each change of the group's spec.powerState or
// spec.nextForcePowerStateSyncTime, and once to each member that is linked later. In between a member's own power
// state may be changed without the group changing it back. What was handed over to whom is in an annotation of the
// group, powerAnnotation. A machine that is made without a power state is made powered off if a group lists it that has
// one, so that it waits for its turn (the webhook of VirtualMachines). Delays are for powering on only and add up from one boot order to the next.
//
// Placement is the scheduler's, for each machine when it is powered on; the status shows the node it has chosen.
//
// What can go wrong is in the conditions of the member that it is about. The controllers' manager in the server
// calls Setup.
package vmgroup
