//go:build integration

package hardware_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware"
	"atoll.dev/atoll/internal/vm/swtpm"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// bySerial is a script that prints the device of a disk.
func bySerial(i int) string {
	return `for d in /sys/block/sd*; do ` +
		`if grep -aq ` + strings.ReplaceAll(uuid(i), "-", "") + ` $d/device/vpd_pg80 2>/dev/null; then echo /dev/${d##*/}; fi; done`
}

// device waits for a disk and returns its device.
func (r *running) device(t testing.TB, i int) string {
	t.Helper()
	for end := time.Now().Add(bootTimeout); time.Now().Before(end); <-time.After(100 * time.Millisecond) {
		if dev := r.sh(t, bySerial(i)); dev != "" {
			return dev
		}
	}
	t.Fatalf("disk %d does not appear", i)
	return ""
}

// TestBIOS goes through the life of a machine: boot, identity, hot-plug of everything, restart, power button.
func TestBIOS(t *testing.T) {
	ctx := t.Context()
	cfg, _ := machine(t)
	m := start(t, cfg)
	m.up(t)
	if got := strings.ToLower(m.sh(t, "cat /sys/class/dmi/id/product_uuid")); got != uuid(0xabcdef) {
		t.Errorf("product uuid %s", got)
	}
	if got := m.sh(t, bySerial(1)); got != "/dev/sda" {
		t.Errorf("boot disk is %q", got)
	}
	if s := m.Size(); s.CPUs != 1 || s.Memory != 512<<20 {
		t.Errorf("%+v", s)
	}

	t.Run("guest", func(t *testing.T) { aboutGuest(t, m) })
	t.Run("disks", func(t *testing.T) { hotDisks(t, m) })
	t.Run("disc", func(t *testing.T) { refusals(t, m) })
	t.Run("cpu and memory", func(t *testing.T) { hotSize(t, m) })
	t.Run("nic", func(t *testing.T) { hotNIC(t, m) })
	t.Run("display", func(t *testing.T) { display(t, m) })
	t.Run("serial", func(t *testing.T) {
		s := m.Serial()
		buf := make([]byte, 1)
		if _, err := io.ReadFull(s, buf); err != nil {
			t.Error(err)
		}
		must(t, s.Close())
	})

	must(t, m.Pause(ctx))
	m.await(t, hardware.EventStopped)
	must(t, m.Resume(ctx))
	m.await(t, hardware.EventResumed)
	m.sh(t, "touch /run/before")
	must(t, m.Reset(ctx))
	if e := m.await(t, hardware.EventReset); e.Guest {
		t.Errorf("%+v", e)
	}
	m.up(t)
	m.want(t, "new", "test -e /run/before || echo new")
	if e := m.pressed(t); e.Reason != vm.ExitShutdown {
		t.Errorf("%v", e)
	}
	if err := m.Pause(ctx); !errors.Is(err, vm.ErrExited) {
		t.Errorf("%v", err)
	}
}

func aboutGuest(t *testing.T, m *running) {
	ctx := t.Context()
	os, err := m.Agent().OS(ctx)
	must(t, err)
	name, err := m.Agent().Hostname(ctx)
	must(t, err)
	nics, err := m.Agent().Interfaces(ctx)
	must(t, err)
	t.Logf("%+v %s %+v", os, name, nics)
	if os.ID != "tinyvm" || len(nics) < 2 {
		t.Errorf("%+v, %+v", os, nics)
	}
	must(t, m.Agent().SetTime(ctx, time.Now()))
	n, err := m.Agent().Freeze(ctx)
	must(t, err)
	frozen, err := m.Agent().Frozen(ctx)
	must(t, err)
	thawed, err := m.Agent().Thaw(ctx)
	must(t, err)
	if n < 1 || !frozen || thawed < 1 {
		t.Errorf("%d file systems frozen (%v), %d thawed", n, frozen, thawed)
	}
	res, err := m.Agent().Exec(ctx, guestagent.Command{Path: "/bin/sh", Args: []string{"-c", "cat; exit 3"}, Stdin: []byte("in")})
	if err != nil || res.ExitCode != 3 || string(res.Stdout) != "in" {
		t.Errorf("%+v, %v", res, err)
	}
}

