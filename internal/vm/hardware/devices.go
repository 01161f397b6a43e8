package hardware

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
)

// device is a device of QEMU's, for -device and device_add.
type device map[string]any

// onRoot puts a device on the root bus.
func (d device) onRoot(slot, function int) device {
	d["bus"], d["addr"] = "pcie.0", fmt.Sprintf("0x%x.0x%x", slot, function)
	return d
}

// behind puts a device behind a root port.
func (d device) behind(port int) device {
	d["bus"], d["addr"] = portID(port), "0x0"
	return d
}

// fixed are the devices that every machine has.
func fixed() []device {
	return []device{
		device{"driver": "VGA", "id": "vga"}.onRoot(slotVGA, 0),
		{"driver": "isa-serial", "id": "serial0", "chardev": "con"},
		device{"driver": "virtio-serial-pci", "id": "vs", "disable-legacy": "on", "max_ports": 2}.onRoot(slotSerial, 0),
		{"driver": "virtserialport", "bus": "vs.0", "nr": 1, "chardev": "agent", "name": "org.qemu.guest_agent.0"},
		device{"driver": "virtio-rng-pci", "id": "rng", "rng": "rng0", "disable-legacy": "on"}.onRoot(slotRNG, 0),
		device{"driver": "qemu-xhci", "id": "usb", "p2": 4, "p3": 4}.onRoot(slotUSB, 0),
		{"driver": "usb-tablet", "id": "tablet", "bus": "usb.0", "port": "1"},
		{"driver": "usb-kbd", "id": "kbd", "bus": "usb.0", "port": "2"},
		{"driver": "pvpanic", "id": "panic"},
	}
}

// rootPort is a PCI Express port for one device. It keeps no range of I/O ports for it, of which there are few.
func rootPort(i int) device {
	d := device{"driver": "pcie-root-port", "id": portID(i), "chassis": i + 1, "slot": i + 1, "io-reserve": 0}
	if i%portsOfSlot == 0 {
		d["multifunction"] = true
	}
	return d.onRoot(slotPorts+i/portsOfSlot, i%portsOfSlot)
}

func scsiController(c int) device {
	return device{"driver": "virtio-scsi-pci", "id": scsiID(c), "disable-legacy": "on", "num_queues": 1}
}

// diskDevice is a disk or CD-ROM drive; node is what is in it, "" for nothing. A disk on NVMe goes behind a port.
func diskDevice(d machinev1.Disk, node string, boot, port int) device {
	dev := device{"id": diskID(d.Name)}
	if node != "" {
		dev["drive"] = node
	}
	if boot > 0 {
		dev["bootindex"] = boot
	}
	if d.Shared {
		dev["share-rw"] = true
	}
	serial := strings.ReplaceAll(d.UUID, "-", "")
	dev["serial"] = serial
	kind := "hd"
	if d.CDROM {
		kind = "cd"
	} else {
		dev["werror"], dev["rerror"] = "enospc", "report"
	}
	switch d.Bus {
	case machinev1.SCSI:
		dev["driver"], dev["bus"] = "scsi-"+kind, scsiID(d.Controller)+".0"
		dev["channel"], dev["scsi-id"], dev["lun"] = 0, d.Unit, 0
		dev["wwn"] = wwn(d.UUID)
		if !d.CDROM {
			dev["rotation_rate"] = 1
		}
	case machinev1.NVMe:
		dev["driver"], dev["serial"] = "nvme", serial[:20]
		delete(dev, "werror")
		delete(dev, "rerror")
		return dev.behind(port)
	case machinev1.SATA, machinev1.IDE:
		bus := fmt.Sprintf("%s.%d", sataID(d.Controller), d.Unit)
		if d.Bus == machinev1.IDE {
			bus = fmt.Sprintf("ide.%d", idePortsController*d.Controller+d.Unit)
		}
		dev["driver"], dev["bus"], dev["unit"] = "ide-"+kind, bus, 0
		dev["serial"], dev["wwn"] = serial[:20], wwn(d.UUID)
		if !d.CDROM {
			dev["rotation_rate"] = 1
		}
	}
	return dev
}

