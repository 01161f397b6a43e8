package hardware

import (
	"fmt"
	"maps"
	"slices"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/hardware/cpumodel"
)

// Places on the root bus. Slots 0 and 31 are the chipset's.
const (
	slotVGA = 1 + iota
	slotSerial
	slotRNG
	slotUSB
	slotSCSI           // and the next ones, one for each controller
	slotSATA           = slotSCSI + maxControllers
	slotOld            = slotSATA + maxControllers // network interfaces that are not PCI Express
	slotPorts          = 24                        // root ports, eight in a slot
	maxPorts           = 32
	sparePorts         = 6  // for what is added while the machine runs
	memorySlots        = 16 // how often memory can be added
	seedPort           = 5  // of the chipset's AHCI controller, for Windows
	seedTarget         = 250
	shapeVersion       = 1
	portsOfSlot        = 8
	idePortsController = 2
)

// shape is what of the hardware does not follow from the Machine alone: where things are that were plugged while it
// ran, and what QEMU made of names that mean something else elsewhere. A saved memory has it, since a machine that
// goes on must have the very same hardware.
type shape struct {
	Version int    `json:"version"`
	QEMU    string `json:"qemu"`           // version of QEMU that it was saved by
	Type    string `json:"type,omitempty"` // QEMU's name of the machine type, with its version
	Accel   string `json:"accel"`
	CPU     string `json:"cpu"`             // argument of -cpu
	Model   string `json:"model,omitempty"` // of processor with features, if it was chosen for a machine that names none
	Host    string `json:"host,omitempty"`  // processor of the host, if CPU depends on it

	CPUs  int     `json:"cpus"`
	Boot  int64   `json:"boot"`            // bytes of memory at boot
	DIMMs []int64 `json:"dimms,omitempty"` // added since

	// Ports says what is behind root ports, by device; NumPorts is how many of them there are.
	Ports    map[string]int `json:"ports"`
	NumPorts int            `json:"numPorts"`
	// Seed is the bus that the seed is on, if there is one. Kernels for clouds know no AHCI, Windows knows no virtio.
	Seed machinev1.Bus `json:"seed,omitempty"`
}

// newShape lays out a machine that boots. The model is what was chosen for one that names none.
func (c *Config) newShape(model string) (*shape, error) {
	m := &c.Machine
	s := &shape{
		Version: shapeVersion, Accel: string(c.Accel), Model: model,
		CPUs: m.CPU.Count, Boot: m.Memory.Bytes, Ports: map[string]int{},
	}
	s.CPU = cpuArg(s.cpu(m.CPU), c.Accel)
	if c.Seed != nil {
		s.Seed = machinev1.SCSI
		if isWindows(m.GuestID) {
			s.Seed = machinev1.IDE
		}
	}
	if s.hostCPU(m.CPU) {
		s.Host = hostProcessor()
	}
	for _, n := range m.NICs {
		if express(n.Model) {
			s.Ports[nicID(n.Name)] = len(s.Ports)
		}
	}
	for _, d := range m.Disks {
		if d.Bus == machinev1.NVMe {
			s.Ports[diskID(d.Name)] = len(s.Ports)
		}
	}
	if len(s.Ports) > maxPorts {
		return nil, bad("disks", "%d network interfaces and NVMe disks; there is room for %d", len(s.Ports), maxPorts)
	}
	s.NumPorts = min(len(s.Ports)+sparePorts, maxPorts)
	return s, nil
}

// takePort finds a free root port for a device.
func (s *shape) takePort(id string) (int, error) {
	used := make([]bool, s.NumPorts)
	for _, p := range s.Ports {
		used[p] = true
	}
	p := slices.Index(used, false)
	if p < 0 {
		return 0, fmt.Errorf("%w: all %d slots for devices that are added while it runs are taken", ErrHotPlug, s.NumPorts)
	}
	s.Ports[id] = p
	return p, nil
}

func (s *shape) clone() *shape {
	c := *s
	c.DIMMs, c.Ports = slices.Clone(s.DIMMs), maps.Clone(s.Ports)
	return &c
}

// memory is all the memory that there is.
func (s *shape) memory() int64 {
	sum := s.Boot
	for _, d := range s.DIMMs {
		sum += d
	}
	return sum
}

// check refuses a shape that a file says and that cannot be: QEMU could have written there.
func (s *shape) check(m machinev1.Machine) error {
	if s.Version != shapeVersion {
		return fmt.Errorf("%w: version %d", ErrMemoryImage, s.Version)
	}
	if s.CPUs < 1 || s.CPUs > m.CPU.Max || s.Boot < minMemory || s.Boot%(1<<20) != 0 || len(s.DIMMs) > memorySlots ||
		s.NumPorts < 0 || s.NumPorts > maxPorts {
		return fmt.Errorf("%w: %d processors, %d bytes of memory and %d modules do not fit the machine",
			ErrMemoryImage, s.CPUs, s.Boot, len(s.DIMMs))
	}
	sum := s.Boot
	for _, d := range s.DIMMs {
		if d <= 0 || d%(1<<20) != 0 || d > m.Memory.Max-sum {
			return fmt.Errorf("%w: its memory is more than the machine may have", ErrMemoryImage)
		}
		sum += d
	}
	if sum > m.Memory.Max {
		return fmt.Errorf("%w: its %d bytes of memory are more than the machine's limit of %d", ErrMemoryImage, sum, m.Memory.Max)
	}
	seen := map[int]bool{}
	for _, p := range s.Ports {
		if p < 0 || p >= s.NumPorts || seen[p] {
			return fmt.Errorf("%w: two devices in one slot", ErrMemoryImage)
		}
		seen[p] = true
	}
	if s.Seed != "" && s.Seed != machinev1.SCSI && s.Seed != machinev1.IDE {
		return fmt.Errorf("%w: a seed on %q", ErrMemoryImage, s.Seed)
	}
	if s.Model != "" && !cpumodel.Baseline(s.Model) {
		return fmt.Errorf("%w: processor model %q", ErrMemoryImage, s.Model)
	}
	if s.Type != "" && !modelForm.MatchString(s.Type) {
		return fmt.Errorf("%w: machine type %q", ErrMemoryImage, s.Type)
	}
	return nil
}

func diskID(name string) string { return "disk-" + name }
func nicID(name string) string  { return "nic-" + name }
func netID(name string) string  { return "net-" + name }
func scsiID(controller int) string {
	return fmt.Sprintf("scsi%d", controller)
}
func sataID(controller int) string { return fmt.Sprintf("sata%d", controller) }
func portID(port int) string       { return fmt.Sprintf("rp%d", port) }
