package disk

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

// kernelFiles reads the kernel and those of its modules that the recipe wants,
// in an order in which they can be loaded.
func (b *builder) kernelFiles(ctx context.Context) (kernel []byte, modules []module, err error) {
	all := map[string][]byte{}
	err = b.packages[b.recipe.Kernel].Walk(ctx, func(name string, r io.Reader) error {
		isKernel, isModule := strings.HasPrefix(name, "boot/vmlinuz-"), strings.HasSuffix(name, ".ko")
		if !isKernel && !isModule {
			return nil
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if isKernel {
			kernel = data
		} else {
			all[moduleName(path.Base(name))] = data
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	if kernel == nil {
		return nil, nil, fmt.Errorf("package %s has no kernel", b.recipe.Kernel)
	}
	modules, err = inOrder(b.recipe.Modules, all)
	return kernel, modules, err
}

// module is a kernel module.
type module struct {
	name string // with .ko
	data []byte
}

// moduleName is the name of a module in the kernel's spelling.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(file, ".ko"), "-", "_")
}

// inOrder adds what the wanted modules depend on, each before those that need it.
func inOrder(wanted []string, all map[string][]byte) ([]module, error) {
	var out []module
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if done[name] {
			return nil
		}
		done[name] = true
		data, ok := all[name]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		dependencies, err := moduleDependencies(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, dependency := range dependencies {
			if err := add(dependency); err != nil {
				return fmt.Errorf("module %s: %w", name, err)
			}
		}
		out = append(out, module{name: name + ".ko", data: data})
		return nil
	}
	for i, name := range wanted {
		if err := add(moduleName(name)); err != nil {
			return nil, fmt.Errorf("modules[%d]: %w", i, err)
		}
	}
	return out, nil
}

// moduleDependencies reads "depends=a,b" in the section .modinfo.
func moduleDependencies(data []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		if value, ok := bytes.CutPrefix(entry, []byte("depends=")); ok {
			return strings.FieldsFunc(moduleName(string(value)), func(r rune) bool { return r == ',' }), nil
		}
	}
	return nil, nil
}

// initramfs writes the cpio archive.
func (b *builder) initramfs(ctx context.Context, modules []module) ([]byte, error) {
	shell, err := b.one(ctx, busybox, "bin/busybox")
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(b.init)
	if err != nil {
		return nil, err
	}
	a := archive{entries: map[string]entry{}}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "root", "data", "etc", "bin", "lib/modules", "mnt"} {
		a.dir(dir)
	}
	// The kernel opens it as standard output of pid 1 before /dev is mounted.
	a.entries["dev/console"] = entry{mode: 0o020600, major: 5, minor: 1}
	a.file("init", program, 0o755)
	a.file("bin/busybox", shell, 0o755)
	for _, name := range b.recipe.Busybox {
		a.link("bin/"+name, "busybox")
	}
	for _, name := range b.recipe.Links {
		a.link("bin/"+name, "/init")
	}
	var list strings.Builder
	for _, m := range modules {
		a.file("lib/modules/"+m.name, m.data, 0o644)
		fmt.Fprintln(&list, m.name)
	}
	a.file("lib/modules/list", []byte(list.String()), 0o644)
	for name, file := range b.recipe.Files {
		mode := uint32(0o644)
		if file.Executable {
			mode = 0o755
		}
		a.file(strings.TrimPrefix(name, "/"), []byte(file.Content), mode)
	}
	return a.bytes(), nil
}

// archive is a cpio archive in the making ("newc" format of the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	entries map[string]entry
}

type entry struct {
	mode         uint32
	data         []byte
	major, minor uint32
}

func (a *archive) dir(name string) {
	for ; name != "."; name = path.Dir(name) {
		if _, ok := a.entries[name]; !ok {
			a.entries[name] = entry{mode: 0o040755}
		}
	}
}

func (a *archive) file(name string, data []byte, mode uint32) {
	a.dir(path.Dir(name))
	a.entries[name] = entry{mode: 0o100000 | mode, data: data}
}

func (a *archive) link(name, target string) {
	a.dir(path.Dir(name))
	a.entries[name] = entry{mode: 0o120777, data: []byte(target)}
}

func (a *archive) bytes() []byte {
	var out bytes.Buffer
	write := func(inode int, name string, e entry) {
		const format = "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x"
		fmt.Fprintf(&out, format, inode, e.mode, 0, 0, 1, 0, len(e.data), 0, 0, e.major, e.minor, len(name)+1, 0)
		out.WriteString(name + "\x00")
		out.Write(make([]byte, (4-out.Len()%4)%4))
		out.Write(e.data)
		out.Write(make([]byte, (4-out.Len()%4)%4))
	}
	for i, name := range slices.Sorted(maps.Keys(a.entries)) {
		write(i+1, name, a.entries[name])
	}
	write(0, "TRAILER!!!", entry{})
	return out.Bytes()
}
