package hardware

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/block"
)

// Sets of descriptors: those of volumes begin at a thousand.
const (
	setCode = 1 + iota
	setVars
	setSeed
)

// sockets of QEMU, of which it has the other end.
type endpoints struct{ qmp, console, agent *os.File }

// command is QEMU's command line in the making.
type command struct {
	cfg    *Config
	shape  *shape
	graph  *block.Graph
	launch block.Launch
	args   []string
	files  []*os.File // by descriptor, from 3 on
	own    []*os.File // made here, to be closed
	chains map[string]*block.Chain
	next   int                  // number of the next chain
	scsi   [maxControllers]bool // controllers that there are

	incoming int // descriptor of Config.Incoming in QEMU
}

// newCommand makes the command line. close must be called once QEMU has everything, also after an error.
func newCommand(cfg *Config, s *shape, g *block.Graph, ends endpoints) (*command, error) {
	c := &command{cfg: cfg, shape: s, graph: g, chains: map[string]*block.Chain{}}
	c.launch.Inherit = c.inherit
	c.base(ends)
	if err := c.volumes(); err != nil {
		return c, err
	}
	if err := c.firmware(); err != nil {
		return c, err
	}
	if err := c.devices(); err != nil {
		return c, err
	}
	if cfg.Incoming != nil {
		c.add("-incoming", "defer")
		c.incoming = c.inherit(cfg.Incoming)
	}
	return c, nil
}

func (c *command) close() {
	_ = c.launch.Clear()
	for _, f := range c.own {
		_ = f.Close()
	}
}

func (c *command) add(args ...string) { c.args = append(c.args, args...) }

// inherit notes a file for QEMU and returns its descriptor there.
func (c *command) inherit(f *os.File) int {
	c.files = append(c.files, f)
	return len(c.files) + 2
}

// base is everything but devices and what they use.
func (c *command) base(ends endpoints) {
	m, s := &c.cfg.Machine, c.shape
	c.add(
		c.cfg.QEMU,
		"-name", "atoll,process=atoll-vm",
		"-nodefaults", "-no-user-config", "-vnc", "none,share=force-shared",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", c.machineType(),
	)
	c.add(accelArgs(c.cfg.Accel)...)
	c.add("-cpu", s.CPU, "-smp", topology(m.CPU, s.CPUs))
	c.object(memoryBackend(s.Boot, m.Memory.HugePageBytes), "ram")
	size := fmt.Sprintf("size=%dM", s.Boot>>20)
	if m.Memory.Max > m.Memory.Bytes || m.Memory.Max > s.Boot {
		size += fmt.Sprintf(",slots=%d,maxmem=%dM", memorySlots, m.Memory.Max>>20)
	}
	c.add("-m", size, "-uuid", m.BIOSUUID)
	c.add("-smbios", "type=1,manufacturer=Atoll,product=Virtual Machine,serial="+m.BIOSUUID)
	boot := "strict=on"
	if delay := m.Firmware.BootDelayMillis; delay > 0 || m.Firmware.EnterSetup {
		boot += fmt.Sprintf(",menu=on,splash-time=%d", max(delay, setupMillis(m.Firmware)))
	}
	c.add("-boot", boot, "-rtc", "base="+rtcBase(m.GuestID)+",driftfix=slew", "-action", "panic=none", "-S")
	c.add(
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", c.inherit(ends.qmp)),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=con,fd=%d", c.inherit(ends.console)),
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d", c.inherit(ends.agent)),
		"-object", "rng-builtin,id=rng0",
	)
}

// setupMillis is how long the firmware waits for the keys that open its setup.
func setupMillis(fw machinev1.Firmware) int64 {
	if fw.EnterSetup {
		return setupDelay.Milliseconds()
	}
	return 0
}

// rtcBase is what the hardware clock shows: Windows takes it for local time, and the machine has no time zone but
// the host's.
func rtcBase(guestID string) string {
	if isWindows(guestID) {
		return "localtime"
	}
	return "utc"
}

func isWindows(guestID string) bool { return strings.HasPrefix(guestID, "win") }

func (c *command) machineType() string {
	m, t := &c.cfg.Machine, "q35"
	if c.shape.Type != "" {
		t = c.shape.Type
	}
	t += ",memory-backend=ram,usb=off,vmport=off,smbus=off,dump-guest-core=off"
	sata := "off"
	if c.shape.Seed == machinev1.IDE || slices.ContainsFunc(m.Disks, func(d machinev1.Disk) bool { return d.Bus == machinev1.IDE }) {
		sata = "on"
	}
	smm := "off"
	if m.Firmware.SecureBoot {
		smm = "on"
	}
	t += ",sata=" + sata + ",smm=" + smm
	if m.Firmware.Type == machinev1.EFI {
		t += ",pflash0=code,pflash1=vars"
	}
	return t
}

// firmware adds what EFI is in. SeaBIOS is QEMU's default.
func (c *command) firmware() error {
	if c.cfg.Machine.Firmware.Type != machinev1.EFI {
		return nil
	}
	code, err := os.Open(c.cfg.Firmware.Code)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFirmware, err)
	}
	c.own = append(c.own, code)
	at := len(c.launch.Args)
	if err := c.launch.File(setCode, "codef", code, false, false); err != nil {
		return err
	}
	if err := c.launch.File(setVars, "varsf", c.cfg.NVRAM, true, true); err != nil {
		return err
	}
	for _, name := range []string{"code", "vars"} {
		node := map[string]any{"driver": "raw", "node-name": name, "file": name + "f", "read-only": name == "code"}
		if err := c.launch.Node(node); err != nil {
			return err
		}
	}
	c.add(c.launch.Args[at:]...)
	if c.cfg.Machine.Firmware.SecureBoot {
		c.add("-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1")
	}
	return nil
}

