// Package disk builds the disk of a small virtual machine from a recipe: a GPT
// disk that boots with a BIOS and with UEFI, also under Secure Boot, made of
// Debian's kernel and boot loader, an initramfs with programs of this repository,
// and an empty file system for data.
//
//	sector 0      GRUB's boot.img, and the protective partition table
//	partition 1   GRUB's core image for a BIOS; its script loads kernel and initramfs
//	partition 2   FAT: kernel and initramfs; for UEFI Debian's signed shim and GRUB
//	partition 3   ext4 with the recipe's label
//
// No root is needed and nothing is mounted: the file systems are written by this
// package (FAT, cpio) and by mkfs.ext4. Same recipe, packages and sources give
// the same bytes, which are cached by a hash of these.
//
// It is not an installer and does not run maintainer scripts: a disk with a
// whole Debian is built by guestos/vm/debian. guestos/cmd/mkdisk calls it.
//
// What can go wrong: a recipe with an unknown field, a module that the kernel
// package does not have, a kernel that does not fit, a missing program of the
// host (mkfs.ext4, qemu-img). A failed build leaves nothing behind.
package disk
