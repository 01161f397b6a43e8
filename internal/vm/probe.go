package vm

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// DefaultProbeTimeout is how long a kernel may take to boot with hardware virtualisation: many
// times what it needs where that works.
const DefaultProbeTimeout = 10 * time.Second

// kvmDevice is what QEMU opens for hardware virtualisation.
const kvmDevice = "/dev/kvm"

// ProbeAccelerator chooses KVM only where it really boots the machine of cfg to the barrier within
// cfg.BootTimeout (default DefaultProbeTimeout): there are hosts whose /dev/kvm opens and makes
// VMs in which ordinary kernels hang. Everywhere else it chooses TCG. reason says why, for people.
// The answer holds for one boot of the host; the caller keeps it.
func ProbeAccelerator(ctx context.Context, cfg Config) (accel Accel, reason string) {
	if _, err := kvmGroups(KVM); err != nil {
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

// kvmGroups is the supplementary group an unprivileged QEMU needs to open /dev/kvm: none if
// everybody may, else the owning group.
func kvmGroups(accel Accel) ([]uint32, error) {
	if accel != KVM {
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
