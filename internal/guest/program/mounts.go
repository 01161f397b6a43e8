package program

import (
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountOptions is what the option list of an OCI mount means.
type mountOptions struct {
	flags       uintptr // for mount(2)
	attrs       uint64  // MOUNT_ATTR_* for mount_setattr(2) on binds
	clear       uint64
	recurseAttr bool
	bind        bool
	recursive   bool
	propagation uint64
	data        []string
}

// mountFlag is one plain option: the bits it sets in mount(2) and in mount_setattr(2).
type mountFlag struct {
	clear bool
	flag  uintptr
	attr  uint64
}

// lookupFlag knows the plain options; a switch, because it runs for every option of every mount.
func lookupFlag(option string) (mountFlag, bool) {
	switch option {
	case "defaults":
		return mountFlag{}, true
	case "ro", "rw":
		return mountFlag{option == "rw", unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY}, true
	case "nosuid", "suid":
		return mountFlag{option == "suid", unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID}, true
	case "nodev", "dev":
		return mountFlag{option == "dev", unix.MS_NODEV, unix.MOUNT_ATTR_NODEV}, true
	case "noexec", "exec":
		return mountFlag{option == "exec", unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC}, true
	case "noatime", "atime":
		return mountFlag{option == "atime", unix.MS_NOATIME, unix.MOUNT_ATTR_NOATIME}, true
	case "nodiratime", "diratime":
		return mountFlag{option == "diratime", unix.MS_NODIRATIME, unix.MOUNT_ATTR_NODIRATIME}, true
	case "strictatime", "nostrictatime":
		return mountFlag{option[0] == 'n', unix.MS_STRICTATIME, unix.MOUNT_ATTR_STRICTATIME}, true
	case "relatime", "norelatime":
		return mountFlag{option[0] == 'n', unix.MS_RELATIME, 0}, true
	case "sync", "async":
		return mountFlag{option == "async", unix.MS_SYNCHRONOUS, 0}, true
	case "dirsync":
		return mountFlag{false, unix.MS_DIRSYNC, 0}, true
	case "silent", "loud":
		return mountFlag{option == "loud", unix.MS_SILENT, 0}, true
	case "lazytime", "nolazytime":
		return mountFlag{option[0] == 'n', unix.MS_LAZYTIME, 0}, true
	}
	return mountFlag{}, false
}

func lookupPropagation(option string) uint64 {
	switch option {
	case "shared", "rshared":
		return unix.MS_SHARED
	case "slave", "rslave":
		return unix.MS_SLAVE
	case "private", "rprivate":
		return unix.MS_PRIVATE
	case "unbindable", "runbindable":
		return unix.MS_UNBINDABLE
	}
	return 0
}

// parseOptions splits OCI mount options into what the kernel's calls want.
func parseOptions(options []string) (mountOptions, error) {
	var m mountOptions
	for _, o := range options {
		if f, ok := lookupFlag(o); ok {
			m.set(f)
			continue
		}
		if f, ok := lookupFlag(strings.TrimPrefix(o, "r")); ok && f.attr != 0 {
			m.set(f)
			m.recurseAttr = true
			continue
		}
		if p := lookupPropagation(o); p != 0 {
			m.propagation = p
			continue
		}
		switch o {
		case "bind":
			m.bind = true
		case "rbind":
			m.bind, m.recursive = true, true
		case "tmpcopyup", "":
		case "remount", "idmap", "ridmap":
			return m, fmt.Errorf("%w: mount option %q", ErrUnsupported, o)
		default:
			m.data = append(m.data, o)
		}
	}
	return m, nil
}

func (m *mountOptions) set(f mountFlag) {
	if f.clear {
		m.flags &^= f.flag
		m.attrs &^= f.attr
		return
	}
	m.flags |= f.flag
	m.attrs |= f.attr
	if f.attr&(unix.MOUNT_ATTR_NOATIME|unix.MOUNT_ATTR_STRICTATIME) != 0 {
		m.clear |= unix.MOUNT_ATTR__ATIME
	}
}

// Bind is what the caller found out about the source of a bind mount.
type Bind struct {
	Root string // existing path in the guest that the source may not leave
	Sub  string // path below Root, "" for Root itself; resolved beneath Root
	Dir  bool   // the source is a directory
}

// openSources clones the sources of all bind mounts into detached mounts, to be moved into place
// after pivot_root. It returns the register of each, by mount index.
func (b *builder) openSources(mounts []specs.Mount, binds map[int]Bind) map[int]uint8 {
	regs := map[int]uint8{}
	how := arg{}
	for i, m := range mounts {
		o, err := parseOptions(m.Options)
		if err != nil {
			b.fail(fmt.Errorf("mount %s: %w", m.Destination, err))
			return nil
		}
		if !o.bind && m.Type != "bind" {
			continue
		}
		src, ok := binds[i]
		if !ok {
			b.fail(fmt.Errorf("%w: no source for the mount on %s", ErrInvalid, m.Destination))
			return nil
		}
		flags := unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC
		if o.recursive {
			flags |= unix.AT_RECURSIVE
		}
		b.do("mounting %q to rootfs at %q: opening source", m.Source, m.Destination)
		if src.Sub == "" {
			regs[i] = b.callReg(unix.SYS_OPEN_TREE, imm(unix.AT_FDCWD), b.str(src.Root), imm(flags))
			continue
		}
		if how.val == 0 {
			how = b.words("{O_PATH, RESOLVE_BENEATH}", unix.O_PATH|unix.O_CLOEXEC, 0,
				unix.RESOLVE_BENEATH|unix.RESOLVE_NO_MAGICLINKS)
		}
		root := b.callReg(unix.SYS_OPEN, b.str(src.Root), imm(unix.O_PATH|unix.O_CLOEXEC))
		fd := b.callReg(unix.SYS_OPENAT2, reg(root), b.str(src.Sub), how, imm(24))
		regs[i] = b.callReg(unix.SYS_OPEN_TREE, reg(fd), b.str(""), imm(flags|unix.AT_EMPTY_PATH))
	}
	return regs
}

// mkdirAll makes a directory in the container unless something is there already.
func (b *builder) mkdirAll(dir string, skipCheck bool) {
	var check *op
	if !skipCheck {
		check = b.call(unix.SYS_ACCESS, b.str(dir), imm(0)).tolerateAll()
		check.flags |= flagOKJump
	}
	for i := 1; i <= len(dir); i++ {
		if i == len(dir) || dir[i] == '/' {
			b.call(unix.SYS_MKDIR, b.str(dir[:i]), imm(0o755)).tolerate(unix.EEXIST)
		}
	}
	if check != nil {
		check.target = b.here()
	}
}

// touch makes an empty file in the container unless something is there already.
func (b *builder) touch(file string) {
	check := b.call(unix.SYS_ACCESS, b.str(file), imm(0)).tolerateAll()
	check.flags |= flagOKJump
	if dir := path.Dir(file); dir != "/" {
		b.mkdirAll(dir, true)
	}
	b.call(unix.SYS_MKNOD, b.str(file), imm(unix.S_IFREG|0o644), imm(0)).tolerate(unix.EEXIST)
	check.target = b.here()
}

// mounts attaches everything in the spec's order, inside the new root. pieces are those that are made already.
func (b *builder) mounts(mounts []specs.Mount, binds map[int]Bind, sources, pieces map[int]uint8) {
	for i, m := range mounts {
		if r, ok := pieces[i]; ok {
			b.do("mounting %q to rootfs at %q", m.Source, m.Destination)
			if strings.Count(m.Destination, "/") == 1 { // the others are within these
				b.mkdirAll(m.Destination, false)
			}
			b.move(r, m.Destination)
			continue
		}
		o, err := parseOptions(m.Options)
		if err != nil {
			b.fail(fmt.Errorf("mount %s: %w", m.Destination, err))
			return
		}
		dest := path.Clean("/" + m.Destination)
		b.do("mounting %q to rootfs at %q", m.Source, m.Destination)
		if src, ok := sources[i]; ok {
			b.bindMount(dest, src, binds[i].Dir, o)
			continue
		}
		if dest == "/" {
			b.fail(fmt.Errorf("%w: mount of %q on /", ErrInvalid, m.Type))
			return
		}
		b.mkdirAll(dest, false)
		b.fileSystem(m, dest, o)
	}
}

func (b *builder) bindMount(dest string, src uint8, dir bool, o mountOptions) {
	if dir {
		b.mkdirAll(dest, false)
	} else {
		b.touch(dest)
	}
	if o.attrs != 0 || o.propagation == unix.MS_SHARED {
		flags := unix.AT_EMPTY_PATH
		if o.recurseAttr {
			flags |= unix.AT_RECURSIVE
		}
		propagation := uint64(0)
		if o.propagation == unix.MS_SHARED {
			propagation = unix.MS_SHARED
		}
		attr := b.words("{mount_attr}",
			o.attrs, o.clear, propagation, 0)
		b.call(unix.SYS_MOUNT_SETATTR, reg(src), b.str(""), imm(flags), attr, imm(32))
	}
	b.move(src, dest)
}

// move attaches a detached mount.
func (b *builder) move(mount uint8, dest string) {
	b.call(unix.SYS_MOVE_MOUNT, reg(mount), b.str(""), imm(unix.AT_FDCWD), b.str(dest),
		imm(unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS))
}

func (b *builder) fileSystem(m specs.Mount, dest string, o mountOptions) {
	fsType, data := m.Type, strings.Join(o.data, ",")
	flags := o.flags
	switch fsType {
	case "proc", "sysfs", "mqueue", "devpts":
	case "tmpfs":
		if dest == "/dev" {
			flags &^= unix.MS_RDONLY // made read-only once it is populated
		}
	case "cgroup", "cgroup2":
		fsType, data = "cgroup2", ""
	default:
		b.fail(fmt.Errorf("%w: file system type %q at %s", ErrUnsupported, m.Type, m.Destination))
		return
	}
	b.call(unix.SYS_MOUNT, b.str(fsType), b.str(dest), b.str(fsType), imm(uint64(flags)), b.str(data))
	if o.propagation == unix.MS_SHARED {
		b.call(unix.SYS_MOUNT, b.str(""), b.str(dest), b.str(""), imm(unix.MS_SHARED), imm(0))
	}
}

// readonlyPaths binds each path on itself, read-only; maskedPaths hides each.
func (b *builder) readonlyPaths(paths []string) {
	attr := b.words("{set MOUNT_ATTR_RDONLY}", unix.MOUNT_ATTR_RDONLY, 0, 0, 0)
	for _, p := range paths {
		b.do("making %q read-only", p)
		mount := b.call(unix.SYS_MOUNT, b.str(p), b.str(p), imm(0), imm(unix.MS_BIND|unix.MS_REC), imm(0)).
			tolerate(unix.ENOENT, unix.ENOTDIR)
		mount.flags |= flagErrJump
		b.call(unix.SYS_MOUNT_SETATTR, imm(unix.AT_FDCWD), b.str(p), imm(unix.AT_RECURSIVE), attr, imm(32))
		mount.target = b.here()
	}
}

func (b *builder) maskedPaths(paths []string) {
	for _, p := range paths {
		b.do("masking %q", p)
		file := b.call(unix.SYS_MOUNT, b.str("/dev/null"), b.str(p), imm(0), imm(unix.MS_BIND), imm(0)).
			tolerate(unix.ENOENT, unix.ENOTDIR)
		file.flags |= flagOKJump
		b.call(unix.SYS_MOUNT, b.str("tmpfs"), b.str(p), b.str("tmpfs"), imm(unix.MS_RDONLY), imm(0)).
			tolerate(unix.ENOENT, unix.ENOTDIR)
		file.target = b.here()
	}
}
