package iso

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"unicode/utf16"
)

// read lists the files of a tree of an image, by following its directories as a system does.
func read(t testing.TB, image []byte, t2 tree) map[string]string {
	t.Helper()
	root := image[(systemArea+int(t2))*sector+156:]
	out := map[string]string{}
	var walk func(record []byte, path string)
	walk = func(record []byte, path string) {
		extent, size := binary.LittleEndian.Uint32(record[2:]), binary.LittleEndian.Uint32(record[10:])
		if e := binary.BigEndian.Uint32(record[6:]); e != extent {
			t.Fatalf("%s: extents %d and %d", path, extent, e)
		}
		data := image[int(extent)*sector:][:size]
		if record[25]&dirFlag == 0 {
			out[strings.TrimPrefix(path, "/")] = string(data)
			return
		}
		for at, n := 0, 0; at < len(data); n++ {
			length := int(data[at])
			if length == 0 { // the rest of the sector is empty
				at = (at/sector + 1) * sector
				continue
			}
			r := data[at : at+length]
			at += length
			if n < 2 {
				continue // . and ..
			}
			walk(r, path+"/"+nameOf(r, t2))
		}
	}
	walk(root, "")
	return out
}

// nameOf is the name that a system shows: Rock Ridge's in the primary tree.
func nameOf(r []byte, t2 tree) string {
	id := r[33 : 33+int(r[32])]
	if t2 == joliet {
		var units []uint16
		for i := 0; i+1 < len(id); i += 2 {
			units = append(units, binary.BigEndian.Uint16(id[i:]))
		}
		return strings.TrimSuffix(string(utf16.Decode(units)), ";1")
	}
	system := r[33+len(id)+(1-len(id)%2):]
	for len(system) > 4 {
		if string(system[:2]) == "NM" {
			return string(system[5:system[2]])
		}
		system = system[system[2]:]
	}
	return "without a name: " + string(id)
}

func TestMake(t *testing.T) {
	files := map[string][]byte{
		"meta-data": []byte("instance-id: x\n"), "user-data": bytes.Repeat([]byte("0123456789"), 500), "network-config": nil,
		"openstack/latest/meta_data.json": []byte("{}"), "openstack/latest/vendor_data.json": []byte("[]"),
		"Ünïcode.TXT": []byte("u"), "autounattend.xml": []byte("<x/>"), "autounattend.xmlx": []byte("<y/>"),
	}
	for i := range 60 { // more than one sector of names
		files[fmt.Sprintf("dir/file-%02d", i)] = []byte{byte(i)}
	}
	image, err := Make("cidata", files)
	if err != nil {
		t.Fatal(err)
	}
	if string(image[systemArea*sector+40:][:8]) != "cidata  " {
		t.Errorf("label %q", image[systemArea*sector+40:][:32])
	}
	for _, tr := range []tree{primary, joliet} {
		got := read(t, image, tr)
		if len(got) != len(files) {
			t.Errorf("tree %d has %d files, want %d", tr, len(got), len(files))
		}
		for name, want := range files {
			if got[name] != string(want) {
				t.Errorf("tree %d: %s: %q", tr, name, got[name])
			}
		}
	}
	again, err := Make("cidata", files)
	if err != nil || !bytes.Equal(image, again) {
		t.Errorf("the same files give other bytes, %v", err)
	}
}

func TestRefused(t *testing.T) {
	for _, name := range []string{"", "/abs", "a//b", "../x", "a/../b", "a;1", strings.Repeat("x", MaxName+1), "1/2/3/4/5/6/7/8"} {
		if _, err := Make("x", map[string][]byte{name: nil}); err == nil || name != "" && !strings.Contains(err.Error(), name[:1]) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := Make("x", map[string][]byte{"a": nil, "a/b": nil}); err == nil {
		t.Error("a file that is a directory was made")
	}
	if _, err := Make("", nil); err == nil {
		t.Error("an image without a label was made")
	}
	if _, err := Make("x", map[string][]byte{"a": make([]byte, MaxBytes+1)}); err == nil {
		t.Error("an image that is too large was made")
	}
}
