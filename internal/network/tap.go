package network

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
)

// Tap is a tap device, waiting in a pool network namespace for its pod.
//
// The device lives as long as somebody holds File or a copy of it: QEMU does,
// so the caller may Close after QEMU was started, and the device goes away by
// itself when QEMU ends, wherever it was moved to by then.
type Tap struct {
	// File is the open device, non-blocking, for QEMU's "-netdev tap,fd=":
	// no packet information header, with the 12-byte virtio-net header.
	// It is nil in a Tap another process described.
	File *os.File `json:"-"`
	// PoolNetns is the path of the namespace the device was made in.
	PoolNetns string `json:"poolNetns"`
	// Name is the device's name there.
	Name string `json:"name"`
}

// vnetHdrLen is the length of struct virtio_net_hdr_mrg_rxbuf (virtio 1.x).
const vnetHdrLen = 12

// CreatePoolNetns makes the namespace at path that taps wait in; one that is
// there already is kept.
func CreatePoolNetns(path string) error { return netns.Create(path) }

// RemovePoolNetns undoes CreatePoolNetns. Taps in it vanish when no VM holds
// them. A missing path is no error.
func RemovePoolNetns(path string) error { return netns.Remove(path) }

// NewTap makes a tap device called name (at most 15 bytes, unique in the pool
// namespace) in the namespace at poolNetns. It is down and has no address:
// nothing passes until JoinTap.
func NewTap(poolNetns, name string) (Tap, error) {
	t := Tap{PoolNetns: poolNetns, Name: name}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return Tap{}, fmt.Errorf("creating tap %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	err = netns.Do(poolNetns, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("opening /dev/net/tun: %w", err)
		}
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("attaching: %w", err)
		}
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHdrLen); err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("setting virtio header length: %w", err)
		}
		t.File = os.NewFile(uintptr(fd), "tap:"+name)
		return nil
	})
	if err != nil {
		return Tap{}, fmt.Errorf("creating tap %q: %w", name, err)
	}
	return t, nil
}

// Close closes this process's hold on the device.
func (t Tap) Close() error {
	if t.File == nil {
		return nil
	}
	return t.File.Close()
}