// seedDevice is the CD-ROM drive with the seed.
func seedDevice(bus machinev1.Bus) device {
	if bus == machinev1.SCSI {
		return device{"driver": "scsi-cd", "id": "seed", "bus": scsiID(0) + ".0", "channel": 0, "scsi-id": seedTarget, "lun": 0, "drive": "seed"}
	}
	return device{"driver": "ide-cd", "id": "seed", "bus": fmt.Sprintf("ide.%d", seedPort), "unit": 0, "drive": "seed"}
}

// wwn makes a world wide name of a UUID: NAA type 5, QEMU's vendor, and 36 bits of the UUID's hash.
func wwn(uuid string) uint64 {
	sum := sha256.Sum256([]byte(uuid))
	return 5<<60 | 0x525400<<36 | binary.BigEndian.Uint64(sum[:])>>28
}

func checksum(s string) uint32 { return crc32.ChecksumIEEE([]byte(s)) }

// models are QEMU's network interfaces.
func models() []string {
	return []string{"virtio-net-pci", "e1000e", "vmxnet3", "e1000", "pcnet"}
}

// express tells whether a model is a PCI Express device, which can be plugged while the machine runs.
func express(model string) bool {
	return model == "virtio-net-pci" || model == "e1000e" || model == "vmxnet3"
}

// nicDevice is a network interface, without its place. rom keeps the program to boot from the network.
func nicDevice(n machinev1.NIC, boot int, rom bool) device {
	dev := device{"driver": n.Model, "id": nicID(n.Name), "netdev": netID(n.Name), "mac": n.MAC}
	if !rom {
		dev["romfile"] = ""
	}
	if boot > 0 {
		dev["bootindex"] = boot
	}
	if n.Model == "virtio-net-pci" {
		dev["disable-legacy"] = "on"
		if n.MTU > 0 {
			dev["host_mtu"] = n.MTU
		}
	}
	return dev
}

// memoryBackend is an object of guest memory.
func memoryBackend(bytes, hugePage int64) map[string]any {
	b := map[string]any{"qom-type": "memory-backend-ram", "size": bytes}
	if hugePage > 0 {
		b["qom-type"], b["hugetlb"], b["hugetlbsize"] = "memory-backend-memfd", true, hugePage
	}
	return b
}

// bootOrder is the boot index of disks and network interfaces by device.
func bootOrder(m machinev1.Machine) map[string]int {
	ids := map[string]string{}
	var order []string
	for _, n := range m.NICs {
		ids[n.Name] = nicID(n.Name)
	}
	for _, d := range m.Disks {
		ids[d.Name] = diskID(d.Name)
		order = append(order, d.Name)
	}
	if len(m.BootOrder) > 0 {
		order = m.BootOrder
	}
	if m.Firmware.NetworkBoot {
		for _, n := range m.NICs {
			order = append(slices.Clip(order), n.Name)
		}
	}
	out := map[string]int{}
	for _, name := range order {
		if id := ids[name]; out[id] == 0 {
			out[id] = len(out) + 1
		}
	}
	return out
}

// networkBoot tells whether a network interface may be booted from.
func networkBoot(boot map[string]int, n machinev1.NIC) bool { return boot[nicID(n.Name)] > 0 }

// accelArgs chooses the accelerator.
func accelArgs(a vm.Accel) []string {
	if a == vm.KVM {
		return []string{"-accel", "kvm"}
	}
	return []string{"-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", translated)}
}

// translated is how many MiB of translated code an emulating QEMU keeps. An idle machine holds all of it, with half as
// much again for its bookkeeping. Debian came as far in the same processor time with 16 as with 32.
const translated = 16