// volumes adds the block nodes of all disks and of the seed.
func (c *command) volumes() error {
	for _, d := range c.cfg.Machine.Disks {
		v, ok := c.cfg.Disks[d.Name]
		if !ok {
			continue
		}
		if d.NonPersistent {
			overlay, err := block.ThrowAway(c.cfg.TempDir, v)
			if err != nil {
				return fmt.Errorf("disk %q: %w", d.Name, err)
			}
			c.own = append(c.own, overlay.File)
			v = onTop(v, overlay)
		}
		chain, err := c.graph.Inherit(&c.launch, fmt.Sprintf("v%d", c.next), v)
		if err != nil {
			return fmt.Errorf("disk %q: %w", d.Name, err)
		}
		c.next++
		c.chains[d.Name] = chain
	}
	if c.cfg.Seed != nil {
		if err := c.launch.File(setSeed, "seed", c.cfg.Seed, false, false); err != nil {
			return err
		}
	}
	c.add(c.launch.Args...)
	return nil
}

// devices adds all devices, those that others are on first.
func (c *command) devices() error {
	m, s := &c.cfg.Machine, c.shape
	all := fixed()
	for i := range s.NumPorts {
		all = append(all, rootPort(i))
	}
	all = append(all, c.controllers()...)
	boot := bootOrder(*m)
	for _, d := range m.Disks {
		node := ""
		if chain := c.chains[d.Name]; chain != nil {
			node = chain.Top()
		}
		all = append(all, diskDevice(d, node, boot[diskID(d.Name)], s.Ports[diskID(d.Name)]))
	}
	if (c.cfg.Seed != nil) != (s.Seed != "") {
		return fmt.Errorf("%w: the machine had a seed when it was saved, or has one only now", ErrMemoryImage)
	}
	if s.Seed != "" {
		all = append(all, seedDevice(s.Seed))
	}
	old := 0
	for _, n := range m.NICs {
		c.add("-netdev", fmt.Sprintf("tap,id=%s,fd=%d", netID(n.Name), c.inherit(c.cfg.Taps[n.Name])))
		dev := nicDevice(n, boot[nicID(n.Name)], networkBoot(boot, n))
		if express(n.Model) {
			dev.behind(s.Ports[nicID(n.Name)])
		} else {
			dev.onRoot(slotOld+old/portsOfSlot, old%portsOfSlot)["multifunction"] = true
			old++
		}
		all = append(all, dev)
	}
	if c.cfg.TPM != nil {
		c.add("-chardev", fmt.Sprintf("socket,id=tpm,fd=%d", c.inherit(c.cfg.TPM)), "-tpmdev", "emulator,id=tpm0,chardev=tpm")
		all = append(all, device{"driver": "tpm-crb", "tpmdev": "tpm0"})
	}
	for _, dev := range all {
		if err := c.device(dev); err != nil {
			return err
		}
	}
	return c.modules()
}

// controllers are those that disks need, and the first SCSI controller always.
func (c *command) controllers() []device {
	var sata [maxControllers]bool
	c.scsi[0] = true
	for _, d := range c.cfg.Machine.Disks {
		switch d.Bus {
		case machinev1.SCSI:
			c.scsi[d.Controller] = true
		case machinev1.SATA:
			sata[d.Controller] = true
		}
	}
	var all []device
	for i := range maxControllers {
		port, plugged := c.shape.Ports[scsiID(i)]
		switch {
		case plugged:
			c.scsi[i] = true
			all = append(all, scsiController(i).behind(port))
		case c.scsi[i]:
			all = append(all, scsiController(i).onRoot(slotSCSI+i, 0))
		}
		if sata[i] {
			all = append(all, device{"driver": "ahci", "id": sataID(i)}.onRoot(slotSATA+i, 0))
		}
	}
	return all
}

// modules adds the memory that was plugged before the machine was saved.
func (c *command) modules() error {
	for i, bytes := range c.shape.DIMMs {
		id := fmt.Sprintf("m%d", i)
		c.object(memoryBackend(bytes, c.cfg.Machine.Memory.HugePageBytes), id)
		if err := c.device(device{"driver": "pc-dimm", "id": fmt.Sprintf("dimm%d", i), "memdev": id}); err != nil {
			return err
		}
	}
	return nil
}

func (c *command) object(options map[string]any, id string) {
	words := []string{options["qom-type"].(string), "id=" + id, fmt.Sprintf("size=%d", options["size"])}
	if page, ok := options["hugetlbsize"]; ok {
		words = append(words, "hugetlb=on", fmt.Sprintf("hugetlbsize=%d", page))
	}
	c.add("-object", strings.Join(words, ","))
}

func (c *command) device(d device) error {
	data, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("describing a device: %w", err)
	}
	c.add("-device", string(data))
	return nil
}

// onTop is a volume with a layer that takes all writes.
func onTop(v vm.Volume, overlay vm.Layer) vm.Volume {
	v.Layers = append(slices.Clip(slices.Clone(v.Layers)), overlay)
	v.ReadOnly = false
	return v
}
