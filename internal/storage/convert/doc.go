// Package convert reads disk images of unknown origin, and writes images for others.
//
// QEMU's readers of image formats are large and have had holes, so an image from outside is read by a process that
// can do nothing else: its own user, no privileges, no network, its own process table, a file tree of /usr and the
// one image, both read-only, and limits on memory and files. It serves the disk as plain bytes on a socket
// (qemu-nbd), and qemu-img, which may write volumes and knows their keys, reads those. What the image is was found
// by package diskimage before and is passed explicitly.
//
// What is written for others (Export) comes from our own volumes or from such a socket.
//
// Callers are the agent's importer and exporter. What can go wrong: the image is damaged (diskimage.ErrDamaged),
// there is no room (qemuimg.ErrSpace), QEMU's programs are missing, or this process is not root.
package convert