func hotDisks(t *testing.T, m *running) {
	ctx := t.Context()
	for i, d := range []machinev1.Disk{
		{Name: "same", Bus: machinev1.SCSI, Unit: 1, UUID: uuid(10)},
		{Name: "other", Bus: machinev1.SCSI, Controller: 2, Unit: 5, UUID: uuid(11)},
	} {
		v := raw(t, false, bytes.Repeat([]byte{byte('a' + i)}, 1<<20))
		must(t, m.AddDisk(ctx, d, v))
		dev := m.device(t, 10+i)
		m.want(t, strings.Repeat(string(rune('a'+i)), 3), "dd if="+dev+" bs=3 count=1 2>/dev/null")
		m.sh(t, "echo written | dd of="+dev+" conv=fsync 2>/dev/null")
		must(t, m.LimitDisk(ctx, d.Name, vm.Limits{IOPS: 1000}))
		must(t, m.ResizeDisk(ctx, d.Name, 2<<20))
		m.want(t, "4096", "cat /sys/block/"+filepath.Base(dev)+"/size")
		removed(t, m.RemoveDisk, d.Name)
		m.want(t, "gone", "test -e "+dev+" || echo gone")
		buf := make([]byte, 7)
		if _, err := v.Layers[0].File.ReadAt(buf, 0); err != nil || string(buf) != "written" {
			t.Errorf("%q, %v", buf, err)
		}
		if err := m.RemoveDisk(ctx, d.Name); !errors.Is(err, vm.ErrNoVolume) {
			t.Errorf("%v", err)
		}
	}
	nvme := machinev1.Disk{Name: "nvme", Bus: machinev1.NVMe, UUID: uuid(12)}
	must(t, m.AddDisk(ctx, nvme, raw(t, false, []byte(strings.Repeat("n", 1<<20)))))
	m.want(t, "nnn", "dd if=/dev/nvme0n1 bs=3 count=1 2>/dev/null")
	if _, err := m.SaveMemory(ctx, open(t, "/dev/null", os.O_WRONLY), hardware.SaveOptions{}); !errors.Is(err, hardware.ErrUnmigratable) {
		t.Errorf("%v", err)
	}
	removed(t, m.RemoveDisk, "nvme")
}

func refusals(t *testing.T, m *running) {
	ctx := t.Context()
	for name, d := range map[string]machinev1.Disk{
		"sata":       {Name: "x", Bus: machinev1.SATA, UUID: uuid(20)},
		"drive":      {Name: "x", Bus: machinev1.SCSI, Unit: 9, UUID: uuid(20), CDROM: true},
		"same place": {Name: "x", Bus: machinev1.SCSI, UUID: uuid(20)},
		"same name":  {Name: "boot", Bus: machinev1.SCSI, Unit: 9, UUID: uuid(20)},
	} {
		err := m.AddDisk(ctx, d, raw(t, d.CDROM, make([]byte, 512)))
		if err == nil {
			t.Errorf("%s was taken", name)
		}
		t.Log(err)
	}
	if _, err := m.AddMemory(ctx, 8<<30); !errors.Is(err, vm.ErrLimit) {
		t.Errorf("%v", err)
	}
	if _, err := m.SetCPUs(ctx, 99); !errors.Is(err, vm.ErrLimit) {
		t.Errorf("%v", err)
	}
	if err := m.EjectDisc(ctx, "boot"); !errors.Is(err, hardware.ErrConfig) {
		t.Errorf("%v", err)
	}
}

func hotSize(t *testing.T, m *running) {
	ctx := t.Context()
	before := m.sh(t, "free -m | awk '/Mem/ {print $2}'")
	added, err := m.AddMemory(ctx, 100<<20)
	if err != nil || added != 128<<20 {
		t.Errorf("%d, %v", added, err)
	}
	m.cpus(t, 3)
	m.want(t, "3", "for c in /sys/devices/system/cpu/cpu*/online; do echo 1 > $c; done 2>/dev/null; nproc")
	m.want(t, "more", "test $(free -m | awk '/Mem/ {print $2}') -gt $(("+before+" + 100)) && echo more")
	if s := m.Size(); s.CPUs != 3 || s.Memory != 640<<20 {
		t.Errorf("%+v", s)
	}
}

