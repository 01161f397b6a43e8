package program

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultNoFile is RLIMIT_NOFILE of processes whose spec sets none, as under other runtimes.
const defaultNoFile = 1 << 20

// process is the last part of every program: rlimits, credentials, seccomp, execve. The order is
// runc's: without no_new_privs the filter needs CAP_SYS_ADMIN, so it comes before the capabilities
// go; with it, as late as possible.
func (b *builder) process(p *specs.Process, terminal bool, home string, seccomp []byte, seccompFlags uint32) {
	b.rlimits(p.Rlimits)
	if p.User.UID != 0 && !terminal {
		b.do("giving stdio to the user")
		for fd := range 3 {
			b.call(unix.SYS_FCHOWN, imm(fd), imm(p.User.UID), imm(uint64(1<<32-1))).tolerateAll()
		}
	}
	b.do("setting umask")
	umask := uint32(0o022)
	if p.User.Umask != nil {
		umask = *p.User.Umask
	}
	b.call(unix.SYS_UMASK, imm(umask))
	if p.NoNewPrivileges {
		b.do("setting no_new_privs")
		b.call(unix.SYS_PRCTL, imm(unix.PR_SET_NO_NEW_PRIVS), imm(1), imm(0), imm(0), imm(0))
	} else {
		b.seccomp(seccomp, seccompFlags)
	}
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if !path.IsAbs(cwd) {
		b.fail(fmt.Errorf("%w: working directory %q is not absolute", ErrInvalid, cwd))
	}
	b.do("chdir to cwd (%q) set in config.json failed", cwd)
	b.call(unix.SYS_CHDIR, b.str(cwd))
	b.credentials(p)
	if p.NoNewPrivileges {
		b.seccomp(seccomp, seccompFlags)
	}
	b.exec(p, home)
}

func (b *builder) rlimits(limits []specs.POSIXRlimit) {
	numbers := map[string]int{
		"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
		"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
		"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
		"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
		"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE,
		"RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
	}
	noFile := false
	for _, l := range limits {
		n, ok := numbers[l.Type]
		if !ok {
			b.fail(fmt.Errorf("%w: rlimit %q", ErrInvalid, l.Type))
			return
		}
		noFile = noFile || n == unix.RLIMIT_NOFILE
		b.do("setting %s", l.Type)
		b.rlimit(n, l.Soft, l.Hard)
	}
	if !noFile {
		b.do("setting RLIMIT_NOFILE")
		b.rlimit(unix.RLIMIT_NOFILE, defaultNoFile, defaultNoFile)
	}
}

func (b *builder) rlimit(n int, soft, hard uint64) {
	b.call(unix.SYS_PRLIMIT64, imm(0), imm(n), b.words("{rlimit}", soft, hard), imm(0))
}

func (b *builder) seccomp(filter []byte, flags uint32) {
	if len(filter) == 0 {
		return
	}
	const insn = 8 // sizeof(struct sock_filter)
	if len(filter)%insn != 0 || len(filter)/insn > 4096 {
		b.fail(fmt.Errorf("%w: seccomp program of %d bytes", ErrInvalid, len(filter)))
		return
	}
	b.do("loading seccomp filter")
	code := b.bytes(filter, 8, "{filter}")
	prog := b.words("{sock_fprog}", uint64(len(filter)/insn), code.val)
	const setModeFilter = 1
	b.call(unix.SYS_SECCOMP, imm(setModeFilter), imm(flags), prog)
}

// credentials drops to the user and capabilities of the spec.
func (b *builder) credentials(p *specs.Process) {
	var caps specs.LinuxCapabilities
	if p.Capabilities != nil {
		caps = *p.Capabilities
	}
	table := capNumbers()
	bounding := capSet(table, caps.Bounding)
	b.do("dropping bounding capabilities")
	for c := range unix.CAP_LAST_CAP + 1 {
		if bounding&(1<<c) == 0 {
			// EINVAL: the kernel does not know that capability.
			b.call(unix.SYS_PRCTL, imm(unix.PR_CAPBSET_DROP), imm(c), imm(0), imm(0), imm(0)).tolerate(unix.EINVAL)
		}
	}
	b.do("setting user")
	if p.User.UID != 0 {
		b.call(unix.SYS_PRCTL, imm(unix.PR_SET_KEEPCAPS), imm(1), imm(0), imm(0), imm(0))
	}
	groups := make([]byte, 0, 4*len(p.User.AdditionalGids))
	for _, g := range p.User.AdditionalGids {
		groups = binary.LittleEndian.AppendUint32(groups, g)
	}
	list := imm(0)
	if len(groups) > 0 {
		list = b.bytes(groups, 8, "{gids}")
	}
	b.call(unix.SYS_SETGROUPS, imm(len(p.User.AdditionalGids)), list)
	b.call(unix.SYS_SETGID, imm(p.User.GID))
	b.call(unix.SYS_SETUID, imm(p.User.UID))

	b.do("setting capabilities")
	const version3 = 0x20080522
	eff, per, inh := capSet(table, caps.Effective), capSet(table, caps.Permitted), capSet(table, caps.Inheritable)
	low := func(hi, lo uint64) uint64 { return lo&0xffffffff | hi<<32 }
	data := b.words("{eff, per, inh}",
		low(per, eff), low(eff>>32, inh), low(inh>>32, per>>32))
	b.call(unix.SYS_CAPSET, b.words("{v3}", version3), data)
	ambient := capSet(table, caps.Ambient)
	for c := range unix.CAP_LAST_CAP + 1 {
		if ambient&(1<<c) != 0 {
			b.call(unix.SYS_PRCTL, imm(unix.PR_CAP_AMBIENT), imm(unix.PR_CAP_AMBIENT_RAISE), imm(c), imm(0), imm(0)).
				tolerate(unix.EPERM)
		}
	}
}

