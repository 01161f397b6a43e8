package vm

import (
	"errors"
	"fmt"
	"strings"

	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qemu"
)

// Errors to tell apart with errors.Is. Every error of this package that has one of these causes
// wraps it.
var (
	// ErrQEMU: QEMU is missing or cannot be started at all.
	ErrQEMU = errors.New("qemu cannot run")
	// ErrKernel: the kernel or initramfs is unreadable, no kernel, or did not reach the barrier in
	// time. Rebuild or refetch the guest artefacts.
	ErrKernel = errors.New("guest kernel does not boot")
	// ErrTemplate: the template cannot be cloned: damaged, not sealed, or made by another QEMU.
	// Build it again.
	ErrTemplate = errors.New("template is not usable")
	// ErrExited: the machine has ended.
	ErrExited = monitor.ErrExited
	// ErrBusy: the image slot is in use, or nothing is attached to it.
	ErrBusy = errors.New("image slot is not in the needed state")
	// ErrImage: the image of a volume is damaged or no image that may be attached.
	ErrImage = block.ErrImage
	// ErrLimit: the template has no room for that much memory, that many CPUs or disks.
	ErrLimit = block.ErrLimit
	// ErrLocked: another process has a volume open.
	ErrLocked = block.ErrLocked
	// ErrNoVolume: the machine has no volume with the serial.
	ErrNoVolume = block.ErrNoVolume
	// ErrModule: QEMU lacks its driver for Ceph.
	ErrModule = block.ErrModule
)

// withOutput adds what QEMU and the guest printed last, which nearly always names the cause.
func withOutput(err error, stderr string, console []byte) error {
	if s := strings.TrimSpace(stderr); s != "" {
		err = fmt.Errorf("%w; qemu: %s", err, s)
	}
	text := string(console)
	if i := strings.LastIndex(text, "Kernel panic"); i >= 0 {
		text, _, _ = strings.Cut(text[i:], "\n") // what follows is a stack
	}
	if s := qemu.LastLines(text, 5); s != "" {
		err = fmt.Errorf("%w; console: %s", err, s)
	}
	return err
}
