package hardware

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/block"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const uuid = "%08x-1111-4222-8333-444455556666"

func diskUUID(i int) string { return fmt.Sprintf(uuid, i) }

// opened opens a new file in the way that a disk's volume is.
func opened(t testing.TB, flag int) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func rawVolume(t testing.TB, readOnly bool) vm.Volume {
	t.Helper()
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	return vm.Volume{Layers: []vm.Layer{{Format: vm.Raw, File: opened(t, flag)}}, ReadOnly: readOnly}
}

// small is a machine with one disk and one network interface.
func small(t testing.TB) Config {
	return Config{
		Machine: machinev1.Machine{
			Name: "small", UID: "u1", BIOSUUID: diskUUID(0),
			CPU: machinev1.CPU{Count: 1}, Memory: machinev1.Memory{Bytes: 1 << 30},
			Firmware: machinev1.Firmware{Type: machinev1.BIOS},
			Disks:    []machinev1.Disk{{Name: "boot", Volume: "v", Bus: machinev1.SCSI, UUID: diskUUID(1)}},
			NICs:     []machinev1.NIC{{Name: "eth0", Model: "virtio-net-pci", MAC: "52:54:00:00:00:01", MTU: 1450}},
		},
		UID: 1000, GID: 1000,
		Disks: map[string]vm.Volume{"boot": rawVolume(t, false)},
		Taps:  map[string]*os.File{"eth0": opened(t, os.O_RDWR)},
	}
}

// large is a machine with one of everything.
func large(t testing.TB) Config {
	c := small(t)
	m := &c.Machine
	m.Name, m.GuestID = "large", "windows2019srv_64Guest"
	m.CPU = machinev1.CPU{Count: 4, Max: 8, CoresPerSocket: 2, Model: "EPYC-v3", Nested: true}
	m.Memory = machinev1.Memory{Bytes: 4 << 30, Max: 16 << 30, HugePageBytes: 2 << 20}
	m.Firmware = machinev1.Firmware{Type: machinev1.EFI, SecureBoot: true, TPM: true, BootDelayMillis: 1000, NetworkBoot: true}
	m.BootOrder = []string{"cd", "boot"}
	m.Disks = append(
		m.Disks,
		machinev1.Disk{Name: "data", Bus: machinev1.SCSI, Controller: 1, Unit: 3, UUID: diskUUID(2), Shared: true},
		machinev1.Disk{Name: "fast", Bus: machinev1.NVMe, UUID: diskUUID(3)},
		machinev1.Disk{Name: "old", Bus: machinev1.IDE, Controller: 1, Unit: 1, UUID: diskUUID(4)},
		machinev1.Disk{Name: "cd", Bus: machinev1.SATA, UUID: diskUUID(5), CDROM: true},
		machinev1.Disk{Name: "cd2", Bus: machinev1.SATA, Unit: 1, UUID: diskUUID(6), CDROM: true},
		machinev1.Disk{Name: "scrap", Bus: machinev1.SCSI, Unit: 1, UUID: diskUUID(7), NonPersistent: true},
		machinev1.Disk{Name: "fixed", Bus: machinev1.SCSI, Unit: 2, UUID: diskUUID(8), ReadOnly: true},
	)
	shared := rawVolume(t, false)
	shared.Shared = true
	secret := rawVolume(t, false)
	secret.Layers[0].Key = []byte("secret")
	c.Disks["data"], c.Disks["fast"], c.Disks["old"] = shared, secret, rawVolume(t, false)
	c.Disks["cd"], c.Disks["scrap"], c.Disks["fixed"] = rawVolume(t, true), rawVolume(t, true), rawVolume(t, true)
	for i, model := range []string{"e1000e", "vmxnet3", "e1000", "pcnet"} {
		name := fmt.Sprintf("eth%d", i+1)
		m.NICs = append(m.NICs, machinev1.NIC{Name: name, Model: model, MAC: fmt.Sprintf("52:54:00:00:01:%02x", i)})
		c.Taps[name] = opened(t, os.O_RDWR)
	}
	c.Accel, c.NVRAM, c.TPM, c.Seed, c.TempDir = vm.KVM, opened(t, os.O_RDWR), opened(t, os.O_RDWR), opened(t, os.O_RDONLY), t.TempDir()
	c.Firmware.Code = opened(t, os.O_RDONLY).Name()
	return c
}

// build makes the command line.
func build(t testing.TB, c Config) (*command, error) {
	t.Helper()
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	s, err := c.newShape("")
	if err != nil {
		return nil, err
	}
	s.Host = ""
	file := os.Stderr
	cmd, err := newCommand(&c, s, block.New(nil, 0), endpoints{file, file, file})
	if cmd != nil {
		t.Cleanup(cmd.close)
	}
	return cmd, err
}

// TestCommandLine compares with testdata, which is also the place to read what QEMU is started with.
func TestCommandLine(t *testing.T) {
	efi := small(t)
	efi.Machine.Firmware.Type, efi.NVRAM, efi.Firmware.Code = machinev1.EFI, opened(t, os.O_RDWR), opened(t, os.O_RDONLY).Name()
	restored := small(t)
	restored.Incoming = opened(t, os.O_RDONLY)
	for name, cfg := range map[string]Config{"small": small(t), "large": large(t), "efi": efi, "restored": restored} {
		t.Run(name, func(t *testing.T) {
			c, err := build(t, cfg)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(strings.Join(c.args, "\n"), "\n-", "\n\n-") + "\n"
			if strings.Contains(got, "c2VjcmV0") || strings.Contains(got, "secret\n") {
				t.Error("a secret is on the command line")
			}
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("command line differs from %s; run with -update and look at the change:\n%s", golden, got)
			}
		})
	}
}

