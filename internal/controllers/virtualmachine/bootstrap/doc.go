// Package bootstrap renders what a guest is configured with: the files of the
// seed disk that a virtual machine finds at its first boot.
//
//	spec.bootstrap   label      files
//	(none)           cidata     meta-data, user-data, network-config (NoCloud)
//	cloudInit        cidata     the same
//	linuxPrep        cidata     the same: the customization as a cloud-config
//	vAppConfig       OVF ENV    ovf-env.xml; with linuxPrep both on a disk labelled cidata
//	sysprep          UNATTEND   unattend.xml, autounattend.xml
//
// It consists of functions of the VirtualMachine and of the Secrets and ConfigMaps
// that References names; it reads nothing itself. Addresses are not known here:
// placeholders of api/machine/v1 stand for them, which the host replaces.
//
// Changing the configuration later follows VM Operator. The files are rendered
// again for every power-on. What cloud-init does once per instance it does again
// only under another instance-id: that of the field instanceID or of the
// annotation vmoperator.vmware.com/cloud-init-instance-id, else the BIOS UUID,
// which never changes. linuxPrep customizes when its specification differs from
// that of the last time, or when customizeAtNextPowerOn says so: the hash of the
// specification is part of the instance-id.
//
// The controller of VirtualMachines calls it. Everything that is wrong with a
// specification is an *Error that names the field.
package bootstrap
