package library

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/diskimage/ovf"
)

// ExportOptions say what to export.
type ExportOptions struct {
	// Format is one of convert.Formats, or empty for the file as it came.
	Format string
	// Disk is the number of the disk, -1 being all.
	Disk int
	// Name is what the machine of an OVA is called.
	Name string
}

// Defaults of the machine of an OVA whose image does not say them.
const (
	defaultCPUs   = 2
	defaultMemory = 4 << 30
)

// ExportName is a file name for an export.
func ExportName(name, format string) string {
	name = strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '-'
		}
		return r
	}, name)
	if format == "" {
		return name
	}
	return name + "." + format
}

// Scratch makes a directory for a file that is exported; remove it.
func (l *Library) Scratch() (string, error) {
	if err := os.MkdirAll(l.cfg.Dir, 0o700); err != nil {
		return "", fmt.Errorf("exporting: %w", full(err))
	}
	dir, err := os.MkdirTemp(l.cfg.Dir, exportPrefix)
	if err != nil {
		return "", fmt.Errorf("exporting: %w", full(err))
	}
	return dir, nil
}

// Export writes an image into a new file.
func (l *Library) Export(ctx context.Context, id string, o ExportOptions, path string, progress func(done, total int64)) error {
	i, err := l.Item(id)
	if err != nil {
		return err
	}
	if o.Format == "" {
		return l.asItCame(ctx, i, path, progress)
	}
	if err := l.room(i.Bytes); err != nil {
		return err
	}
	var disks []convert.Disk
	for n := range i.Disks {
		if o.Disk >= 0 && n != o.Disk {
			continue
		}
		image, disk, err := l.Open(id, n)
		if err != nil {
			return err
		}
		defer image.File.Close()
		d := convert.Of(image)
		d.Size = disk.Size
		disks = append(disks, d)
	}
	if len(disks) == 0 {
		return fmt.Errorf("%w: the image has %d disks, there is no disk %d", convert.ErrFormat, len(i.Disks), o.Disk)
	}
	if err := convert.Export(ctx, disks, o.Format, machine(i, o.Name), path, progress); err != nil {
		return fmt.Errorf("exporting image %s: %w", o.Name, full(err))
	}
	return nil
}

// machine is that of an OVA.
func machine(i Item, name string) ovf.Machine {
	m := ovf.Machine{Name: name, CPUs: defaultCPUs, Memory: defaultMemory, NICs: 1}
	if m.Name == "" {
		m.Name = i.ID
	}
	o := i.OVF
	if o == nil {
		return m
	}
	if o.CPUs > 0 {
		m.CPUs = o.CPUs
	}
	if o.Memory > 0 {
		m.Memory = o.Memory
	}
	m.OSID, m.OSType, m.Firmware, m.SecureBoot, m.HardwareVersion = o.OSID, o.OSType, o.Firmware, o.SecureBoot, o.HardwareVersion
	m.NICs, m.Product, m.Properties = min(o.NICs, 10), o.Product, o.Properties
	return m
}

// asItCame copies the file that an item has, which all of its disks are in.
func (l *Library) asItCame(ctx context.Context, i Item, path string, progress func(done, total int64)) error {
	for _, d := range i.Disks {
		if d.File != i.Disks[0].File {
			return fmt.Errorf("%w: it was unpacked into several files; choose ova, or one disk and a format", convert.ErrFormat)
		}
	}
	f, err := os.Open(l.path(i.ID, filepath.Base(i.Disks[0].File)))
	if err != nil {
		return fmt.Errorf("exporting image %s: %w", i.ID, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("exporting image %s: %w", i.ID, err)
	}
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("exporting image %s: %w", i.ID, full(err))
	}
	w := &sparse{f: out, limit: info.Size(), room: func(int64) error { return nil }}
	watched := &counter{Writer: w, tell: func(n int64) {
		if progress != nil {
			progress(n, info.Size())
		}
	}}
	_, err = io.CopyBuffer(watched, ctxReader{ctx, f}, make([]byte, 1<<20))
	if err = errors.Join(err, w.finish(), out.Close()); err != nil {
		return fmt.Errorf("exporting image %s: %w", i.ID, full(err))
	}
	return nil
}
