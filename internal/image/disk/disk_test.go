package disk

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// readFAT finds a file the way a firmware does. It knows nothing of fat.go.
func readFAT(t *testing.T, image []byte, name string) []byte {
	t.Helper()
	le := binary.LittleEndian
	reserved, tables, rootEntries := int(le.Uint16(image[14:])), int(image[16]), int(le.Uint16(image[17:]))
	perTable, cluster := int(le.Uint16(image[22:])), int(image[13])*512
	rootAt := (reserved + tables*perTable) * 512
	dataAt := rootAt + rootEntries*32
	if first, second := image[reserved*512:][:perTable*512], image[(reserved+perTable)*512:][:perTable*512]; !bytes.Equal(first, second) {
		t.Fatal("the two tables differ")
	}
	chain := func(first int) (out []byte) {
		for at := first; at >= 2 && at < 0xfff8; at = int(le.Uint16(image[reserved*512+2*at:])) {
			out = append(out, image[dataAt+(at-2)*cluster:][:cluster]...)
		}
		return out
	}
	dir := image[rootAt:dataAt]
	parts := strings.Split(name, "/")
	for i, part := range parts {
		base, ext, _ := strings.Cut(part, ".")
		want := (base + "        ")[:8] + (ext + "   ")[:3]
		var found []byte
		for at := 0; at+32 <= len(dir) && dir[at] != 0; at += 32 {
			if string(dir[at:at+11]) == want {
				found = dir[at : at+32]
			}
		}
		if found == nil {
			t.Fatalf("%s: no %q", name, part)
		}
		content := chain(int(le.Uint16(found[26:])))
		if i == len(parts)-1 {
			return content[:le.Uint32(found[28:])]
		}
		if found[11]&0x10 == 0 || content[0] != '.' || content[32+1] != '.' {
			t.Fatalf("%s: %q is not a directory", name, part)
		}
		dir = content
	}
	return nil
}

// memory is a file in memory.
type memory struct{ data []byte }

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	return copy(m.data[at:], p), nil
}

func TestFAT(t *testing.T) {
	files := map[string][]byte{
		"KERNEL":               bytes.Repeat([]byte("kernel"), 5000),
		"EFI/BOOT/BOOTX64.EFI": bytes.Repeat([]byte{1}, 3*clusterSize),
		"EFI/BOOT/GRUBX64.EFI": []byte("grub"),
		"EFI/DEBIAN/GRUB.CFG":  nil,
	}
	f, err := newFAT("LABEL", files)
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{data: make([]byte, f.size())}
	if err := f.writeTo(m, espSector); err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if got := readFAT(t, m.data, name); !bytes.Equal(got, want) {
			t.Errorf("%s: got %d bytes, want %d", name, len(got), len(want))
		}
	}
	clusters := (f.size()/512 - int64(f.dataSector())) / clusterSectors
	if clusters < 4085 || clusters >= 65525 {
		t.Errorf("%d clusters make it something other than FAT16", clusters)
	}
	for _, wrong := range []string{"lower", "TOOLONGNAME", "A/B.LONG", ""} {
		if _, err := newFAT("L", map[string][]byte{wrong: nil}); err == nil {
			t.Errorf("name %q was taken", wrong)
		}
	}
	if _, err := newFAT("L", map[string][]byte{"BIG": make([]byte, 200<<20)}); err == nil {
		t.Error("a file that is too large was taken")
	}
}

