package hardware

import (
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/qmp"
)

func TestBootOrder(t *testing.T) {
	m := machinev1.Machine{
		Disks: []machinev1.Disk{{Name: "a"}, {Name: "b"}},
		NICs:  []machinev1.NIC{{Name: "eth0"}},
	}
	check := func(want map[string]int) {
		t.Helper()
		if got := bootOrder(m); !maps.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	}
	check(map[string]int{"disk-a": 1, "disk-b": 2})
	m.BootOrder = []string{"eth0", "b"}
	check(map[string]int{"nic-eth0": 1, "disk-b": 2})
	m.BootOrder, m.Firmware.NetworkBoot = []string{"b"}, true
	check(map[string]int{"disk-b": 1, "nic-eth0": 2})
}

func TestPorts(t *testing.T) {
	c := small(t)
	s, err := c.newShape("")
	if err != nil {
		t.Fatal(err)
	}
	if s.NumPorts != 1+sparePorts || s.Ports["nic-eth0"] != 0 {
		t.Fatalf("%+v", s)
	}
	for i := range sparePorts {
		if p, err := s.takePort(strings.Repeat("x", i+1)); err != nil || p != i+1 {
			t.Errorf("%d, %v", p, err)
		}
	}
	if _, err := s.takePort("one more"); !errors.Is(err, ErrHotPlug) {
		t.Errorf("%v", err)
	}
	delete(s.Ports, "nic-eth0")
	if p, err := s.takePort("again"); err != nil || p != 0 {
		t.Errorf("%d, %v", p, err)
	}
}

// saved is what SaveMemory writes first for a machine.
func saved(t testing.TB, c Config) *os.File {
	t.Helper()
	c, err := c.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.newShape("")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "memory")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := writeHeader(f, header{Machine: c.Machine, Shape: s}); err != nil {
		t.Fatal(err)
	}
	if at, err := f.Seek(0, io.SeekCurrent); err != nil || at != headerBytes {
		t.Fatalf("%d, %v", at, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestHeader(t *testing.T) {
	c := small(t)
	c.Machine.Memory.Max = 4 << 30
	f := saved(t, c)
	m, err := SavedMachine(f)
	if err != nil || m.Name != "small" || len(m.Disks) != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	h, err := readHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	now, err := c.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.fits(&now); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Config, *shape){
		"another machine":  func(c *Config, _ *shape) { c.Machine.UID = "other" },
		"accelerator":      func(c *Config, _ *shape) { c.Accel = vm.KVM },
		"model":            func(c *Config, _ *shape) { c.Machine.CPU.Model = "Nehalem" },
		"topology":         func(c *Config, _ *shape) { c.Machine.CPU.Max = 4 },
		"firmware":         func(c *Config, _ *shape) { c.Machine.Firmware.Type = machinev1.EFI },
		"a disk less":      func(c *Config, _ *shape) { c.Machine.Disks = nil },
		"a disk more":      func(c *Config, _ *shape) { c.Machine.Disks = append(c.Machine.Disks, machinev1.Disk{Name: "x"}) },
		"another mac":      func(c *Config, _ *shape) { c.Machine.NICs[0].MAC = "52:54:00:00:00:02" },
		"too much memory":  func(_ *Config, s *shape) { s.DIMMs = []int64{4 << 30} },
		"negative memory":  func(_ *Config, s *shape) { s.DIMMs = []int64{-(1 << 30), 1 << 30} },
		"overflow":         func(_ *Config, s *shape) { s.DIMMs = []int64{1 << 62, 1 << 62} },
		"processors":       func(_ *Config, s *shape) { s.CPUs = 2 },
		"version":          func(_ *Config, s *shape) { s.Version = 9 },
		"port":             func(_ *Config, s *shape) { s.Ports["x"] = 99 },
		"port taken twice": func(_ *Config, s *shape) { s.Ports["x"] = 0 },
		"type":             func(_ *Config, s *shape) { s.Type = "q35,smm=off" },
	} {
		t.Run(name, func(t *testing.T) {
			other, s := now, h.Shape.clone()
			other.Machine.Disks, other.Machine.NICs = slices.Clone(now.Machine.Disks), slices.Clone(now.Machine.NICs)
			change(&other, s)
			err := (&header{Machine: h.Machine, Shape: s}).fits(&other)
			if !errors.Is(err, ErrMemoryImage) {
				t.Errorf("%v", err)
			}
		})
	}
}

func FuzzHeader(f *testing.F) {
	c := small(f)
	file := saved(f, c)
	good := make([]byte, 4096)
	if _, err := file.ReadAt(good, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(headerMagic + "\x00\x00\x00\x02{}"))
	now, err := c.withDefaults()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := parseHeader(data)
		if err != nil || h.fits(&now) != nil {
			return
		}
		if h.Shape.memory() > now.Machine.Memory.Max || h.Shape.CPUs > now.Machine.CPU.Max {
			t.Errorf("%+v", h.Shape)
		}
	})
}

