package hardware

import (
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/block"
)

// Bounds of a machine. They are VMware's where there is one.
const (
	maxCPUs        = 255 // that q35 has without an IOMMU
	minMemory      = 32 << 20
	maxMemory      = 900 << 30 // below the 40 bits that a guest may have for addresses
	maxControllers = 4
	scsiUnits      = 64 // of a controller
	nvmeUnits      = 15
	sataUnits      = 6
	ideUnits       = 2
	maxNICs        = 10
	maxMTU         = 65535
)

// bad is an error about a field of the Machine.
func bad(field, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrConfig, field, fmt.Sprintf(format, args...))
}

// withDefaults fills zero fields and refuses what cannot work.
func (c Config) withDefaults() (Config, error) {
	if c.QEMU == "" {
		c.QEMU = vm.DefaultQEMU
	}
	if c.Accel == "" {
		c.Accel = vm.TCG
	}
	if c.Accel != vm.TCG && c.Accel != vm.KVM {
		return c, fmt.Errorf("unknown accelerator %q", c.Accel)
	}
	if c.UID == 0 || c.GID == 0 {
		return c, fmt.Errorf("qemu must not run as uid %d gid %d", c.UID, c.GID)
	}
	m := &c.Machine
	m.CPU.Max = max(m.CPU.Max, m.CPU.Count)
	m.Memory.Max = max(m.Memory.Max, m.Memory.Bytes)
	if m.CPU.CoresPerSocket == 0 {
		m.CPU.CoresPerSocket = m.CPU.Max
	}
	// Both are changed while the machine runs.
	m.Disks, m.NICs = slices.Clone(m.Disks), slices.Clone(m.NICs)
	if err := errors.Join(checkCPU(m.CPU), checkMemory(m.Memory), c.checkFirmware(), c.checkNames()); err != nil {
		return c, err
	}
	return c, errors.Join(c.checkDisks(), c.checkNICs())
}

// words are what may become part of an option of QEMU's.
var (
	uuidForm  = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	nameForm  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	modelForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)
)

func checkCPU(c machinev1.CPU) error {
	switch {
	case c.Count < 1 || c.Max > maxCPUs:
		return bad("cpu", "%d processors, up to %d: a machine has 1 to %d", c.Count, c.Max, maxCPUs)
	case c.CoresPerSocket < 1 || c.CoresPerSocket > maxCPUs:
		return bad("cpu.coresPerSocket", "%d: use 1 to %d", c.CoresPerSocket, maxCPUs)
	case sockets(c)*c.CoresPerSocket > maxCPUs:
		return bad("cpu.coresPerSocket", "%d sockets of %d are more than %d processors", sockets(c), c.CoresPerSocket, maxCPUs)
	case c.Model != "" && !modelForm.MatchString(c.Model):
		return bad("cpu.model", "%q is no name of a model; see qemu-system-x86_64 -cpu help", c.Model)
	}
	return nil
}

// sockets is how many there are for all processors the machine can have.
func sockets(c machinev1.CPU) int { return (c.Max + c.CoresPerSocket - 1) / c.CoresPerSocket }

func checkMemory(m machinev1.Memory) error {
	page := max(m.HugePageBytes, 1<<20)
	switch {
	case m.HugePageBytes != 0 && m.HugePageBytes != 2<<20 && m.HugePageBytes != 1<<30:
		return bad("memory.hugePageBytes", "%d: use 2 MiB, 1 GiB or none", m.HugePageBytes)
	case m.Bytes < minMemory || m.Max > maxMemory:
		return bad("memory", "%d bytes, up to %d: a machine has %d to %d", m.Bytes, m.Max, int64(minMemory), int64(maxMemory))
	case m.Bytes%page != 0 || m.Max%page != 0:
		return bad("memory", "%d bytes, up to %d: use multiples of %d", m.Bytes, m.Max, page)
	}
	return nil
}

func (c *Config) checkFirmware() error {
	fw := c.Machine.Firmware
	switch {
	case fw.Type != machinev1.BIOS && fw.Type != machinev1.EFI:
		return bad("firmware.type", "%q: use bios or efi", fw.Type)
	case fw.SecureBoot && fw.Type != machinev1.EFI:
		return bad("firmware.secureBoot", "needs firmware type efi")
	case fw.TPM != (c.TPM != nil):
		return bad("firmware.tpm", "%v, and a socket of a TPM is given: %v", fw.TPM, c.TPM != nil)
	case fw.BootDelayMillis < 0 || fw.BootDelayMillis > 65535:
		return bad("firmware.bootDelayMillis", "%d: use 0 to 65535", fw.BootDelayMillis)
	}
	if fw.Type == machinev1.BIOS {
		return nil
	}
	if c.NVRAM == nil {
		return bad("firmware", "efi without a file for its variables")
	}
	return block.CheckAccess(c.NVRAM, unix.O_RDWR)
}

