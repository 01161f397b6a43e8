// Package modules picks kernel modules for an initramfs, for kernels that do not have everything a
// pod needs built in, such as a distribution's.
//
// It reads the dependencies from the module files themselves, so it needs no depmod. Modules land
// in Dir under names that sort in load order; loading them, in that order, is up to the guest's
// init. Whoever configures a template calls it; the pod kernel of our own needs none.
package modules

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/vm/initramfs"
)

// Dir is where the modules are in the initramfs.
const Dir = "/lib/modules/atoll"

// ForPods are the modules a micro-VM needs: its devices and its file systems.
func ForPods() []string {
	return []string{
		"virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_scsi", "sd_mod",
		"erofs", "overlay", "quota_v2",
	}
}

// ErrNotFound says that the kernel has no such module, neither as a file nor built in.
var ErrNotFound = errors.New("no such kernel module")

// Entries returns initramfs entries for the named modules and all they depend on. dir is the
// kernel's module directory, for example /lib/modules/6.1.0-56-cloud-amd64. Modules that are built
// into the kernel need no file and make no entry.
func Entries(dir string, names ...string) ([]initramfs.Entry, error) {
	p := picker{files: make(map[string]string), builtin: make(map[string]bool), state: make(map[string]int)}
	if err := p.scan(dir); err != nil {
		return nil, fmt.Errorf("looking for kernel modules: %w", err)
	}
	for _, n := range names {
		if err := p.add(canonical(n)); err != nil {
			return nil, fmt.Errorf("adding kernel module %s: %w", n, err)
		}
	}
	return p.entries, nil
}

// picker collects modules in load order.
type picker struct {
	files   map[string]string // path by canonical name
	builtin map[string]bool
	state   map[string]int // 1 being added, 2 added
	entries []initramfs.Entry
}

func (p *picker) scan(dir string) error {
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		p.builtin[canonical(strings.TrimSpace(line))] = true
	}
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(name, ".ko") {
			p.files[canonical(name)] = name
		}
		return err
	})
}

// add adds a module after those it depends on.
func (p *picker) add(name string) error {
	switch {
	case p.state[name] == 2 || p.builtin[name]:
		return nil
	case p.state[name] == 1:
		return fmt.Errorf("%s depends on itself", name)
	}
	file, ok := p.files[name]
	if !ok {
		return fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	p.state[name] = 1
	needs, err := depends(file)
	if err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	for _, n := range needs {
		if err := p.add(canonical(n)); err != nil {
			return err
		}
	}
	p.state[name] = 2
	p.entries = append(p.entries, initramfs.Entry{
		Path: path.Join(Dir, fmt.Sprintf("%03d-%s.ko", len(p.entries), name)), Mode: 0o644, File: file,
	})
	return nil
}

// depends reads the names of the modules that must be loaded before.
func depends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("not a kernel module")
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(data, []byte{0}) {
		if list, ok := strings.CutPrefix(string(field), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}

// canonical is the name by which the kernel knows a module: no directory, no ending, no dashes.
func canonical(name string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(name), ".ko"), "-", "_")
}
