package initramfs

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// member is an archive member read back.
type member struct {
	name         string
	mode         uint32
	major, minor uint32
	data         string
}

// parse reads an archive as the kernel's documentation describes it.
func parse(b []byte) ([]member, error) {
	var out []member
	pos := 0
	for {
		if pos%4 != 0 || len(b) < pos+110 || string(b[pos:pos+6]) != "070701" {
			return nil, fmt.Errorf("no header at %d", pos)
		}
		var f [13]int
		for i := range f {
			n, err := strconv.ParseUint(string(b[pos+6+8*i:pos+14+8*i]), 16, 32)
			if err != nil {
				return nil, err
			}
			f[i] = int(n)
		}
		size, nameSize := f[6], f[11]
		name := string(b[pos+110 : pos+110+nameSize])
		if !strings.HasSuffix(name, "\x00") {
			return nil, errors.New("name does not end")
		}
		name = name[:nameSize-1]
		pos = (pos + 110 + nameSize + 3) &^ 3
		if name == "TRAILER!!!" {
			if pos != len(b) {
				return nil, errors.New("bytes after the end")
			}
			return out, nil
		}
		out = append(out, member{name, uint32(f[1]), uint32(f[9]), uint32(f[10]), string(b[pos : pos+size])})
		pos = (pos + size + 3) &^ 3
	}
}

func TestWrite(t *testing.T) {
	host := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(host, []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	entries := []Entry{
		{Path: "/init", Mode: 0o755, File: host},
		{Path: "/a/b/c", Mode: 0o644 | os.ModeSetuid, Content: []byte("12345")},
		{Path: "/a/l", Link: "b/c"},
		{Path: "/dev/console", Mode: 0o600, Device: &Device{Major: 5, Minor: 1}},
		{Path: "/dev/vda", Mode: 0o660, Device: &Device{Block: true, Major: 253}},
		{Path: "/tmp", Mode: 0o777 | os.ModeSticky, Dir: true},
		{Path: "/empty", Mode: 0o600},
	}
	want := []member{
		{"init", unix.S_IFREG | 0o755, 0, 0, "from the host"},
		{"a", unix.S_IFDIR | 0o755, 0, 0, ""},
		{"a/b", unix.S_IFDIR | 0o755, 0, 0, ""},
		{"a/b/c", unix.S_IFREG | 0o4644, 0, 0, "12345"},
		{"a/l", unix.S_IFLNK | 0o777, 0, 0, "b/c"},
		{"dev", unix.S_IFDIR | 0o755, 0, 0, ""},
		{"dev/console", unix.S_IFCHR | 0o600, 5, 1, ""},
		{"dev/vda", unix.S_IFBLK | 0o660, 253, 0, ""},
		{"tmp", unix.S_IFDIR | 0o1777, 0, 0, ""},
		{"empty", unix.S_IFREG | 0o600, 0, 0, ""},
	}
	var a, b bytes.Buffer
	if err := errors.Join(Write(&a, entries), Write(&b, entries)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("the same entries make different archives")
	}
	got, err := parse(a.Bytes())
	if err != nil {
		t.Fatalf("%v\n%s", err, hex.Dump(a.Bytes()))
	}
	if len(got) != len(want) {
		t.Fatalf("%d members: %+v", len(got), got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("member %d is %+v, want %+v", i, got[i], want[i])
		}
	}
}

func TestBadEntries(t *testing.T) {
	for name, entries := range map[string][]Entry{
		"relative":     {{Path: "init"}},
		"not clean":    {{Path: "/a/../b"}},
		"root":         {{Path: "/"}},
		"null byte":    {{Path: "/a\x00b"}},
		"twice":        {{Path: "/a"}, {Path: "/a"}},
		"two kinds":    {{Path: "/a", Link: "x", Dir: true}},
		"no such file": {{Path: "/a", File: "/nonexistent"}},
		"directory":    {{Path: "/a", File: "/"}},
		"too long":     {{Path: "/" + strings.Repeat("x", 5000)}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := Write(&bytes.Buffer{}, entries); err == nil {
				t.Error("taken")
			}
		})
	}
}
