// Package vmpublish makes images of virtual machines: it answers VirtualMachinePublishRequests.
//
// A request becomes a snapshot of the boot disk (a VolumeSnapshot that is owned by the request), which for a machine
// that runs is as if its power had been cut, and an item of the content library with that snapshot as its source. The
// importer of the host makes the content of it, and the item's image appears as every item's does (package
// internal/controllers of the image kinds). The snapshot goes when the item is complete.
//
//	SourceValid, TargetValid --> Uploaded --> ImageAvailable --> Complete
//
// In a library that is a project of the registry the item's disk is pushed there before it is ready, by the host that has
// it; the target's name is that of the repository, and perhaps :TAG. A tag that is there is not overwritten.
//
// An attempt that fails is repeated as often as spec.backoffLimit says, and then the reason is Fatal. A request that
// is complete is deleted after spec.ttlSecondsAfterFinished; the item stays. A request that is deleted before its item is
// ready takes the item with it. The controllers' manager in the server calls Setup.
package vmpublish
