package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
)

// findBlock looks for a block device with a file system of a kind ("ext4",
// "iso9660", "vfat") and a label, in any case of letters. Partitions come before
// whole disks of the same name only by accident: labels decide.
func findBlock(kind, label string) (string, bool) {
	entries, err := os.ReadDir("/sys/class/block")
	if err != nil {
		return "", false
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), "loop") || strings.HasPrefix(entry.Name(), "ram") {
			continue
		}
		device := filepath.Join("/dev", entry.Name())
		if strings.EqualFold(blockLabel(device, kind), label) {
			return device, true
		}
	}
	return "", false
}

// blockLabel reads the label of a file system, or returns "".
func blockLabel(device, kind string) string {
	file, err := os.Open(device)
	if err != nil {
		return ""
	}
	defer func() { _ = file.Close() }()
	read := func(offset int64, size int) []byte {
		data := make([]byte, size)
		if _, err := file.ReadAt(data, offset); err != nil {
			return nil
		}
		return data
	}
	switch kind {
	case "ext4":
		if block := read(1024, 256); block != nil && block[0x38] == 0x53 && block[0x39] == 0xef {
			return cutLabel(block[0x78 : 0x78+16])
		}
	case "iso9660":
		if block := read(16*2048, 128); block != nil && bytes.Equal(block[1:6], []byte("CD001")) {
			return cutLabel(block[40:72])
		}
	case "vfat":
		block := read(0, 512)
		switch {
		case block == nil || block[510] != 0x55 || block[511] != 0xaa:
		case bytes.HasPrefix(block[54:], []byte("FAT")):
			return cutLabel(block[43:54])
		case bytes.HasPrefix(block[82:], []byte("FAT32")):
			return cutLabel(block[71:82])
		}
	}
	return ""
}

func cutLabel(raw []byte) string {
	if i := bytes.IndexByte(raw, 0); i >= 0 {
		raw = raw[:i]
	}
	return strings.TrimRight(string(raw), " ")
}
