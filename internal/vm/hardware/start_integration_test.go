//go:build integration

package hardware_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/hardware"
)

// TestEverything starts a machine with one of every device, without letting it run.
func TestEverything(t *testing.T) {
	cfg, _ := machine(t)
	fw, err := hardware.FindFirmware(hardware.DefaultFirmwareDir, true)
	must(t, err)
	cfg.NVRAM, cfg.Firmware = open(t, filepath.Join(t.TempDir(), "vars"), os.O_RDWR|os.O_CREATE), fw
	must(t, hardware.CreateNVRAM(cfg.NVRAM, fw))
	shared := raw(t, false, make([]byte, 1<<20))
	shared.Shared = true
	m := &cfg.Machine
	m.CPU = machinev1.CPU{Count: 2, Max: 8, CoresPerSocket: 2, Model: "Nehalem-v2", Nested: true, Pinned: true}
	m.Firmware = machinev1.Firmware{Type: machinev1.EFI, SecureBoot: true, BootDelayMillis: 1000, NetworkBoot: true}
	m.GuestID = "windows2019srv_64Guest"
	m.Disks = append(
		m.Disks,
		machinev1.Disk{Name: "shared", Bus: machinev1.SCSI, Controller: 3, Unit: 63, UUID: uuid(2), Shared: true},
		machinev1.Disk{Name: "nvme", Bus: machinev1.NVMe, UUID: uuid(3)},
		machinev1.Disk{Name: "ide", Bus: machinev1.IDE, Controller: 1, Unit: 1, UUID: uuid(4)},
		machinev1.Disk{Name: "sata", Bus: machinev1.SATA, Controller: 3, Unit: 5, UUID: uuid(5)},
		machinev1.Disk{Name: "cd", Bus: machinev1.IDE, UUID: uuid(6), CDROM: true},
		machinev1.Disk{Name: "empty", Bus: machinev1.SATA, UUID: uuid(7), CDROM: true},
		machinev1.Disk{Name: "fixed", Bus: machinev1.SCSI, Unit: 2, UUID: uuid(8), ReadOnly: true},
	)
	disk := func(readOnly bool) vm.Volume { return raw(t, readOnly, make([]byte, 1<<20)) }
	cfg.Disks["shared"], cfg.Disks["nvme"], cfg.Disks["ide"], cfg.Disks["sata"] = shared, disk(false), disk(false), disk(false)
	cfg.Disks["cd"], cfg.Disks["fixed"] = disk(true), disk(true)
	for i, model := range []string{"e1000e", "vmxnet3", "e1000", "pcnet"} {
		name := fmt.Sprintf("eth%d", i+1)
		m.NICs = append(m.NICs, machinev1.NIC{Name: name, Model: model, MAC: fmt.Sprintf("52:54:00:00:01:%02x", i)})
		cfg.Taps[name] = isolated(t, "tap0")
	}
	cfg.Seed, cfg.Paused = disk(true).Layers[0].File, true
	cfg.HostCPUs = []int{1, 0}
	r := start(t, cfg)
	if s := r.Size(); s.CPUs != 2 {
		t.Errorf("%+v", s)
	}
	// Each vCPU is on its processor, and the other threads are on any.
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", r.PID()))
	must(t, err)
	var pinned []string
	for _, n := range names {
		comm, commErr := os.ReadFile(n + "/comm")
		status, statusErr := os.ReadFile(n + "/status")
		err := errors.Join(commErr, statusErr)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a worker that has ended
		}
		must(t, err)
		_, allowed, _ := strings.Cut(string(status), "Cpus_allowed_list:\t")
		allowed, _, _ = strings.Cut(allowed, "\n")
		if allowed == "0" || allowed == "1" {
			pinned = append(pinned, strings.TrimSpace(string(comm))+" on "+allowed)
		}
	}
	if len(pinned) != 2 {
		t.Errorf("%v", pinned)
	}
}

// TestSetup opens the setup of EFI instead of booting.
func TestSetup(t *testing.T) {
	cfg, _ := machine(t)
	fw, err := hardware.FindFirmware(hardware.DefaultFirmwareDir, false)
	must(t, err)
	cfg.NVRAM, cfg.Firmware = open(t, filepath.Join(t.TempDir(), "vars"), os.O_RDWR|os.O_CREATE), fw
	must(t, hardware.CreateNVRAM(cfg.NVRAM, fw))
	cfg.Machine.Firmware = machinev1.Firmware{Type: machinev1.EFI, EnterSetup: true}
	r := start(t, cfg)
	s := r.Serial()
	defer s.Close()
	end := time.AfterFunc(bootTimeout, func() { _ = s.Close() })
	defer end.Stop()
	var text []byte
	for !strings.Contains(string(text), "starting Boot0000 \"UiApp\"") {
		buf := make([]byte, 1024)
		n, err := s.Read(buf)
		must(t, err)
		text = append(text, buf[:n]...)
		if strings.Contains(string(text), "GRUB") {
			t.Fatal("it boots")
		}
	}
}
