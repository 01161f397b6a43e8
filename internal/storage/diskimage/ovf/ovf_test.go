package ovf

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/testkit/golden"
)

func read(t *testing.T, name string) Descriptor {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	d, err := Read(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestVMware(t *testing.T) {
	d := read(t, "vmware.ovf")
	if d.Name != "photon" || d.OSType != "other3xLinux64Guest" || d.OSID != "100" || d.CPUs != 2 || d.Memory != 2<<30 ||
		d.Firmware != "efi" || !d.SecureBoot || d.HardwareVersion != 13 || d.NICs != 1 {
		t.Errorf("%+v", d)
	}
	want := []Disk{
		{ID: "vmdisk1", Capacity: 16 << 30, File: "photon-disk1.vmdk", Controller: "SCSI"},
		{ID: "vmdisk2", Capacity: 1 << 30, File: "data.vmdk.gz", Gzip: true, Controller: "SATA", Unit: 3},
	}
	if !reflect.DeepEqual(d.Disks, want) {
		t.Errorf("%+v", d.Disks)
	}
	if d.Product != (Product{Product: "Photon", Vendor: "VMware", Version: "5.0", FullVersion: "5.0 build 1"}) {
		t.Errorf("%+v", d.Product)
	}
	properties := []Property{
		{Key: "hostname", Type: "string", Default: "photon", HasDefault: true, UserConfigurable: true, Label: "Host name"},
		{Key: "net.ip.0", Type: "ip", UserConfigurable: true},
		{Key: "vmware-system.os", Type: "string", Default: "linux", HasDefault: true},
	}
	if !reflect.DeepEqual(d.Properties, properties) {
		t.Errorf("%+v", d.Properties)
	}
}

func TestVirtualBox(t *testing.T) {
	d := read(t, "virtualbox.ovf")
	want := []Disk{{ID: "vmdisk1", Capacity: 8 << 30, File: "box-disk001.vmdk", Controller: "SATA"}}
	if d.Name != "box" || d.CPUs != 1 || d.Memory != 1<<30 || !reflect.DeepEqual(d.Disks, want) {
		t.Errorf("%+v", d)
	}
}

func TestRefused(t *testing.T) {
	good, err := os.ReadFile(filepath.Join("testdata", "vmware.ovf"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ old, now, text string }{
		"two":       {"</VirtualSystem>", "</VirtualSystem><VirtualSystem/>", "several machines"},
		"path":      {"photon-disk1.vmdk", "../../etc/passwd", "plain name"},
		"no file":   {`ovf:fileRef="file1"`, `ovf:fileRef="file9"`, "does not name"},
		"capacity":  {`ovf:capacity="16"`, `ovf:capacity="-1"`, "capacity"},
		"overflow":  {`ovf:capacity="16"`, `ovf:capacity="9223372036854775807"`, "capacity"},
		"delta":     {`ovf:fileRef="file1"`, `ovf:fileRef="file1" ovf:parentRef="x"`, "delta"},
		"not xml":   {"<Envelope", "Envelope", ""},
		"chunks":    {`ovf:href="photon-disk1.vmdk"`, `ovf:href="photon-disk1.vmdk" ovf:chunkSize="7"`, "several parts"},
		"too large": {"<Envelope", strings.Repeat(" ", MaxBytes) + "<Envelope", "more than"},
	} {
		_, err := Read(strings.NewReader(strings.Replace(string(good), c.old, c.now, 1)))
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestManifest(t *testing.T) {
	m, err := ReadManifest(strings.NewReader("SHA256(a.ovf)= " + strings.Repeat("A1", 32) + "\r\n\nSHA1 (b.vmdk) = " + strings.Repeat("0", 40) + "\n"))
	if err != nil || m["a.ovf"] != (Sum{"SHA256", strings.Repeat("a1", 32)}) || m["b.vmdk"].Algorithm != "SHA1" {
		t.Errorf("%v, %v", m, err)
	}
	for _, bad := range []string{"MD5(a)= 00", "SHA256(a)= 00", "SHA1(../a)= " + strings.Repeat("0", 40), "hello"} {
		if _, err := ReadManifest(strings.NewReader(bad)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, name := range []string{"vmware.ovf", "virtualbox.ovf"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Read(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		if d.Memory < 0 || d.CPUs < 0 || len(d.Disks) > maxDisks {
			t.Fatalf("%+v", d)
		}
		for _, disk := range d.Disks {
			if disk.Capacity < 0 || disk.File != "" && !plainName(disk.File) {
				t.Fatalf("%+v", disk)
			}
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte("SHA256(a.ovf)= " + strings.Repeat("a1", 32)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := ReadManifest(bytes.NewReader(b)); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
	})
}

func TestWrite(t *testing.T) {
	m := Machine{
		Name: "web <1>", OSID: "96", OSType: "debian12_64Guest", CPUs: 4, Memory: 4<<30 + 1, Firmware: "efi", SecureBoot: true, NICs: 1,
		Disks:   []MachineDisk{{"web-disk1.vmdk", 1000, 8 << 30}, {"web-disk2.vmdk", 2000, 1 << 30}},
		Product: Product{Product: "Web", Version: "1"},
		Properties: []Property{
			{Key: "hostname", Type: "string", Default: `a"b`, HasDefault: true, UserConfigurable: true, Label: "Name"},
		},
	}
	var b bytes.Buffer
	if err := Write(&b, m); err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "written.ovf", b.String())
	d, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	if d.Name != m.Name || d.CPUs != 4 || d.Memory != 4097<<20 || d.Firmware != "efi" || !d.SecureBoot || d.OSType != m.OSType || d.NICs != 1 ||
		d.Product != m.Product || !reflect.DeepEqual(d.Properties, m.Properties) {
		t.Errorf("%+v", d)
	}
	want := []Disk{
		{ID: "vmdisk1", Capacity: 8 << 30, File: "web-disk1.vmdk", Controller: "SCSI"},
		{ID: "vmdisk2", Capacity: 1 << 30, File: "web-disk2.vmdk", Controller: "SCSI", Unit: 1},
	}
	if !reflect.DeepEqual(d.Disks, want) {
		t.Errorf("%+v", d.Disks)
	}
}
