// Command tinyvm is all that runs in the tiny VM image besides BusyBox: pid 1,
// the guest agent, a NoCloud client and a small web server. The image is for
// tests that need a whole virtual machine (firmware, disk, console, agent) up in
// a few seconds, also without hardware virtualisation; guestos/vm/tiny is its
// recipe.
//
// It runs from the initramfs. The last partition of the disk it was booted from
// (an ext4 file system named tinydata) is mounted at /data, what the web server
// stores is there:
//
//	GET  /            who this is: host name, uptime, boots, addresses
//	GET  /hostname    the host name alone
//	GET  /data/NAME   a file;  PUT stores one and answers when it is on the disk
//
// TFTP answers each request with the host name.
//
// From a NoCloud seed (a file system labelled cidata) it takes instance-id,
// local-hostname, network-config version 2, and of user-data: hostname, fqdn,
// write_files, bootcmd, runcmd and a script. Without network-config it asks
// DHCP. The command cloud-init in the guest says how that went, like the real one.
//
// Pid 1 only starts "tinyvm serve", which does all the work, and reaps what is
// orphaned: in a program that waits for its own children that would be a race.
// What cannot be done (no disk, no network, bad user data) is said on the
// console, and the rest goes on.
package main
