// Package hardware runs full virtual machines: a q35 PC on QEMU with firmware, disks, network
// interfaces, a display and a TPM, as a machinev1.Machine says.
//
// The order of calls on a Machine:
//
//	Start (booting, or going on from a saved memory)
//	    -> { Pause, Resume, Reset, PowerDown, AddDisk, RemoveDisk, ChangeDisc, EjectDisc, SnapshotDisk,
//	         ResizeDisk, LimitDisk, AddMemory, SetCPUs, AddNIC, RemoveNIC, SaveMemory, VNC, Serial, Agent }*
//	    -> PowerOff or Kill, or the guest powers itself off; then Done is closed and Exit says how
//	    -> Close
//
// The package opens no volume, makes no network interface but throw-away ones, keeps no file and knows
// nothing of Kubernetes. The shim of virtual machines calls it. The micro-VMs of pods are package vm; both
// start QEMU with package qemu and have their disks from package block.
//
// A guest is hostile: it can take over its QEMU, which is unprivileged, filtered, and holds only the files
// of this one machine, all of them inherited. What comes from QEMU is bounded and never trusted.
//
// What can go wrong: the sentinel errors here and in package vm. A QEMU that dies at any time shows as
// Done, and every call in flight fails with vm.ErrExited. QEMU dies with the process that started it.
//
// Limits of QEMU that show: disks on SATA and IDE cannot be added or removed while the machine runs, NVMe
// disks keep a machine's memory from being saved (ErrUnmigratable), memory and processors can be added but
// not taken away, IDE disks are on ports of the chipset's AHCI controller since q35 has no other.
package hardware