func hotNIC(t *testing.T, m *running) {
	ctx := t.Context()
	nic := machinev1.NIC{Name: "eth1", Model: "virtio-net-pci", MAC: "52:54:00:00:00:77"}
	must(t, m.AddNIC(ctx, nic, isolated(t, "tap1")))
	m.want(t, "1", "cat /sys/class/net/*/address | grep -c 52:54:00:00:00:77")
	if err := m.AddNIC(ctx, nic, isolated(t, "tap1")); err == nil {
		t.Error("the same was taken twice")
	}
	removed(t, m.RemoveNIC, "eth1")
	m.want(t, "0", "cat /sys/class/net/*/address | grep -c 52:54:00:00:00:77; true")
	if err := m.RemoveNIC(ctx, "eth1"); !errors.Is(err, hardware.ErrNoNIC) {
		t.Errorf("%v", err)
	}
	must(t, m.AddNIC(ctx, nic, isolated(t, "tap1"))) // again
	removed(t, m.RemoveNIC, "eth1")
}

// display speaks RFB as far as the size of the screen, on two connections at a time.
func display(t *testing.T, m *running) {
	for range 2 {
		c, err := m.VNC(t.Context())
		must(t, err)
		t.Cleanup(func() { _ = c.Close() })
		must(t, c.SetDeadline(time.Now().Add(bootTimeout)))
		read := func(n int) []byte {
			buf := make([]byte, n)
			if _, err := io.ReadFull(c, buf); err != nil {
				t.Fatal(err)
			}
			return buf
		}
		write := func(p ...byte) {
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		if v := string(read(12)); v != "RFB 003.008\n" {
			t.Fatalf("%q", v)
		}
		write([]byte("RFB 003.008\n")...)
		if types := read(2); types[0] != 1 || types[1] != 1 {
			t.Fatalf("security types %v", types)
		}
		write(1)
		if result := read(4); !bytes.Equal(result, make([]byte, 4)) {
			t.Fatalf("%v", result)
		}
		write(1)
		size := read(4)
		t.Logf("screen of %d by %d", int(size[0])<<8|int(size[1]), int(size[2])<<8|int(size[3]))
	}
}

// TestEFI boots with UEFI, with and without Secure Boot, with a TPM.
func TestEFI(t *testing.T) {
	for name, secure := range map[string]bool{"plain": false, "secure": true} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			cfg, _ := machine(t)
			fw, err := hardware.FindFirmware(hardware.DefaultFirmwareDir, secure)
			must(t, err)
			vars := filepath.Join(t.TempDir(), "vars")
			must(t, os.WriteFile(vars, nil, 0o600))
			cfg.NVRAM, cfg.Firmware = open(t, vars, os.O_RDWR), fw
			must(t, hardware.CreateNVRAM(cfg.NVRAM, fw))
			before, err := os.ReadFile(vars)
			must(t, err)
			tpm, err := swtpm.Start(ctx, swtpm.Config{UID: vmtest.UID, GID: vmtest.UID, Dir: filepath.Join(t.TempDir(), "tpm")})
			must(t, err)
			t.Cleanup(func() { must(t, tpm.Close()) })
			cfg.TPM = tpm.Socket()
			cfg.Machine.Firmware = machinev1.Firmware{Type: machinev1.EFI, SecureBoot: secure, TPM: true}
			m := start(t, cfg)
			must(t, tpm.Release())
			m.up(t)
			m.want(t, "efi", "test -d /sys/firmware/efi && echo efi")
			m.want(t, "tpm", "test -e /sys/firmware/acpi/tables/TPM2 && echo tpm")
			if secure {
				m.want(t, "06 00 00 00 01", "mount -t efivarfs none /sys/firmware/efi/efivars 2>/dev/null; od -An -tx1 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c | sed 's/^ //'")
			}
			if after, err := os.ReadFile(vars); err != nil || bytes.Equal(before, after) {
				t.Errorf("the firmware has kept nothing: %v", err)
			}
			must(t, m.Agent().Shutdown(ctx, guestagent.PowerDown))
			if e := m.ended(t); e.Reason != vm.ExitShutdown {
				t.Errorf("%v", e)
			}
			select {
			case <-tpm.Done():
			case <-time.After(time.Minute):
				t.Error("the TPM lives on")
			}
		})
	}
}

