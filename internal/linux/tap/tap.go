// Package tap opens tap interfaces for QEMU.
//
// It only makes the device and hands out its file; addresses, links and moves between network
// namespaces belong to the network packages. A tap made here is not persistent: it goes away with
// the last copy of its file. Needs CAP_NET_ADMIN in the network namespace in question.
package tap

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Open makes (or joins) the tap called name in the network namespace of the calling thread, with
// the flags QEMU wants: no packet information, virtio-net headers. An empty name lets the kernel
// choose.
func Open(name string) (*os.File, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("opening tap %q: %w", name, err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/net/tun: %w", err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("making tap %q: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "tap:"+req.Name()), nil
}

// OpenIsolated makes a tap in a new network namespace that nothing else is in. The namespace lives
// as long as the file. Namespace gives it out, to move the tap elsewhere.
func OpenIsolated(name string) (*os.File, error) {
	type result struct {
		file *os.File
		err  error
	}
	done := make(chan result, 1)
	go func() {
		f, err := openIsolated(name)
		done <- result{f, err}
	}()
	r := <-done
	return r.file, r.err
}

// openIsolated visits a new network namespace with its thread. When the way back fails the thread
// stays locked, so that it ends with its goroutine and runs nothing else.
func openIsolated(name string) (*os.File, error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("opening the network namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("making a network namespace for tap %q: %w", name, err)
	}
	f, err := Open(name)
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
		runtime.UnlockOSThread()
	}
	return f, err
}

// Namespace opens the network namespace that the tap is in now.
func Namespace(tap *os.File) (*os.File, error) {
	fd, err := unix.IoctlRetInt(int(tap.Fd()), tunGetDevNetns)
	if err != nil {
		return nil, fmt.Errorf("finding the network namespace of %s: %w", tap.Name(), err)
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "netns:"+tap.Name()), nil
}

// tunGetDevNetns is TUNGETDEVNETNS, _IO('T', 227).
const tunGetDevNetns = 0x54e3