func TestEvents(t *testing.T) {
	m := &Machine{chains: map[string]string{"v3": "data"}}
	for name, test := range map[string]struct {
		event qmp.Event
		want  Event
		no    bool
	}{
		"reset":    {qmp.Event{Name: "RESET", Data: []byte(`{"guest": true, "reason": "guest-reset"}`)}, Event{Kind: EventReset, Guest: true, Reason: "guest-reset"}, false},
		"shutdown": {qmp.Event{Name: "SHUTDOWN", Data: []byte(`{"guest": true, "reason": "guest-shutdown"}`)}, Event{Kind: EventShutdown, Guest: true, Reason: "guest-shutdown"}, false},
		"full": {
			qmp.Event{Name: "BLOCK_IO_ERROR", Data: []byte(`{"device": "", "node-name": "v3.1", "reason": "No space left on device", "action": "report"}`)},
			Event{Kind: EventIOError, Device: "data", Reason: "No space left on device, report"},
			false,
		},
		"stopped": {
			qmp.Event{Name: "BLOCK_IO_ERROR", Data: []byte(`{"node-name": "v3.1", "nospace": true, "reason": "No space left on device", "action": "stop"}`)},
			Event{Kind: EventFull, Device: "data", Reason: "No space left on device, stop"},
			false,
		},
		"panic":   {qmp.Event{Name: "GUEST_PANICKED", Data: []byte(`{"action": "run"}`)}, Event{Kind: EventPanic, Guest: true}, false},
		"dump":    {qmp.Event{Name: "GUEST_CRASHLOADED", Data: []byte(`{"action": "run"}`)}, Event{Kind: EventPanic, Guest: true, Reason: ReasonDump}, false},
		"unplug":  {qmp.Event{Name: "DEVICE_DELETED", Data: []byte(`{"device": "nic-eth0", "path": "/x"}`)}, Event{Kind: EventUnplug, Device: "eth0"}, false},
		"inner":   {qmp.Event{Name: "DEVICE_DELETED", Data: []byte(`{"path": "/x"}`)}, Event{}, true},
		"tray":    {qmp.Event{Name: "DEVICE_TRAY_MOVED", Data: []byte(`{"device": "", "id": "disk-cd", "tray-open": true}`)}, Event{Kind: EventTray, Device: "cd"}, false},
		"garbage": {qmp.Event{Name: "RESET", Data: []byte(`[]`)}, Event{Kind: EventReset}, false},
		"others":  {qmp.Event{Name: "RTC_CHANGE"}, Event{}, true},
	} {
		got, ok := m.translate(test.event)
		if ok == test.no || ok && got != test.want {
			t.Errorf("%s: %+v, %v", name, got, ok)
		}
	}
	if !m.guest {
		t.Error("it was the guest who powered it off")
	}
}

func TestProcessor(t *testing.T) {
	a := processor([]byte("model name\t: EPYC\nflags\t\t: fpu sse\n"))
	if b := processor([]byte("processor: 0\nmodel name\t: EPYC\nflags\t\t: sse fpu\n\nprocessor: 1\n")); a != b || !strings.HasPrefix(a, "EPYC (") {
		t.Errorf("%q, %q", a, b)
	}
	if b := processor([]byte("model name\t: EPYC\nflags\t\t: fpu sse avx\n")); a == b {
		t.Error("other features, and the same name")
	}
}

func TestWWN(t *testing.T) {
	a, b := wwn(diskUUID(1)), wwn(diskUUID(2))
	if a == b || a>>36 != 0x5525400 || b>>36 != 0x5525400 {
		t.Errorf("%x, %x", a, b)
	}
}
