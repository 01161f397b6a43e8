package machinev1

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// Bounds of a Machine. They are those of the API and of what a host can make.
const (
	MaxBytes      = 192 << 10 // of a Machine as JSON; all annotations of a pod together have 256 KiB
	MaxDisks      = 256
	MaxNICs       = 10
	MaxOperations = 32

	maxCPUs     = 1024
	minMemory   = 16 << 20
	maxMemory   = 16 << 40
	maxText     = 253
	maxList     = 64
	maxSeconds  = 24 * 3600
	maxMillis   = 3600 * 1000
	maxVLAN     = 4094
	minMTU      = 576
	maxMTU      = 65535
	maxIfName   = 15
	hugePage2M  = 2 << 20
	hugePage1G  = 1 << 30
	memoryChunk = 1 << 20
)

var (
	uidText    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,62}$`)
	uuidText   = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	labelText  = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	domainText = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?$`)
	modelText  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)
	volumeText = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_./:@-]{0,190}$`)
	ifText     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)
	seedText   = regexp.MustCompile(`^[A-Za-z0-9_-]([A-Za-z0-9 _-]{0,30}[A-Za-z0-9_-])?$`)
)

// Parse reads a Machine and checks every field. An error names the one that is wrong.
func Parse(data []byte) (*Machine, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("machine: %d bytes are more than %d", len(data), MaxBytes)
	}
	m := &Machine{}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("machine: %w", err)
	}
	return m, m.Check()
}

// Check tells what is wrong with a Machine, if anything.
func (m *Machine) Check() error {
	for _, check := range []func() error{m.identity, m.processors, m.firmware, m.disks, m.nics, m.boot, m.end, m.operations} {
		if err := check(); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
	}
	return nil
}

// wrong is an error about a field.
func wrong(field string, value any, want string) error {
	return fmt.Errorf("%s is %q, not %s", field, fmt.Sprint(value), want)
}

func (m *Machine) identity() error {
	switch {
	case !domainText.MatchString(m.Name) || len(m.Name) > maxText:
		return wrong("name", m.Name, "a name")
	case !labelText.MatchString(m.Namespace):
		return wrong("namespace", m.Namespace, "the name of a namespace")
	case !uidText.MatchString(m.UID):
		return wrong("uid", m.UID, "a uid")
	case m.Revision < 0:
		return wrong("revision", m.Revision, "0 or more")
	case !uuidText.MatchString(m.BIOSUUID):
		return wrong("biosUUID", m.BIOSUUID, "a UUID")
	case m.InstanceUUID != "" && !uuidText.MatchString(m.InstanceUUID):
		return wrong("instanceUUID", m.InstanceUUID, "a UUID")
	case m.GuestID != "" && !modelText.MatchString(m.GuestID):
		return wrong("guestID", m.GuestID, "the id of a guest system")
	case m.Hostname != "" && (!domainText.MatchString(m.Hostname) || len(m.Hostname) > maxText):
		return wrong("hostname", m.Hostname, "a host name")
	case m.Domain != "" && (!domainText.MatchString(m.Domain) || len(m.Domain) > maxText):
		return wrong("domain", m.Domain, "a domain")
	case m.Seed != nil && !seedText.MatchString(m.Seed.Label):
		return wrong("seed.label", m.Seed.Label, "1 to 32 letters, digits, spaces, - and _")
	}
	return nil
}

func (m *Machine) processors() error {
	c, mem := m.CPU, m.Memory
	switch {
	case c.Count < 1 || c.Count > maxCPUs:
		return wrong("cpu.count", c.Count, fmt.Sprintf("1 to %d", maxCPUs))
	case c.Max != 0 && (c.Max < c.Count || c.Max > maxCPUs):
		return wrong("cpu.max", c.Max, fmt.Sprintf("0 or cpu.count to %d", maxCPUs))
	case c.CoresPerSocket < 0 || c.CoresPerSocket > maxCPUs:
		return wrong("cpu.coresPerSocket", c.CoresPerSocket, fmt.Sprintf("0 to %d", maxCPUs))
	case c.Model != "" && !modelText.MatchString(c.Model):
		return wrong("cpu.model", c.Model, "the name of a processor model")
	case mem.Bytes < minMemory || mem.Bytes > maxMemory || mem.Bytes%memoryChunk != 0:
		return wrong("memory.bytes", mem.Bytes, fmt.Sprintf("a multiple of 1 MiB from %d to %d", int64(minMemory), int64(maxMemory)))
	case mem.Max != 0 && (mem.Max < mem.Bytes || mem.Max > maxMemory || mem.Max%memoryChunk != 0):
		return wrong("memory.max", mem.Max, fmt.Sprintf("0 or a multiple of 1 MiB from memory.bytes to %d", int64(maxMemory)))
	case mem.HugePageBytes != 0 && mem.HugePageBytes != hugePage2M && mem.HugePageBytes != hugePage1G:
		return wrong("memory.hugePageBytes", mem.HugePageBytes, "0, 2 MiB or 1 GiB")
	case mem.HugePageBytes != 0 && mem.Bytes%mem.HugePageBytes != 0:
		return wrong("memory.bytes", mem.Bytes, "a multiple of memory.hugePageBytes")
	}
	return nil
}

func (m *Machine) firmware() error {
	f := m.Firmware
	switch {
	case f.Type != BIOS && f.Type != EFI:
		return wrong("firmware.type", f.Type, "bios or efi")
	case f.SecureBoot && f.Type != EFI:
		return wrong("firmware.secureBoot", f.SecureBoot, "possible without firmware.type efi")
	case f.BootDelayMillis < 0 || f.BootDelayMillis > maxMillis:
		return wrong("firmware.bootDelayMillis", f.BootDelayMillis, fmt.Sprintf("0 to %d", maxMillis))
	}
	return nil
}

// place is how many controllers a bus has, and units each of them.
func (b Bus) place() (controllers, units int) {
	switch b {
	case IDE:
		return 2, 2
	case SATA:
		return 4, 30
	case SCSI:
		return 4, 64
	case NVMe:
		return 4, 64
	}
	return 0, 0
}

func (m *Machine) disks() error {
	if len(m.Disks) > MaxDisks {
		return fmt.Errorf("%d disks are more than %d", len(m.Disks), MaxDisks)
	}
	if len(m.Awaiting) > MaxDisks {
		return fmt.Errorf("awaiting has more than %d disks", MaxDisks)
	}
	seen := map[string]string{} // what a disk has for itself, to its field
	for i, d := range m.Disks {
		field := fmt.Sprintf("disks[%d]", i)
		if err := d.check(field); err != nil {
			return err
		}
		own := []string{"name " + d.Name, fmt.Sprintf("place %s %d:%d", d.Bus, d.Controller, d.Unit), "uuid " + strings.ToLower(d.UUID)}
		if d.Volume != "" && !d.ReadOnly && !d.CDROM {
			own = append(own, "volume "+d.Volume)
		}
		for _, what := range own {
			if other, taken := seen[what]; taken {
				return fmt.Errorf("%s and %s both have %s", other, field, what)
			}
			seen[what] = field
		}
	}
	return nil
}

func (d Disk) check(field string) error {
	controllers, units := d.Bus.place()
	switch {
	case !labelText.MatchString(d.Name):
		return wrong(field+".name", d.Name, "1 to 63 characters a-z, 0-9 and -")
	case d.Volume == "" && !d.CDROM:
		return wrong(field+".volume", d.Volume, "empty for anything but a CD-ROM drive")
	case d.Volume != "" && !volumeText.MatchString(d.Volume):
		return wrong(field+".volume", d.Volume, "a volume handle")
	case controllers == 0:
		return wrong(field+".bus", d.Bus, "scsi, nvme, sata or ide")
	case d.Controller < 0 || d.Controller >= controllers:
		return wrong(field+".controller", d.Controller, fmt.Sprintf("0 to %d", controllers-1))
	case d.Unit < 0 || d.Unit >= units:
		return wrong(field+".unit", d.Unit, fmt.Sprintf("0 to %d", units-1))
	case d.CDROM && d.Bus == NVMe:
		return wrong(field+".bus", d.Bus, "a bus for CD-ROM drives")
	case !uuidText.MatchString(d.UUID):
		return wrong(field+".uuid", d.UUID, "a UUID")
	case d.Shared && d.NonPersistent:
		return wrong(field+".nonPersistent", d.NonPersistent, "possible for a shared disk")
	}
	return nil
}

func (m *Machine) nics() error {
	if len(m.NICs) > MaxNICs {
		return fmt.Errorf("%d network interfaces are more than %d", len(m.NICs), MaxNICs)
	}
	seen := map[string]string{}
	for i, n := range m.NICs {
		field := fmt.Sprintf("nics[%d]", i)
		if err := n.check(field); err != nil {
			return err
		}
		own := []string{"name " + n.Name}
		if n.MAC != "" {
			own = append(own, "MAC address "+strings.ToLower(n.MAC))
		}
		if n.Pod {
			own = append(own, "the pod's address")
		}
		for _, what := range own {
			if other, taken := seen[what]; taken {
				return fmt.Errorf("%s and %s both have %s", other, field, what)
			}
			seen[what] = field
		}
	}
	return nil
}

// nicModels are the devices that a network interface can be.
func nicModels() []string { return []string{"virtio-net-pci", "e1000e", "e1000", "vmxnet3", "pcnet"} }

func (n NIC) check(field string) error {
	mac, macErr := net.ParseMAC(n.MAC)
	switch {
	case !labelText.MatchString(n.Name):
		return wrong(field+".name", n.Name, "1 to 63 characters a-z, 0-9 and -")
	case !slices.Contains(nicModels(), n.Model):
		return wrong(field+".model", n.Model, "one of "+strings.Join(nicModels(), ", "))
	case n.MAC == "" && !n.Pod:
		return wrong(field+".mac", n.MAC, "possible without pod")
	case n.MAC != "" && (macErr != nil || len(mac) != 6 || mac[0]&1 != 0 || strings.Trim(n.MAC, "0:") == ""):
		return wrong(field+".mac", n.MAC, "the address of one interface, as in 52:54:00:12:34:56")
	case n.Pod && (n.Bridge != "" || n.VLAN != 0):
		return wrong(field+".bridge", n.Bridge, "possible together with pod")
	case !n.Pod && !isIfName(n.Bridge):
		return wrong(field+".bridge", n.Bridge, "the name of a bridge")
	case n.VLAN < 0 || n.VLAN > maxVLAN:
		return wrong(field+".vlan", n.VLAN, fmt.Sprintf("0 to %d", maxVLAN))
	case n.GuestDevice != "" && !isIfName(n.GuestDevice):
		return wrong(field+".guestDevice", n.GuestDevice, "the name of an interface")
	case n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU):
		return wrong(field+".mtu", n.MTU, fmt.Sprintf("0 or %d to %d", minMTU, maxMTU))
	}
	return n.addresses(field)
}

func isIfName(s string) bool { return len(s) <= maxIfName && ifText.MatchString(s) }

// addresses checks what is configured on an interface.
func (n NIC) addresses(field string) error {
	if max(len(n.Addresses), len(n.Nameservers), len(n.Search), len(n.Routes)) > maxList {
		return fmt.Errorf("%s has more than %d addresses, name servers, search domains or routes", field, maxList)
	}
	for i, a := range n.Addresses {
		if _, err := netip.ParsePrefix(a); err != nil {
			return wrong(fmt.Sprintf("%s.addresses[%d]", field, i), a, "an address with prefix length")
		}
	}
	if a, err := netip.ParseAddr(n.Gateway4); n.Gateway4 != "" && (err != nil || !a.Is4()) {
		return wrong(field+".gateway4", n.Gateway4, "an IPv4 address")
	}
	if a, err := netip.ParseAddr(n.Gateway6); n.Gateway6 != "" && (err != nil || !a.Is6() || a.Zone() != "") {
		return wrong(field+".gateway6", n.Gateway6, "an IPv6 address")
	}
	for i, s := range n.Nameservers {
		if a, err := netip.ParseAddr(s); err != nil || a.Zone() != "" {
			return wrong(fmt.Sprintf("%s.nameservers[%d]", field, i), s, "an address")
		}
	}
	for i, s := range n.Search {
		if !domainText.MatchString(s) || len(s) > maxText {
			return wrong(fmt.Sprintf("%s.search[%d]", field, i), s, "a domain")
		}
	}
	for i, r := range n.Routes {
		_, errTo := netip.ParsePrefix(r.To)
		_, errVia := netip.ParseAddr(r.Via)
		switch {
		case errTo != nil && r.To != "default":
			return wrong(fmt.Sprintf("%s.routes[%d].to", field, i), r.To, `"default" or a network with prefix length`)
		case errVia != nil:
			return wrong(fmt.Sprintf("%s.routes[%d].via", field, i), r.Via, "an address")
		case r.Metric < 0:
			return wrong(fmt.Sprintf("%s.routes[%d].metric", field, i), r.Metric, "0 or more")
		}
	}
	return nil
}

// boot checks that what is to be booted from exists.
func (m *Machine) boot() error {
	for i, name := range m.BootOrder {
		disk := slices.ContainsFunc(m.Disks, func(d Disk) bool { return d.Name == name })
		nic := slices.ContainsFunc(m.NICs, func(n NIC) bool { return n.Name == name })
		if !disk && !nic {
			return wrong(fmt.Sprintf("bootOrder[%d]", i), name, "a disk or network interface of the machine")
		}
	}
	return nil
}

func (m *Machine) end() error {
	s := m.Stop
	switch {
	case s.Mode != Hard && s.Mode != Soft && s.Mode != TrySoft:
		return wrong("stop.mode", s.Mode, "Hard, Soft or TrySoft")
	case s.TimeoutSeconds < 0 || s.TimeoutSeconds > maxSeconds:
		return wrong("stop.timeoutSeconds", s.TimeoutSeconds, fmt.Sprintf("0 to %d", maxSeconds))
	case m.Restore != nil && !volumeText.MatchString(m.Restore.Volume):
		return wrong("restore.volume", m.Restore.Volume, "a volume handle")
	}
	return nil
}

func (m *Machine) operations() error {
	if len(m.Operations) > MaxOperations {
		return fmt.Errorf("%d operations are more than %d", len(m.Operations), MaxOperations)
	}
	seen := map[string]bool{}
	for i, o := range m.Operations {
		field := fmt.Sprintf("operations[%d]", i)
		switch {
		case !uidText.MatchString(o.ID) || seen[o.ID]:
			return wrong(field+".id", o.ID, "a uid of its own")
		case o.Kind != Reset && o.Kind != Suspend && o.Kind != Snapshot:
			return wrong(field+".kind", o.Kind, "Reset, Suspend or Snapshot")
		case o.Kind == Reset && o.Mode != Hard && o.Mode != Soft && o.Mode != TrySoft:
			return wrong(field+".mode", o.Mode, "Hard, Soft or TrySoft")
		case o.Kind == Suspend && o.Mode != "" && o.Mode != Hard && o.Mode != Soft && o.Mode != TrySoft:
			return wrong(field+".mode", o.Mode, "Hard, Soft or TrySoft")
		case o.Kind == Suspend && o.Memory == nil:
			return wrong(field+".memory", "", "missing for Suspend")
		case o.Memory != nil && !volumeText.MatchString(o.Memory.Volume):
			return wrong(field+".memory.volume", o.Memory.Volume, "a volume handle")
		case o.QuiesceSeconds < 0 || o.QuiesceSeconds > maxSeconds:
			return wrong(field+".quiesceSeconds", o.QuiesceSeconds, fmt.Sprintf("0 to %d", maxSeconds))
		}
		seen[o.ID] = true
		for name, id := range o.Snapshots {
			if !slices.ContainsFunc(m.Disks, func(d Disk) bool { return d.Name == name }) || !uidText.MatchString(id) {
				return wrong(field+".snapshots", name+": "+id, "disks of the machine and ids")
			}
		}
	}
	return nil
}