func TestDisk(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	content := append(make([]byte, 1<<20), bytes.Repeat([]byte("x"), 1<<20)...)
	if err := os.WriteFile(data, content, 0o600); err != nil {
		t.Fatal(err)
	}
	esp, err := newFAT("LABEL", map[string][]byte{"A": []byte("a")})
	if err != nil {
		t.Fatal(err)
	}
	boot := bytes.Repeat([]byte{0x90}, 512)
	core := bytes.Repeat([]byte{0x91}, 2000)
	out := filepath.Join(dir, "disk")
	if err := patchGRUB(boot, core); err != nil {
		t.Fatal(err)
	}
	if err := writeDisk(out, boot, core, esp, data, int64(len(content))); err != nil {
		t.Fatal(err)
	}
	disk, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	for _, at := range []int{512, len(disk) - 512} {
		header := bytes.Clone(disk[at : at+92])
		sum := le.Uint32(header[16:])
		copy(header[16:20], make([]byte, 4))
		if string(header[:8]) != "EFI PART" || crc32.ChecksumIEEE(header) != sum {
			t.Fatalf("the header at %d is wrong", at)
		}
		entries := disk[le.Uint64(header[72:])*512:][:128*128]
		if crc32.ChecksumIEEE(entries) != le.Uint32(header[88:]) {
			t.Errorf("the entries of the header at %d are wrong", at)
		}
		if int(le.Uint64(header[24:]))*512 != at {
			t.Errorf("the header at %d says it is at sector %d", at, le.Uint64(header[24:]))
		}
		if first := le.Uint64(entries[2*128+32:]) * 512; !bytes.Equal(disk[first:][:len(content)], content) {
			t.Errorf("partition 3 at %d is not the data", first)
		}
	}
	if disk[510] != 0x55 || disk[450] != 0xee || le.Uint64(disk[bootSectorField:]) != coreSector {
		t.Error("the first sector is wrong")
	}
	if le.Uint64(disk[coreSector*512+coreStartField:]) != coreSector+1 {
		t.Error("GRUB's core image does not know where it is")
	}
}

func TestArchive(t *testing.T) {
	a := archive{entries: map[string]entry{}}
	a.file("etc/a/b", []byte("12345"), 0o644)
	a.link("bin/sh", "busybox")
	got := a.bytes()
	if !bytes.HasPrefix(got, []byte("070701")) || !bytes.Contains(got, []byte("TRAILER!!!")) || len(got)%4 != 0 {
		t.Errorf("got %q", got)
	}
	for _, name := range []string{"bin\x00", "etc\x00", "etc/a\x00", "etc/a/b\x00", "busybox"} {
		if !bytes.Contains(got, []byte(name)) {
			t.Errorf("the archive has no %q", name)
		}
	}
	if strings.Index(string(got), "etc/a\x00") > strings.Index(string(got), "etc/a/b\x00") {
		t.Error("a directory comes after what is in it")
	}
}

func TestModuleOrder(t *testing.T) {
	if _, err := inOrder([]string{"absent"}, nil); err == nil || !strings.Contains(err.Error(), "modules[0]: the kernel has no module absent") {
		t.Errorf("got %v", err)
	}
	if _, err := moduleDependencies([]byte("no ELF")); err == nil {
		t.Error("what is no module was taken")
	}
	if got := moduleName("virtio-rng.ko"); got != "virtio_rng" {
		t.Errorf("got %s", got)
	}
}

func TestRecipe(t *testing.T) {
	for text, says := range map[string]string{
		"kernel: k\ninit: {package: p}\ndata: {label: l, mib: 32}\n":           "",
		"kernel: k\ninit: {package: p}\ndata: {label: l, mib: 32}\nother: 1\n": "other",
		"init: {package: p}\n": "kernel",
		"kernel: k\n":          "init.package",
		"kernel: k\ninit: {package: p}\ndata: {label: 'a b', mib: 32}\n":                "data.label",
		"kernel: k\ninit: {package: p}\ndata: {label: l, mib: 1}\n":                     "data.mib",
		"kernel: k\ninit: {package: p}\ndata: {label: l, mib: 32}\nmodules: [../x]\n":   "modules[0]",
		"kernel: k\ninit: {package: p}\ndata: {label: l, mib: 32}\nfiles: {../a: {}}\n": "files",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, RecipeFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Load(dir)
		if says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says)) {
			t.Errorf("%q: got %v, want something about %q", text, err, says)
		}
	}
}
