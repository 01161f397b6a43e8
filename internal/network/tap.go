package network

import (
	"fmt"
	"os"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/linux/tap"
)

// Tap is a tap device, waiting in a pool network namespace for its pod.
//
// The device lives as long as somebody holds File or a copy of it: QEMU does,
// so the caller may Close after QEMU was started, and the device goes away by
// itself when QEMU ends. Its namespace lives as long, even when its path is gone.
type Tap struct {
	// File is the open device for QEMU's "-netdev tap,fd=": no packet
	// information, with virtio-net headers; QEMU turns offloads on when the
	// guest's driver asks. It is nil in a Tap another process described.
	File *os.File `json:"-"`
	// PoolNetns is the path of the namespace the device was made in.
	PoolNetns string `json:"poolNetns"`
	// Name is the device's name there.
	Name string `json:"name"`
}

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
	err := netns.Do(poolNetns, func() (err error) {
		t.File, err = tap.Open(name)
		return err
	})
	if err != nil {
		return Tap{}, fmt.Errorf("creating tap in %s: %w", poolNetns, err)
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
