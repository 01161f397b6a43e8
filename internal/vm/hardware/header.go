package hardware

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// A saved memory begins with a header of a fixed size: a magic word, the length of what follows, and a header as
// JSON. After it comes QEMU's own format.
const (
	headerMagic = "ATOLL-MEMORY-1\n\x00"
	headerBytes = 256 << 10
	headerFixed = len(headerMagic) + 4
)

// header says which machine a saved memory is of. QEMU has the file open for writing while it saves, so that none of
// this can be trusted.
type header struct {
	Machine machinev1.Machine `json:"machine"`
	Shape   *shape            `json:"shape"`
}

// writeHeader writes the header at the current offset.
func writeHeader(f *os.File, h header) error {
	data, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("writing the header of the memory: %w", err)
	}
	if len(data) > headerBytes-headerFixed {
		return errors.New("writing the header of the memory: the machine has too many devices")
	}
	buf := make([]byte, headerBytes)
	n := copy(buf, headerMagic)
	binary.BigEndian.PutUint32(buf[n:], uint32(len(data)))
	copy(buf[headerFixed:], data)
	if _, err := f.Write(buf); err != nil {
		return fmt.Errorf("writing the header of the memory: %w", err)
	}
	return nil
}

// readHeader reads the header at the current offset, and leaves the file behind it.
func readHeader(r io.Reader) (header, error) {
	buf := make([]byte, headerBytes)
	if _, err := io.ReadFull(r, buf); err != nil {
		return header{}, fmt.Errorf("%w: reading its header: %w", ErrMemoryImage, err)
	}
	return parseHeader(buf)
}

func parseHeader(buf []byte) (header, error) {
	if len(buf) < headerFixed || string(buf[:len(headerMagic)]) != headerMagic {
		return header{}, fmt.Errorf("%w: it does not begin like one", ErrMemoryImage)
	}
	n := binary.BigEndian.Uint32(buf[len(headerMagic):])
	if int64(n) > int64(len(buf)-headerFixed) {
		return header{}, fmt.Errorf("%w: a header of %d bytes", ErrMemoryImage, n)
	}
	var h header
	if err := json.Unmarshal(buf[headerFixed:headerFixed+int(n)], &h); err != nil {
		return header{}, fmt.Errorf("%w: reading its header: %w", ErrMemoryImage, err)
	}
	if h.Shape == nil || h.Shape.Ports == nil {
		return header{}, fmt.Errorf("%w: its header is incomplete", ErrMemoryImage)
	}
	return h, nil
}

// SavedMachine reads which machine a saved memory is of, with all that had been added to it: what Config.Machine
// must be like to go on from it. The file's offset stays as it is. The caller compares what matters, since a guest
// could have written it.
func SavedMachine(f *os.File) (machinev1.Machine, error) {
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return machinev1.Machine{}, fmt.Errorf("reading a saved memory: %w", err)
	}
	h, err := readHeader(io.NewSectionReader(f, at, headerBytes))
	if err != nil {
		return machinev1.Machine{}, fmt.Errorf("reading a saved memory: %w", err)
	}
	return h.Machine, nil
}

// fits refuses a memory that the machine of c cannot go on from.
func (h *header) fits(c *Config) error {
	m, s := &c.Machine, h.Shape
	if err := s.check(*m); err != nil {
		return err
	}
	want := cpuArg(s.cpu(m.CPU), c.Accel)
	switch {
	case h.Machine.UID != m.UID:
		return fmt.Errorf("%w: it is of the machine with uid %s", ErrMemoryImage, h.Machine.UID)
	case s.Accel != string(c.Accel):
		return fmt.Errorf("%w: it was saved with the accelerator %s, this host has %s", ErrMemoryImage, s.Accel, c.Accel)
	case s.CPU != want:
		return fmt.Errorf("%w: it was saved with the processor %q, the machine has %q: its class has another cpu.model (spec.configSpec.extraConfig[atoll.dev/cpu-model]) or nestedHVEnabled than then; give the machine its former class, or set its spec.powerState to PoweredOff, which discards the memory", ErrMemoryImage, s.CPU, want)
	case s.hostCPU(m.CPU) && s.Host != hostProcessor():
		return fmt.Errorf("%w: it was saved on a host with another processor, %s; a machine whose class names no processor model, or one of QEMU's, is not bound to one", ErrMemoryImage, s.Host)
	case topology(h.Machine.CPU, s.CPUs) != topology(m.CPU, s.CPUs):
		return fmt.Errorf("%w: the topology of processors has changed", ErrMemoryImage)
	case h.Machine.Memory.Max != m.Memory.Max || h.Machine.Memory.HugePageBytes != m.Memory.HugePageBytes:
		return fmt.Errorf("%w: the limit of memory has changed", ErrMemoryImage)
	case firmwareKind(h.Machine.Firmware) != firmwareKind(m.Firmware):
		return fmt.Errorf("%w: the firmware has changed", ErrMemoryImage)
	}
	return h.sameDevices(m)
}

// firmwareKind is what of the firmware is hardware.
func firmwareKind(f machinev1.Firmware) [3]any { return [3]any{f.Type, f.SecureBoot, f.TPM} }

// sameDevices compares disks and network interfaces.
func (h *header) sameDevices(m *machinev1.Machine) error {
	places := func(m *machinev1.Machine) map[string]string {
		out := map[string]string{}
		for _, d := range m.Disks {
			out["disk "+d.Name] = fmt.Sprint(d.Bus, d.Controller, d.Unit, d.CDROM, d.ReadOnly, d.UUID)
		}
		for _, n := range m.NICs {
			out["network interface "+n.Name] = fmt.Sprint(n.Model, n.MAC, n.MTU)
		}
		return out
	}
	saved, now := places(&h.Machine), places(m)
	for name, place := range saved {
		if now[name] != place {
			return fmt.Errorf("%w: %s was there when it was saved, and is not, or is another", ErrMemoryImage, name)
		}
	}
	for name := range now {
		if saved[name] == "" {
			return fmt.Errorf("%w: %s was not there when it was saved; add it when the machine runs", ErrMemoryImage, name)
		}
	}
	return nil
}