func (c *Config) checkNames() error {
	m := &c.Machine
	if !uuidForm.MatchString(m.BIOSUUID) {
		return bad("biosUUID", "%q is no UUID in lower case", m.BIOSUUID)
	}
	names := map[string]bool{}
	add := func(kind, name string) error {
		if !nameForm.MatchString(name) {
			return bad(kind, "the name %q is no DNS label", name)
		}
		if names[kind+name] {
			return bad(kind, "there are two called %q", name)
		}
		names[kind+name], names[name] = true, true
		return nil
	}
	for _, d := range m.Disks {
		if err := add("disks", d.Name); err != nil {
			return err
		}
	}
	for _, n := range m.NICs {
		if err := add("nics", n.Name); err != nil {
			return err
		}
	}
	for _, n := range m.BootOrder {
		if !names[n] {
			return bad("bootOrder", "there is no disk or network interface %q", n)
		}
	}
	return nil
}

func (c *Config) checkDisks() error {
	seen := map[string]string{}
	for _, d := range c.Machine.Disks {
		v, ok := c.Disks[d.Name]
		if !ok && !d.CDROM {
			return bad("disks", "no volume for %q", d.Name)
		}
		if err := checkDisk(d, seen); err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := checkVolume(d, v); err != nil {
			return err
		}
		if d.NonPersistent && c.TempDir == "" {
			return bad("disks", "%q is non-persistent, and there is no directory for its changes", d.Name)
		}
	}
	if c.Seed != nil {
		return block.CheckAccess(c.Seed, unix.O_RDONLY)
	}
	return nil
}

// checkDisk checks one disk against those before it.
func checkDisk(d machinev1.Disk, seen map[string]string) error {
	units := map[machinev1.Bus]int{machinev1.SCSI: scsiUnits, machinev1.NVMe: nvmeUnits, machinev1.SATA: sataUnits, machinev1.IDE: ideUnits}[d.Bus]
	controllers := maxControllers
	if d.Bus == machinev1.IDE {
		controllers = 2
	}
	place := fmt.Sprintf("%s %d:%d", d.Bus, d.Controller, d.Unit)
	switch {
	case units == 0:
		return bad("disks", "%q: unknown bus %q", d.Name, d.Bus)
	case d.Controller < 0 || d.Controller >= controllers || d.Unit < 0 || d.Unit >= units:
		return bad("disks", "%q: there is no place %s; %s has controllers 0 to %d with units 0 to %d",
			d.Name, place, d.Bus, controllers-1, units-1)
	case seen[place] != "":
		return bad("disks", "%q and %q are both at %s", seen[place], d.Name, place)
	case !uuidForm.MatchString(d.UUID):
		return bad("disks", "%q: %q is no UUID in lower case", d.Name, d.UUID)
	case d.CDROM && d.Bus == machinev1.NVMe:
		return bad("disks", "%q: there are no CD-ROM drives on NVMe", d.Name)
	case d.ReadOnly && !d.CDROM && d.Bus != machinev1.SCSI:
		return bad("disks", "%q: a read-only disk must be on the bus scsi", d.Name)
	case d.NonPersistent && (d.CDROM || d.ReadOnly || d.Shared):
		return bad("disks", "%q: only a disk that can be written to by this machine alone can be non-persistent", d.Name)
	case d.Shared && d.Bus == machinev1.NVMe:
		return bad("disks", "%q: a shared disk cannot be on NVMe", d.Name)
	}
	seen[place] = d.Name
	return nil
}

// opensReadOnly tells whether all files of a disk's volume are open for reading only.
func opensReadOnly(d machinev1.Disk) bool { return d.ReadOnly || d.CDROM || d.NonPersistent }

func checkVolume(d machinev1.Disk, v vm.Volume) error {
	if v.ReadOnly != opensReadOnly(d) {
		return bad("disks", "%q: its volume is open for reading only: %v", d.Name, v.ReadOnly)
	}
	if v.Shared != d.Shared {
		return bad("disks", "%q: its volume is shared: %v", d.Name, v.Shared)
	}
	if err := v.Check(); err != nil {
		return fmt.Errorf("disk %q: %w", d.Name, err)
	}
	return nil
}

func (c *Config) checkNICs() error {
	if len(c.Machine.NICs) > maxNICs {
		return bad("nics", "%d: a machine has at most %d", len(c.Machine.NICs), maxNICs)
	}
	macs := map[string]string{}
	for _, n := range c.Machine.NICs {
		if err := checkNIC(n, c.Taps[n.Name]); err != nil {
			return err
		}
		mac, _ := net.ParseMAC(n.MAC)
		if other := macs[mac.String()]; other != "" {
			return bad("nics", "%q and %q have the same MAC address", other, n.Name)
		}
		macs[mac.String()] = n.Name
	}
	return nil
}

func checkNIC(n machinev1.NIC, tap *os.File) error {
	mac, err := net.ParseMAC(n.MAC)
	switch {
	case err != nil || len(mac) != 6 || mac[0]&1 != 0:
		return bad("nics", "%q: %q is no MAC address of one interface", n.Name, n.MAC)
	case !slices.Contains(models(), n.Model):
		return bad("nics", "%q: unknown model %q; use one of %v", n.Name, n.Model, models())
	case n.MTU < 0 || n.MTU > maxMTU:
		return bad("nics", "%q: mtu %d", n.Name, n.MTU)
	case tap == nil:
		return bad("nics", "no tap for %q", n.Name)
	}
	return nil
}