// TestDiscs: CD-ROM drives, a seed, a disk whose changes are thrown away, and a power cut.
func TestDiscs(t *testing.T) {
	ctx := t.Context()
	cfg, _ := machine(t)
	scrap := qcow2(t, "", "8M")
	cfg.Machine.Disks = append(
		cfg.Machine.Disks,
		machinev1.Disk{Name: "cd", Bus: machinev1.SCSI, Unit: 1, UUID: uuid(2), CDROM: true},
		machinev1.Disk{Name: "empty", Bus: machinev1.SATA, UUID: uuid(3), CDROM: true},
		machinev1.Disk{Name: "scrap", Bus: machinev1.SCSI, Unit: 2, UUID: uuid(4), NonPersistent: true},
	)
	disc := func(text string) vm.Volume { return raw(t, true, []byte(text+strings.Repeat(" ", 1<<20-len(text)))) }
	cfg.Disks["cd"], cfg.Disks["scrap"] = disc("first"), chain(t, true, scrap)
	cfg.TempDir = t.TempDir()
	cfg.Seed = disc("seed").Layers[0].File
	m := start(t, cfg)
	m.up(t)
	read := func(dev string) string { return "dd if=" + dev + " bs=6 count=1 2>/dev/null | sed 's/ *$//'" }
	m.want(t, "first", read("/dev/sr0"))
	m.want(t, "seed", read("/dev/sr1"))
	must(t, m.ChangeDisc(ctx, "cd", disc("second")))
	m.want(t, "second", read("/dev/sr0"))
	must(t, m.EjectDisc(ctx, "cd"))
	m.want(t, "none", "dd if=/dev/sr0 bs=6 count=1 2>/dev/null || echo none")
	must(t, m.EjectDisc(ctx, "cd"))
	must(t, m.ChangeDisc(ctx, "cd", disc("third")))
	m.want(t, "third", read("/dev/sr0"))
	must(t, m.ChangeDisc(ctx, "empty", disc("filled")))
	dev := m.device(t, 4)
	m.sh(t, "echo lost | dd of="+dev+" conv=fsync 2>/dev/null")
	m.want(t, "lost", "dd if="+dev+" bs=4 count=1 2>/dev/null")
	off, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	must(t, m.PowerOff(off))
	if e := m.ended(t); e.Reason != vm.ExitKilled {
		t.Errorf("%v", e)
	}
	if out, err := exec.Command("qemu-img", "compare", scrap, qcow2(t, "", "8M")).CombinedOutput(); err != nil {
		t.Errorf("the non-persistent disk has changed: %v: %s", err, out)
	}
}

// TestStartFailures: what does not work is named.
func TestStartFailures(t *testing.T) {
	ctx := t.Context()
	good, top := machine(t)
	m := start(t, good)
	again := good
	again.UID, again.GID = vmtest.UID+1, vmtest.UID+1
	again.Disks = map[string]vm.Volume{"boot": chain(t, false, tiny(t), top)}
	if other, err := hardware.Start(ctx, again); !errors.Is(err, vm.ErrLocked) {
		t.Errorf("%v", err)
		if err == nil {
			must(t, other.Close())
		}
	}
	must(t, m.Kill())
	if e := m.ended(t); e.Reason != vm.ExitKilled {
		t.Errorf("%v", e)
	}
	for name, change := range map[string]func(*hardware.Config){
		"no qemu":       func(c *hardware.Config) { c.QEMU = "/nonexistent" },
		"unknown model": func(c *hardware.Config) { c.Machine.CPU.Model = "Z80" },
		"huge pages": func(c *hardware.Config) {
			c.Machine.Memory = machinev1.Memory{Bytes: 512 << 30, HugePageBytes: 2 << 20}
		},
		"no memory": func(c *hardware.Config) { c.Incoming = open(t, "/dev/zero", os.O_RDONLY) },
	} {
		c, _ := machine(t)
		change(&c)
		_, err := hardware.Start(ctx, c)
		if err == nil {
			t.Errorf("%s started", name)
		}
		t.Log(err)
	}
}