// TestInheritedFiles: every descriptor on the command line is a file that QEMU inherits, and none is there twice.
func TestInheritedFiles(t *testing.T) {
	c, err := build(t, large(t))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(c.args, "\n")
	seen := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?:fd=|/self/fd/)(\d+)`).FindAllStringSubmatch(text, -1) {
		if seen[m[1]] {
			t.Errorf("descriptor %s is used twice", m[1])
		}
		seen[m[1]] = true
	}
	if len(seen) != len(c.files) {
		t.Errorf("%d descriptors are used, %d are inherited", len(seen), len(c.files))
	}
}

// TestUniquePlaces: no two devices are at one place of the root bus.
func TestUniquePlaces(t *testing.T) {
	c, err := build(t, large(t))
	if err != nil {
		t.Fatal(err)
	}
	places := map[string]string{}
	for i, arg := range c.args {
		if arg != "-device" {
			continue
		}
		var d struct{ Driver, ID, Bus, Addr string }
		if err := json.Unmarshal([]byte(c.args[i+1]), &d); err != nil {
			t.Fatal(err)
		}
		if d.Addr == "" {
			continue
		}
		if other := places[d.Bus+d.Addr]; other != "" {
			t.Errorf("%s and %s are both at %s %s", other, d.ID, d.Bus, d.Addr)
		}
		places[d.Bus+d.Addr] = d.ID
	}
}

func TestBadMachines(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no processor":   func(c *Config) { c.Machine.CPU.Count = 0 },
		"processors":     func(c *Config) { c.Machine.CPU.Max = 1000 },
		"topology":       func(c *Config) { c.Machine.CPU = machinev1.CPU{Count: 1, Max: 200, CoresPerSocket: 150} },
		"model":          func(c *Config) { c.Machine.CPU.Model = "host,foo=on" },
		"memory":         func(c *Config) { c.Machine.Memory.Bytes = 1 },
		"odd memory":     func(c *Config) { c.Machine.Memory.Bytes = 1<<30 + 1 },
		"pages":          func(c *Config) { c.Machine.Memory.HugePageBytes = 4096 },
		"uuid":           func(c *Config) { c.Machine.BIOSUUID = "x,y" },
		"firmware":       func(c *Config) { c.Machine.Firmware.Type = "coreboot" },
		"secure bios":    func(c *Config) { c.Machine.Firmware.SecureBoot = true },
		"no variables":   func(c *Config) { c.Machine.Firmware.Type = machinev1.EFI },
		"no tpm":         func(c *Config) { c.Machine.Firmware.TPM = true },
		"boot order":     func(c *Config) { c.Machine.BootOrder = []string{"nothing"} },
		"disk name":      func(c *Config) { c.Machine.Disks[0].Name = "a,b" },
		"disk uuid":      func(c *Config) { c.Machine.Disks[0].UUID = "1" },
		"bus":            func(c *Config) { c.Machine.Disks[0].Bus = "usb" },
		"controller":     func(c *Config) { c.Machine.Disks[0].Controller = 9 },
		"unit":           func(c *Config) { c.Machine.Disks[0].Bus, c.Machine.Disks[0].Unit = machinev1.SATA, 6 },
		"two of a name":  func(c *Config) { c.Machine.Disks = append(c.Machine.Disks, c.Machine.Disks[0]) },
		"read-only sata": func(c *Config) { c.Machine.Disks[0].Bus, c.Machine.Disks[0].ReadOnly = machinev1.SATA, true },
		"no volume":      func(c *Config) { c.Disks = nil },
		"writable cd":    func(c *Config) { c.Machine.Disks[0].CDROM = true },
		"nvme cd":        func(c *Config) { c.Machine.Disks[0].CDROM, c.Machine.Disks[0].Bus = true, machinev1.NVMe },
		"shared":         func(c *Config) { c.Machine.Disks[0].Shared = true },
		"nic model":      func(c *Config) { c.Machine.NICs[0].Model = "rtl8139" },
		"multicast":      func(c *Config) { c.Machine.NICs[0].MAC = "ff:ff:ff:ff:ff:ff" },
		"no tap":         func(c *Config) { c.Taps = nil },
		"writable seed":  func(c *Config) { c.Seed = c.Taps["eth0"] },
		"two of an mac": func(c *Config) {
			n := c.Machine.NICs[0]
			n.Name = "eth1"
			c.Machine.NICs = append(c.Machine.NICs, n)
			c.Taps["eth1"] = c.Taps["eth0"]
		},
		"changes nowhere": func(c *Config) { c.Machine.Disks[0].NonPersistent = true; c.Disks["boot"] = rawVolume(t, true) },
		"two in one place": func(c *Config) {
			d := c.Machine.Disks[0]
			d.Name = "b"
			c.Machine.Disks = append(c.Machine.Disks, d)
			c.Disks["b"] = c.Disks["boot"]
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := small(t)
			change(&c)
			_, err := build(t, c)
			if err == nil {
				t.Fatal("taken")
			}
			t.Log(err)
		})
	}
	c := small(t)
	c.Machine.CPU.Count = 0
	if _, err := build(t, c); !errors.Is(err, ErrConfig) {
		t.Errorf("%v", err)
	}
}
