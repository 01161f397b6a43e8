package modules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// module makes a file that has nothing of a kernel module but its .modinfo section.
func module(t *testing.T, dir, name, depends string) {
	t.Helper()
	names := "\x00.modinfo\x00.shstrtab\x00"
	info := "license=GPL\x00depends=" + depends + "\x00name=" + name + "\x00"
	var b bytes.Buffer
	le := binary.LittleEndian
	head := make([]byte, 64)
	copy(head, "\x7fELF\x02\x01\x01")
	le.PutUint16(head[16:], 1)
	le.PutUint16(head[18:], 62)
	le.PutUint32(head[20:], 1)
	le.PutUint64(head[40:], uint64(64+len(info)+len(names)))
	le.PutUint16(head[52:], 64)
	le.PutUint16(head[58:], 64)
	le.PutUint16(head[60:], 3)
	le.PutUint16(head[62:], 2)
	b.Write(head)
	b.WriteString(info)
	b.WriteString(names)
	for _, s := range [][5]uint64{{}, {1, 1, 2, 64, uint64(len(info))}, {10, 3, 0, uint64(64 + len(info)), uint64(len(names))}} {
		h := make([]byte, 64)
		le.PutUint32(h, uint32(s[0]))
		le.PutUint32(h[4:], uint32(s[1]))
		le.PutUint64(h[8:], s[2])
		le.PutUint64(h[24:], s[3])
		le.PutUint64(h[32:], s[4])
		le.PutUint64(h[48:], 1)
		b.Write(h)
	}
	file := filepath.Join(dir, "kernel", "drivers", name+".ko")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/ext4/ext4.ko\nkernel/lib/crc-x.ko\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	module(t, dir, "virtio-ring", "")
	module(t, dir, "virtio", "virtio_ring")
	module(t, dir, "virtio_pci", "virtio,virtio_ring")
	module(t, dir, "erofs", "crc_x")
	module(t, dir, "a", "b")
	module(t, dir, "b", "a")
	module(t, dir, "orphan", "nobody")
	if err := os.WriteFile(filepath.Join(dir, "kernel", "packed.ko.zst"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestEntriesInLoadOrder(t *testing.T) {
	entries, err := Entries(tree(t), []string{"virtio_pci", "ext4"}, []string{"orphan", "erofs", "nosuch", "virtio"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Path)
	}
	want := "/lib/modules/atoll/000-virtio_ring.ko /lib/modules/atoll/001-virtio.ko " +
		"/lib/modules/atoll/002-virtio_pci.ko /lib/modules/atoll-wanted/003-erofs.ko"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("got %s, want %s", s, want)
	}
}

func TestBadModules(t *testing.T) {
	dir := tree(t)
	for name, want := range map[string]error{"nosuch": ErrNotFound, "orphan": ErrNotFound, "packed": ErrCompressed} {
		if _, err := Entries(dir, []string{name}, nil); !errors.Is(err, want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Entries(dir, nil, []string{"packed"}); !errors.Is(err, ErrCompressed) {
		t.Errorf("a wanted module that is compressed: %v", err)
	}
	if _, err := Entries(dir, []string{"a"}, nil); err == nil {
		t.Error("a circle was taken")
	}
	if _, err := Entries("/nonexistent", []string{"a"}, nil); err == nil {
		t.Error("a missing directory was taken")
	}
}
