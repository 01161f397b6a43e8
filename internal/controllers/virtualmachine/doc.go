// Package virtualmachine is the controller of VirtualMachines.
//
// It reads and writes API objects only. A machine that is powered on is a pod of the same name, and the Machine in its
// annotation is what the host makes of it (see api/machine/v1). Each look at a VirtualMachine goes through the same
// steps, each of which adds to one view in memory and sets its condition, so that all that is missing is named at
// once; then the power is dealt with, and the status is written, once:
//
//	class, resource policy, image, storage, bootstrap, network     what is asked for, and is it there
//	boot disk, volumes, CD-ROMs                                    claims and attachments
//	snapshot                                                       going back to one
//	power                                                          the pod is made, changed or deleted
//	status                                                         what the host says about the machine
//
// The subpackages are pure or have one concern: size (classes), placement (disks on controllers), machine and pod
// (what is written), running (reading and writing a pod's Machine), attachment (volumes), netinterface and netstatus (the
// network), power and restarts (what comes next, and when), health (what is wrong with a guest), fields (what has an
// effect), admission (webhooks), bootstrap (seed disks).
//
// A disk is never run twice: a pod is made only when the pod before it is gone and all its attachments are, however
// long that takes. If a host is lost for good, its administrator says so by deleting the Node or the pod by force.
//
// What can go wrong is in the VirtualMachine's conditions with the name of the object at fault and the way out.
package virtualmachine
