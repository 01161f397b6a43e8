package program

import (
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Container is everything the program of a container's first process is made from.
type Container struct {
	Spec         *specs.Spec
	Rootfs       string       // existing directory in the guest to mount the root on
	Overlay      string       // mount data of the overlay
	Binds        map[int]Bind // for every bind mount of the spec, by index
	Terminal     bool
	Privileged   bool   // may use the device nodes it makes
	Furnished    bool   // the helper has run the program of Furnish
	Seccomp      []byte // array of struct sock_filter
	SeccompFlags uint32
	Home         string // HOME of the user when the environment has none
}

// Exec is an additional process in a running container. The helper finds the container's pidfd on
// TargetFD.
type Exec struct {
	Process      *specs.Process
	Terminal     bool
	Seccomp      []byte
	SeccompFlags uint32
	Home         string
}

// Compile makes the program of a container. The helper is started in the container's cgroup and
// pid namespace, with the guest's root and everything else of init's; stdio on 0, 1, 2, or for a
// terminal a Unix socket on 0 over which it sends the master of the pseudo-terminal.
func (c Container) Compile() (*Program, error) {
	if c.Spec == nil || c.Spec.Process == nil {
		return nil, fmt.Errorf("%w: no process", ErrInvalid)
	}
	b, spec := newBuilder(), c.Spec
	b.start(spec.Process)
	b.do("unsharing namespaces")
	unshare := unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP
	var pieces map[int]uint8
	if c.Furnished {
		pieces = furnished(spec.Mounts)
		unshare = unix.CLONE_NEWNS
	}
	b.call(unix.SYS_UNSHARE, imm(unshare))
	b.do("mounting root file system")
	// The guest's mounts are all private, so there is no propagation to cut first. Unless block volumes
	// are wanted elsewhere than in /dev no device node of the writable layer works; where they are, the
	// device filter of the container's cgroup still does its work.
	flags := unix.MS_NODEV
	if c.Privileged || spec.Linux != nil && slices.ContainsFunc(spec.Linux.Devices, outsideDev) {
		flags = 0
	}
	b.call(unix.SYS_MOUNT, b.str("overlay"), b.str(c.Rootfs), b.str("overlay"), imm(flags), b.str(c.Overlay))
	sources := b.openSources(spec.Mounts, c.Binds)
	b.do("entering root file system")
	b.call(unix.SYS_CHDIR, b.str(c.Rootfs))
	b.call(unix.SYS_PIVOT_ROOT, b.str("."), b.str("."))
	b.call(unix.SYS_UMOUNT2, b.str("."), imm(unix.MNT_DETACH))
	b.call(unix.SYS_CHDIR, b.str("/"))
	b.mounts(spec.Mounts, c.Binds, sources, pieces)
	var linux specs.Linux
	if spec.Linux != nil {
		linux = *spec.Linux
	}
	if ownDev(spec.Mounts) {
		nodes := usualNodes()
		if pieces != nil {
			nodes = nil
		}
		b.devices(nodes, linux.Devices)
		if pieces == nil {
			b.links()
		}
	}
	if c.Terminal {
		b.terminal(spec.Process)
		b.do("mounting console")
		b.touch("/dev/console")
		b.call(unix.SYS_MOUNT, b.str("/dev/pts/0"), b.str("/dev/console"), imm(0), imm(unix.MS_BIND), imm(0))
	}
	b.cwd(spec.Process.Cwd)
	b.finishRoot(spec)
	b.sysctls(linux.Sysctl)
	b.readonlyPaths(linux.ReadonlyPaths)
	b.maskedPaths(linux.MaskedPaths)
	b.process(spec.Process, c.Terminal, c.Home, c.Seccomp, c.SeccompFlags)
	return b.build()
}

// Compile makes the program of an exec.
func (e Exec) Compile() (*Program, error) {
	if e.Process == nil {
		return nil, fmt.Errorf("%w: no process", ErrInvalid)
	}
	b := newBuilder()
	b.start(e.Process)
	b.do("joining container")
	b.call(unix.SYS_SETNS, imm(TargetFD), imm(unix.CLONE_NEWNS|unix.CLONE_NEWCGROUP))
	if e.Terminal {
		b.terminal(e.Process)
	}
	b.process(e.Process, e.Terminal, e.Home, e.Seccomp, e.SeccompFlags)
	return b.build()
}

// Pause is the program of the first process of a pod's shared pid namespace: it does nothing but
// let the kernel reap what is orphaned there.
func Pause() (*Program, error) {
	b := newBuilder()
	b.do("starting pause")
	// struct sigaction: handler SIG_IGN, flags SA_NOCLDWAIT, restorer, mask
	ignore := b.words("{SIG_IGN, SA_NOCLDWAIT}", 1, 2, 0, 0)
	b.call(unix.SYS_RT_SIGACTION, imm(int(unix.SIGCHLD)), ignore, imm(0), imm(8))
	b.call(unix.SYS_SETSID)
	b.call(unix.SYS_PRCTL, imm(unix.PR_SET_NAME), b.str("pause"))
	b.call(unix.SYS_CLOSE_RANGE, imm(0), imm(uint64(1<<32-1)), imm(0))
	wait := b.call(unix.SYS_PAUSE).tolerateAll()
	wait.flags |= flagErrJump
	wait.target = b.here() - 1
	return b.build()
}

// start is common to all programs of user processes.
func (b *builder) start(p *specs.Process) {
	b.do("starting helper")
	b.call(unix.SYS_CLOSE_RANGE, imm(ErrorFD), imm(uint64(1<<32-1)), imm(unix.CLOSE_RANGE_CLOEXEC))
	b.call(unix.SYS_CLOSE, imm(FD))
	b.call(unix.SYS_SETSID)
	b.call(unix.SYS_UMASK, imm(0))
	if p.OOMScoreAdj != nil {
		b.do("setting oom_score_adj")
		b.writeFile("/proc/self/oom_score_adj", fmt.Sprint(*p.OOMScoreAdj))
	}
}

func (b *builder) writeFile(name, content string) {
	fd := b.callReg(unix.SYS_OPEN, b.str(name), imm(unix.O_WRONLY|unix.O_CLOEXEC))
	b.call(unix.SYS_WRITE, reg(fd), b.str(content), imm(len(content)))
	b.call(unix.SYS_CLOSE, reg(fd))
}

// ownDev reports whether /dev is the container's own, to be populated, and not a bind.
func ownDev(mounts []specs.Mount) bool {
	for _, m := range mounts {
		if path.Clean("/"+m.Destination) == "/dev" && m.Type != "bind" {
			return true
		}
	}
	return false
}

// node is a device node to make.
type node struct {
	name string
	dev  uint64
	mode uint32
	uid  uint32
	gid  uint32
}

// usualNodes are those that every container has.
func usualNodes() []node {
	return []node{
		{"/dev/null", unix.Mkdev(1, 3), unix.S_IFCHR | 0o666, 0, 0},
		{"/dev/zero", unix.Mkdev(1, 5), unix.S_IFCHR | 0o666, 0, 0},
		{"/dev/full", unix.Mkdev(1, 7), unix.S_IFCHR | 0o666, 0, 0},
		{"/dev/random", unix.Mkdev(1, 8), unix.S_IFCHR | 0o666, 0, 0},
		{"/dev/urandom", unix.Mkdev(1, 9), unix.S_IFCHR | 0o666, 0, 0},
		{"/dev/tty", unix.Mkdev(5, 0), unix.S_IFCHR | 0o666, 0, 0},
	}
}

// usualLinks are the links that every container has, target first.
func usualLinks() [][2]string {
	return [][2]string{
		{"/proc/self/fd", "/dev/fd"},
		{"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"},
		{"/proc/self/fd/2", "/dev/stderr"},
		{"pts/ptmx", "/dev/ptmx"},
	}
}

// outsideDev tells whether a device is to be on the root file system.
func outsideDev(d specs.LinuxDevice) bool {
	return !strings.HasPrefix(path.Clean("/"+d.Path), "/dev/")
}

// devices makes nodes, and those of the spec.
func (b *builder) devices(nodes []node, extra []specs.LinuxDevice) {
	for _, d := range extra {
		n := node{name: path.Clean("/" + d.Path), dev: unix.Mkdev(uint32(d.Major), uint32(d.Minor)), mode: 0o666}
		switch d.Type {
		case "c", "u":
			n.mode |= unix.S_IFCHR
		case "b":
			n.mode |= unix.S_IFBLK
		case "p":
			n.mode |= unix.S_IFIFO
		default:
			b.fail(fmt.Errorf("%w: device type %q of %s", ErrInvalid, d.Type, d.Path))
		}
		if d.FileMode != nil {
			n.mode = n.mode&unix.S_IFMT | uint32(d.FileMode.Perm())
		}
		if d.UID != nil {
			n.uid = *d.UID
		}
		if d.GID != nil {
			n.gid = *d.GID
		}
		nodes = append(nodes, n)
	}
	for _, n := range nodes {
		b.do("creating device node %s", n.name)
		if dir := path.Dir(n.name); dir != "/dev" {
			b.mkdirAll(dir, false)
		}
		b.call(unix.SYS_MKNOD, b.str(n.name), imm(n.mode), imm(n.dev)).tolerate(unix.EEXIST)
		if n.uid != 0 || n.gid != 0 {
			b.call(unix.SYS_CHOWN, b.str(n.name), imm(n.uid), imm(n.gid))
		}
	}
}

// links makes the usual links.
func (b *builder) links() {
	b.do("creating links in /dev")
	for _, l := range usualLinks() {
		b.call(unix.SYS_SYMLINK, b.str(l[0]), b.str(l[1])).tolerate(unix.EEXIST)
	}
}

// terminal opens a pseudo-terminal in the container's devpts, hands the master to init over the
// socket on descriptor 0, and makes the slave stdio and controlling terminal. It has its size before the process
// can ask for it.
func (b *builder) terminal(p *specs.Process) {
	b.do("opening console")
	flags := imm(unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC)
	master := b.callReg(unix.SYS_OPEN, b.str("/dev/pts/ptmx"), flags)
	b.call(unix.SYS_IOCTL, reg(master), imm(unix.TIOCSPTLCK), b.words("{0}", 0))
	slave := b.callReg(unix.SYS_IOCTL, reg(master), imm(unix.TIOCGPTPEER), flags)
	if size := p.ConsoleSize; size != nil { // rows and columns, 16 bits each
		b.call(unix.SYS_IOCTL, reg(master), imm(unix.TIOCSWINSZ), b.words("{winsize}", uint64(uint16(size.Height))|uint64(uint16(size.Width))<<16))
	}

	b.do("passing console to init")
	cmsg := binary.LittleEndian.AppendUint64(nil, 20)              // cmsg_len
	cmsg = binary.LittleEndian.AppendUint32(cmsg, unix.SOL_SOCKET) // cmsg_level
	cmsg = binary.LittleEndian.AppendUint32(cmsg, unix.SCM_RIGHTS) // cmsg_type
	cmsg = append(cmsg, make([]byte, 8)...)                        // the descriptor, padding
	control := b.bytes(cmsg, 8, "{SCM_RIGHTS}")
	iov := b.words("{iov}", b.str("0").val, 1)
	msg := b.words("{msghdr}", 0, 0, iov.val, 1, control.val, uint64(len(cmsg)), 0)
	b.call(opStore32, arg{val: control.val + 16, addr: true, str: "{&fd}"}, reg(master))
	b.call(unix.SYS_SENDMSG, imm(0), msg, imm(0))

	b.do("setting up console")
	if uid := p.User.UID; uid != 0 {
		b.call(unix.SYS_FCHOWN, reg(slave), imm(uid), imm(uint64(1<<32-1)))
	}
	for fd := range 3 {
		b.call(unix.SYS_DUP2, reg(slave), imm(fd))
	}
	b.call(unix.SYS_IOCTL, imm(0), imm(unix.TIOCSCTTY), imm(0))
}

// cwd makes the working directory, as other runtimes do.
func (b *builder) cwd(dir string) {
	dir = path.Clean("/" + dir)
	if dir == "/" {
		return
	}
	b.do("creating working directory %q", dir)
	b.mkdirAll(dir, false)
}

// finishRoot makes / and /dev read-only where asked.
func (b *builder) finishRoot(spec *specs.Spec) {
	b.do("making root file system read-only")
	attr := b.words("{set MOUNT_ATTR_RDONLY}", unix.MOUNT_ATTR_RDONLY, 0, 0, 0)
	for _, m := range spec.Mounts {
		if path.Clean("/"+m.Destination) != "/dev" || m.Type == "bind" {
			continue
		}
		if o, err := parseOptions(m.Options); err == nil && o.flags&unix.MS_RDONLY != 0 {
			b.call(unix.SYS_MOUNT_SETATTR, imm(unix.AT_FDCWD), b.str("/dev"), imm(0), attr, imm(32))
		}
	}
	if spec.Root != nil && spec.Root.Readonly {
		b.call(unix.SYS_MOUNT_SETATTR, imm(unix.AT_FDCWD), b.str("/"), imm(0), attr, imm(32))
	}
}

// SysctlPath is the file of a sysctl in dotted or slashed notation.
func SysctlPath(name string) (string, error) {
	p := name
	// A slash first means that dots are part of names, as in net/ipv4/conf/eth0.100/forwarding.
	if slash, dot := strings.IndexByte(name, '/'), strings.IndexByte(name, '.'); slash < 0 || dot >= 0 && dot < slash {
		p = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	full := path.Clean("/proc/sys/" + p)
	if name == "" || full != "/proc/sys/"+p || strings.Contains(p, "..") {
		return "", fmt.Errorf("%w: sysctl %q", ErrInvalid, name)
	}
	return full, nil
}

func (b *builder) sysctls(values map[string]string) {
	names := make([]string, 0, len(values))
	for n := range values {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		file, err := SysctlPath(n)
		if err != nil {
			b.fail(err)
			return
		}
		b.do("setting sysctl %s", n)
		b.writeFile(file, values[n])
	}
}