// capSet is the bit mask of capability names. Names this kernel generation does not know are left
// out, as other runtimes do.
func capSet(table map[string]int, names []string) uint64 {
	var set uint64
	for _, n := range names {
		if c, ok := table[n]; ok {
			set |= 1 << c
		}
	}
	return set
}

func capNumbers() map[string]int {
	return map[string]int{
		"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH,
		"CAP_FOWNER": unix.CAP_FOWNER, "CAP_FSETID": unix.CAP_FSETID, "CAP_KILL": unix.CAP_KILL,
		"CAP_SETGID": unix.CAP_SETGID, "CAP_SETUID": unix.CAP_SETUID, "CAP_SETPCAP": unix.CAP_SETPCAP,
		"CAP_LINUX_IMMUTABLE": unix.CAP_LINUX_IMMUTABLE, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE, "CAP_NET_BROADCAST": unix.CAP_NET_BROADCAST,
		"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_RAW": unix.CAP_NET_RAW, "CAP_IPC_LOCK": unix.CAP_IPC_LOCK,
		"CAP_IPC_OWNER": unix.CAP_IPC_OWNER, "CAP_SYS_MODULE": unix.CAP_SYS_MODULE, "CAP_SYS_RAWIO": unix.CAP_SYS_RAWIO,
		"CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT, "CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE, "CAP_SYS_PACCT": unix.CAP_SYS_PACCT,
		"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_SYS_BOOT": unix.CAP_SYS_BOOT, "CAP_SYS_NICE": unix.CAP_SYS_NICE,
		"CAP_SYS_RESOURCE": unix.CAP_SYS_RESOURCE, "CAP_SYS_TIME": unix.CAP_SYS_TIME, "CAP_SYS_TTY_CONFIG": unix.CAP_SYS_TTY_CONFIG,
		"CAP_MKNOD": unix.CAP_MKNOD, "CAP_LEASE": unix.CAP_LEASE, "CAP_AUDIT_WRITE": unix.CAP_AUDIT_WRITE,
		"CAP_AUDIT_CONTROL": unix.CAP_AUDIT_CONTROL, "CAP_SETFCAP": unix.CAP_SETFCAP, "CAP_MAC_OVERRIDE": unix.CAP_MAC_OVERRIDE,
		"CAP_MAC_ADMIN": unix.CAP_MAC_ADMIN, "CAP_SYSLOG": unix.CAP_SYSLOG, "CAP_WAKE_ALARM": unix.CAP_WAKE_ALARM,
		"CAP_BLOCK_SUSPEND": unix.CAP_BLOCK_SUSPEND, "CAP_AUDIT_READ": unix.CAP_AUDIT_READ, "CAP_PERFMON": unix.CAP_PERFMON,
		"CAP_BPF": unix.CAP_BPF, "CAP_CHECKPOINT_RESTORE": unix.CAP_CHECKPOINT_RESTORE,
	}
}

// exec looks the command up in PATH and executes it.
func (b *builder) exec(p *specs.Process, home string) {
	if len(p.Args) == 0 || p.Args[0] == "" {
		b.fail(fmt.Errorf("%w: no command specified", ErrInvalid))
		return
	}
	env, search := environment(p.Env, home)
	argv, envp := b.strv("{argv}", p.Args), b.strv("{envp}", env)
	name := p.Args[0]
	if strings.Contains(name, "/") {
		b.step(step{format: "exec: %q", args: []any{name}, text: map[unix.Errno]string{
			unix.ENOENT: fmt.Sprintf("exec: %q: stat %s: no such file or directory", name, name),
		}})
		b.call(unix.SYS_ACCESS, b.str(name), imm(unix.X_OK))
		b.execve(name, argv, envp)
		return
	}
	for dir := range strings.SplitSeq(search, ":") {
		if dir == "" {
			continue // the current directory, which nobody wants
		}
		file := path.Join(dir, name)
		b.do("exec %q", name)
		access := b.call(unix.SYS_ACCESS, b.str(file), imm(unix.X_OK)).tolerateAll()
		access.flags |= flagErrJump
		b.execve(file, argv, envp)
		access.target = b.here()
	}
	b.step(step{format: "not found", text: map[unix.Errno]string{
		unix.ENOENT: fmt.Sprintf("exec: %q: executable file not found in $PATH", name),
	}})
	b.call(opFail, imm(int(unix.ENOENT)))
}

// execve is a step of its own: a file that is there and cannot be run (no interpreter, wrong
// format, a directory) reads differently from one that is missing.
func (b *builder) execve(file string, argv, envp arg) {
	b.do("exec %s", file)
	b.call(unix.SYS_EXECVE, b.str(file), argv, envp)
}

// environment drops repeated variables (the last wins), adds HOME, and returns PATH.
func environment(env []string, home string) (out []string, search string) {
	last := make(map[string]int, len(env))
	for i, kv := range env {
		k, _, _ := strings.Cut(kv, "=")
		last[k] = i
	}
	hasHome := false
	for i, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		if last[k] != i || k == "" {
			continue
		}
		if k == "PATH" {
			search = v
		}
		if k == "HOME" {
			if v == "" {
				continue
			}
			hasHome = true
		}
		out = append(out, kv)
	}
	if !hasHome {
		if home == "" {
			home = "/"
		}
		out = append(out, "HOME="+home)
	}
	return out, search
}
