package machine

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func sample() machinev1.Machine {
	return machinev1.Machine{
		Name: "a", UID: "u", Revision: 4, BIOSUUID: "b",
		CPU: machinev1.CPU{Count: 2, Max: 8}, Memory: machinev1.Memory{Bytes: 1 << 30, Max: 4 << 30},
		Firmware:   machinev1.Firmware{Type: machinev1.EFI},
		Disks:      []machinev1.Disk{{Name: "boot", Volume: "v1"}},
		Operations: []machinev1.Operation{{ID: "op"}}, Restore: &machinev1.MemoryState{Volume: "m"}, Seed: &machinev1.Seed{Label: "cidata"},
	}
}

func TestMergeKeepsWhatIsNotBuilt(t *testing.T) {
	running, wanted := sample(), sample()
	wanted.Revision, wanted.Operations, wanted.Restore, wanted.Seed = 0, nil, nil, nil
	merged, pending, changed := Merge(running, wanted)
	if changed || len(pending) > 0 || merged.Revision != 4 || len(merged.Operations) != 1 || merged.Restore == nil || merged.Seed == nil {
		t.Fatalf("%+v, %v, %v", merged, pending, changed)
	}
}

func TestMergeThroughTheAnnotation(t *testing.T) {
	var running machinev1.Machine
	text, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &running); err != nil {
		t.Fatal(err)
	}
	wanted := sample()
	wanted.NICs, wanted.BootOrder = []machinev1.NIC{}, []string{}
	if _, _, changed := Merge(running, wanted); changed {
		t.Fatal("an empty list is a change")
	}
}

func TestMerge(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(*machinev1.Machine)
		pending string
		want    func(machinev1.Machine) bool
	}{
		{"more processors", func(m *machinev1.Machine) { m.CPU.Count, m.CPU.Max = 4, 16 }, "", func(m machinev1.Machine) bool { return m.CPU.Count == 4 && m.CPU.Max == 8 }},
		{"fewer processors", func(m *machinev1.Machine) { m.CPU.Count = 1 }, "1 processors instead of 2", func(m machinev1.Machine) bool { return m.CPU.Count == 2 }},
		{"far more processors", func(m *machinev1.Machine) { m.CPU.Count = 9 }, "more than the 8", func(m machinev1.Machine) bool { return m.CPU.Count == 2 }},
		{"more memory", func(m *machinev1.Machine) { m.Memory.Bytes = 2 << 30 }, "", func(m machinev1.Machine) bool { return m.Memory.Bytes == 2<<30 }},
		{"less memory", func(m *machinev1.Machine) { m.Memory.Bytes = 1 << 29 }, "less memory", func(m machinev1.Machine) bool { return m.Memory.Bytes == 1<<30 }},
		{"firmware", func(m *machinev1.Machine) { m.Firmware.SecureBoot = true }, "firmware", func(m machinev1.Machine) bool { return !m.Firmware.SecureBoot }},
		{"nested", func(m *machinev1.Machine) { m.CPU.Nested = true }, "processor options", func(m machinev1.Machine) bool { return !m.CPU.Nested }},
		{"a disk", func(m *machinev1.Machine) { m.Disks = append(m.Disks, machinev1.Disk{Name: "data"}) }, "", func(m machinev1.Machine) bool { return len(m.Disks) == 2 }},
		{"how to stop", func(m *machinev1.Machine) { m.Stop.Mode = machinev1.Hard }, "", func(m machinev1.Machine) bool { return m.Stop.Mode == machinev1.Hard }},
		{"boot order", func(m *machinev1.Machine) { m.BootOrder = []string{"boot"} }, "order of booting", func(m machinev1.Machine) bool { return len(m.BootOrder) == 0 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			wanted := sample()
			c.change(&wanted)
			merged, pending, changed := Merge(sample(), wanted)
			if text := strings.Join(pending, "; "); !strings.Contains(text, c.pending) || (c.pending == "") != (text == "") {
				t.Errorf("pending %q", text)
			}
			if !c.want(merged) || changed != (c.pending == "") || changed && merged.Revision != 5 {
				t.Errorf("%+v, changed %v", merged, changed)
			}
		})
	}
}

// TestMergeWhileDisksAreAwaited: the order of booting is that of the disks when all are there.
func TestMergeWhileDisksAreAwaited(t *testing.T) {
	running, wanted := sample(), sample()
	running.Awaiting = []string{"data"}
	wanted.Disks, wanted.BootOrder = append(wanted.Disks, machinev1.Disk{Name: "data"}), []string{"data", wanted.Disks[0].Name}
	merged, pending, changed := Merge(running, wanted)
	if len(pending) > 0 || !changed || !slices.Equal(merged.BootOrder, wanted.BootOrder) {
		t.Errorf("%+v, pending %q", merged, pending)
	}
}

func TestNamesOfDisks(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"data", "boot", "cdrom-a", "volume-boot", strings.Repeat("x", 64), strings.Repeat("x", 65)} {
		disk := VolumeDisk(name)
		if seen[disk] || len(disk) > 63 || disk == BootDisk || strings.HasPrefix(disk, cdromPrefix) {
			t.Errorf("%s becomes %s", name, disk)
		}
		seen[disk] = true
	}
	if VolumeDisk("data") != "data" {
		t.Error("an ordinary name has changed")
	}
}
