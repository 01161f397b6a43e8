// Package vmsnapshot takes snapshots of virtual machines, keeps the trees they form, deletes them in any order, and
// takes machines back to them.
//
// A snapshot of a running machine is one Operation of the machine's host (api/machine/v1): all its disks at one
// moment, with the memory into a claim that is made for it if the snapshot has that. Of a machine that is off
// the disks are snapshotted by CSI, one by one, while it is held off; of a suspended one likewise, and its saved memory
// is copied. Either way each disk's snapshot is also a VolumeSnapshot with a VolumeSnapshotContent, owned by the
// VirtualMachineSnapshot, so that quota counts it, it can be made a new volume of, and it is deleted with its owner.
//
//	waiting --> preparing --> taking --> syncing --> ready
//	               |             |
//	               +-------------+--> failed
//
// What a snapshot is of is decided once and kept in an annotation (plan). Snapshots of one machine are taken one
// after the other.
//
// Going back (Reverter) is driven by the controller of VirtualMachines at each look while spec.currentSnapshotName is
// set: the machine is powered off, the agents roll the volumes back (annotations of the PersistentVolumes, see
// api/imageregistry), the machine's spec is replaced by the one of the snapshot, and a snapshot with memory is
// started from that memory.
//
// What can go wrong is in the conditions VirtualMachineSnapshotCreated and, for going back,
// VirtualMachineSnapshotRevertSucceeded of the VirtualMachine, with the way out. The controllers' manager in the
// server calls Setup.
package vmsnapshot
