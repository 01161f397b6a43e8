package machinev1

import (
	"encoding/json"
	"strings"
	"testing"
)

// good is a machine with everything in it.
func good() *Machine {
	return &Machine{
		Name: "db-0", Namespace: "team", UID: "1f0e0f6e-9a55-4c09-9d5c-0a8c9f3f4c11", Revision: 3,
		BIOSUUID: "4c4c4544-0051-3010-8052-b4c04f4e3132", InstanceUUID: "4c4c4544-0051-3010-8052-b4c04f4e3133",
		GuestID: "debian12_64Guest", CPU: CPU{Count: 2, Max: 8}, Memory: Memory{Bytes: 1 << 30, Max: 4 << 30},
		Firmware: Firmware{Type: EFI, SecureBoot: true, TPM: true}, BootOrder: []string{"boot", "eth0"},
		Disks: []Disk{
			{Name: "boot", Volume: "default/v1", Bus: SCSI, UUID: "00000000-0000-4000-8000-000000000001"},
			{Name: "cd", Bus: SATA, CDROM: true, UUID: "00000000-0000-4000-8000-000000000002"},
		},
		NICs: []NIC{
			{Name: "eth0", Model: "virtio-net-pci", MAC: "52:54:00:00:00:01", Pod: true, MTU: 1500},
			{
				Name: "eth1", Model: "e1000e", MAC: "52:54:00:00:00:02", Bridge: "br0", VLAN: 7, Addresses: []string{"192.0.2.4/24"},
				Gateway4: "192.0.2.1", Nameservers: []string{"192.0.2.1"}, Search: []string{"example.com"},
				Routes: []Route{{To: "198.51.100.0/24", Via: "192.0.2.9"}},
			},
		},
		Seed: &Seed{Label: "cidata"}, Hostname: "db-0", Domain: "example.com", Stop: Stop{Mode: TrySoft, TimeoutSeconds: 60},
		Restore: &MemoryState{Volume: "default/m1"},
		Operations: []Operation{
			{ID: "op-1", Kind: Snapshot, Memory: &MemoryState{Volume: "default/m2"}, Snapshots: map[string]string{"boot": "s1"}},
			{ID: "op-2", Kind: Reset, Mode: Hard},
		},
	}
}

func TestParse(t *testing.T) {
	data, err := json.Marshal(good())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(data); err != nil {
		t.Error(err)
	}
	if _, err := Parse([]byte(strings.Repeat(" ", MaxBytes) + string(data))); err == nil {
		t.Error("a machine that is too large was taken")
	}
	if _, err := Parse([]byte("{")); err == nil {
		t.Error("half a machine was taken")
	}
}

// TestLabels: vSphere's label of an OVF environment has a space.
func TestLabels(t *testing.T) {
	for label, want := range map[string]bool{"cidata": true, "OVF ENV": true, "A": true, " A": false, "A ": false, "A/B": false, strings.Repeat("A", 33): false} {
		m := good()
		m.Seed.Label = label
		if err := m.Check(); (err == nil) != want {
			t.Errorf("%q: %v", label, err)
		}
	}
}

