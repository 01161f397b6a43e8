package vm

import (
	"context"
	"fmt"
	"time"

	"atoll.dev/atoll/internal/vm/qemu"
)

// DefaultProbeTimeout is how long a kernel may take to boot with hardware virtualisation: many
// times what it needs where that works.
const DefaultProbeTimeout = 10 * time.Second

// ProbeAccelerator chooses KVM only where it really boots the machine of cfg to the barrier within
// cfg.BootTimeout (default DefaultProbeTimeout): there are hosts whose /dev/kvm opens and makes
// VMs in which ordinary kernels hang. Everywhere else it chooses TCG. reason says why, for people.
// The answer holds for one boot of the host; the caller keeps it.
func ProbeAccelerator(ctx context.Context, cfg Config) (accel Accel, reason string) {
	if _, err := qemu.Groups(string(KVM)); err != nil {
		return TCG, err.Error()
	}
	cfg.Accel = KVM
	cfg.BootTimeout = orDefault(cfg.BootTimeout, DefaultProbeTimeout)
	cfg.ScratchBytes = -1
	start := time.Now()
	m, err := Boot(ctx, cfg, CloneConfig{UID: cfg.UID, GID: cfg.GID})
	if err != nil {
		return TCG, "kvm does not run the pod kernel: " + err.Error()
	}
	took := time.Since(start).Round(time.Millisecond)
	if err := m.Close(); err != nil {
		return TCG, "kvm ran the pod kernel but: " + err.Error()
	}
	return KVM, fmt.Sprintf("kvm booted the pod kernel in %s", took)
}
