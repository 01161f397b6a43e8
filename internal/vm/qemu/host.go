package qemu

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// kvmDevice is what QEMU opens for hardware virtualisation.
const kvmDevice = "/dev/kvm"

// Groups is the supplementary group an unprivileged QEMU needs to open /dev/kvm: none if
// everybody may, else the owning group.
func Groups(accel string) ([]uint32, error) {
	if accel != "kvm" {
		return nil, nil
	}
	st, err := os.Stat(kvmDevice)
	if err != nil {
		return nil, fmt.Errorf("no hardware virtualisation: %w", err)
	}
	if st.Mode()&fs.ModeCharDevice == 0 {
		return nil, fmt.Errorf("%s is no device", kvmDevice)
	}
	gid := st.Sys().(*syscall.Stat_t).Gid
	switch perm := st.Mode().Perm(); {
	case perm&0o006 == 0o006:
		return nil, nil
	case perm&0o060 == 0o060 && gid != 0:
		return []uint32{gid}, nil
	}
	return nil, fmt.Errorf("%s is open to root only (mode %v, group %d); give it to a group of its own, as udev does: chgrp kvm %s && chmod 660 %s",
		kvmDevice, st.Mode().Perm(), gid, kvmDevice, kvmDevice)
}

// SocketPair makes a connected pair of stream sockets, one end for QEMU.
func SocketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	ours, child := os.NewFile(uintptr(fds[0]), "qemu"), os.NewFile(uintptr(fds[1]), "qemu")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		_ = child.Close()
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	return conn.(*net.UnixConn), child, nil
}