// TestCheck: every field is checked, and the error names it.
func TestCheck(t *testing.T) {
	for field, spoil := range map[string]func(*Machine){
		"name":                     func(m *Machine) { m.Name = "a b" },
		"namespace":                func(m *Machine) { m.Namespace = "a/b" },
		"uid":                      func(m *Machine) { m.UID = "../x" },
		"revision":                 func(m *Machine) { m.Revision = -1 },
		"biosUUID":                 func(m *Machine) { m.BIOSUUID = "" },
		"instanceUUID":             func(m *Machine) { m.InstanceUUID = "x" },
		"guestID":                  func(m *Machine) { m.GuestID = "a,b" },
		"hostname":                 func(m *Machine) { m.Hostname = "a\nb" },
		"domain":                   func(m *Machine) { m.Domain = "a..b" },
		"seed.label":               func(m *Machine) { m.Seed.Label = "" },
		"cpu.count":                func(m *Machine) { m.CPU.Count = 0 },
		"cpu.max":                  func(m *Machine) { m.CPU.Max = 1 },
		"cpu.coresPerSocket":       func(m *Machine) { m.CPU.CoresPerSocket = -1 },
		"cpu.model":                func(m *Machine) { m.CPU.Model = "max,vmx=on" },
		"memory.bytes":             func(m *Machine) { m.Memory.Bytes = 1<<30 + 1 },
		"memory.max":               func(m *Machine) { m.Memory.Max = 5 },
		"memory.hugePageBytes":     func(m *Machine) { m.Memory.HugePageBytes = 4096 },
		"firmware.type":            func(m *Machine) { m.Firmware.Type = "" },
		"firmware.secureBoot":      func(m *Machine) { m.Firmware.Type = BIOS },
		"firmware.bootDelayMillis": func(m *Machine) { m.Firmware.BootDelayMillis = -1 },
		"disks[0].name":            func(m *Machine) { m.Disks[0].Name = "A" },
		"disks[0].volume":          func(m *Machine) { m.Disks[0].Volume = "" },
		"disks[1].volume":          func(m *Machine) { m.Disks[1].Volume = "a b" },
		"disks[0].bus":             func(m *Machine) { m.Disks[0].Bus = "usb" },
		"disks[0].controller":      func(m *Machine) { m.Disks[0].Controller = 4 },
		"disks[0].unit":            func(m *Machine) { m.Disks[0].Unit = 64 },
		"disks[1].bus":             func(m *Machine) { m.Disks[1].Bus = NVMe },
		"disks[0].uuid":            func(m *Machine) { m.Disks[0].UUID = "1" },
		"disks[0].nonPersistent":   func(m *Machine) { m.Disks[0].Shared, m.Disks[0].NonPersistent = true, true },
		"both have name boot":      func(m *Machine) { m.Disks[1].Name = "boot" },
		"both have uuid":           func(m *Machine) { m.Disks[1].UUID = m.Disks[0].UUID },
		"both have place scsi":     func(m *Machine) { m.Disks[1].Bus = SCSI },
		"nics[0].name":             func(m *Machine) { m.NICs[0].Name = "" },
		"nics[0].model":            func(m *Machine) { m.NICs[0].Model = "virtio" },
		"nics[1].mac":              func(m *Machine) { m.NICs[1].MAC = "53:54:00:00:00:02" },
		"nics[0].bridge":           func(m *Machine) { m.NICs[0].Bridge = "br0" },
		"nics[1].bridge":           func(m *Machine) { m.NICs[1].Bridge = "br0;x" },
		"nics[1].vlan":             func(m *Machine) { m.NICs[1].VLAN = 4095 },
		"nics[0].guestDevice":      func(m *Machine) { m.NICs[0].GuestDevice = "a b" },
		"nics[0].mtu":              func(m *Machine) { m.NICs[0].MTU = 1 },
		"nics[1].addresses[0]":     func(m *Machine) { m.NICs[1].Addresses[0] = "192.0.2.4" },
		"nics[1].gateway4":         func(m *Machine) { m.NICs[1].Gateway4 = "::1" },
		"nics[1].gateway6":         func(m *Machine) { m.NICs[1].Gateway6 = "192.0.2.1" },
		"nics[1].nameservers[0]":   func(m *Machine) { m.NICs[1].Nameservers[0] = "dns" },
		"nics[1].search[0]":        func(m *Machine) { m.NICs[1].Search[0] = "a b" },
		"nics[1].routes[0].to":     func(m *Machine) { m.NICs[1].Routes[0].To = "all" },
		"nics[1].routes[0].via":    func(m *Machine) { m.NICs[1].Routes[0].Via = "" },
		"nics[1].routes[0].metric": func(m *Machine) { m.NICs[1].Routes[0].Metric = -1 },
		"both have the pod's":      func(m *Machine) { m.NICs[1].Pod, m.NICs[1].Bridge, m.NICs[1].VLAN = true, "", 0 },
		"both have MAC address":    func(m *Machine) { m.NICs[1].MAC = m.NICs[0].MAC },
		"bootOrder[0]":             func(m *Machine) { m.BootOrder[0] = "x" },
		"stop.mode":                func(m *Machine) { m.Stop.Mode = "" },
		"stop.timeoutSeconds":      func(m *Machine) { m.Stop.TimeoutSeconds = -1 },
		"restore.volume":           func(m *Machine) { m.Restore.Volume = "" },
		"operations[1].id":         func(m *Machine) { m.Operations[1].ID = "op-1" },
		"operations[1].kind":       func(m *Machine) { m.Operations[1].Kind = "Eject" },
		"operations[1].mode":       func(m *Machine) { m.Operations[1].Mode = "" },
		"operations[0].memory":     func(m *Machine) { m.Operations[0].Kind, m.Operations[0].Memory = Suspend, nil },
		"memory.volume":            func(m *Machine) { m.Operations[0].Memory.Volume = "" },
		"operations[0].quiesce":    func(m *Machine) { m.Operations[0].QuiesceSeconds = -1 },
		"operations[0].snapshots":  func(m *Machine) { m.Operations[0].Snapshots["nope"] = "x" },
		"disks are more":           func(m *Machine) { m.Disks = make([]Disk, MaxDisks+1) },
		"interfaces are more":      func(m *Machine) { m.NICs = make([]NIC, MaxNICs+1) },
		"operations are more":      func(m *Machine) { m.Operations = make([]Operation, MaxOperations+1) },
		"nics[1] has more than 64": func(m *Machine) { m.NICs[1].Search = make([]string, 65) },
	} {
		m := good()
		spoil(m)
		if err := m.Check(); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	data, err := json.Marshal(good())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data)
		if err == nil && (strings.ContainsAny(m.UID, "/.") || m.Memory.Bytes <= 0 || m.CPU.Count <= 0) {
			t.Errorf("%q: %+v", data, m)
		}
	})
}
