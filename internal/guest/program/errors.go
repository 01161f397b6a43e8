package program

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrInvalid is wrapped when the spec contradicts itself or the OCI specification.
	ErrInvalid = errors.New("invalid container configuration")
	// ErrUnsupported is wrapped when the spec asks for something a micro-VM pod cannot do.
	ErrUnsupported = errors.New("not supported in a micro-VM pod")
)

// ReportSize is the length of the helper's error report: step and errno, little-endian 32 bits.
const ReportSize = 8

// step describes a group of operations for error messages: "format(args): errno", unless texts has
// a complete text for that errno.
type step struct {
	format string
	args   []any
	text   map[unix.Errno]string
}

func (s step) name() string { return fmt.Sprintf(s.format, s.args...) }

// ExecError is the failure of a helper: which step failed, and why.
type ExecError struct {
	text  string
	errno unix.Errno
}

func (e *ExecError) Error() string { return e.text }

// Unwrap gives the errno.
func (e *ExecError) Unwrap() error { return e.errno }

// Error turns the helper's report into an error whose text is like runc's.
func (p *Program) Error(report []byte) error {
	if len(report) != ReportSize {
		return fmt.Errorf("exec helper ended without a report (%d bytes)", len(report))
	}
	le := func(i int) uint32 {
		return uint32(report[i]) | uint32(report[i+1])<<8 | uint32(report[i+2])<<16 | uint32(report[i+3])<<24
	}
	step, errno := le(0), unix.Errno(le(4))
	if step == furnishStep {
		return &ExecError{text: "making the usual mounts: " + errno.Error(), errno: errno}
	}
	if int(step) >= len(p.steps) {
		return fmt.Errorf("exec helper reported an unknown step %d: %w", step, errno)
	}
	s := p.steps[step]
	if text, ok := s.text[errno]; ok {
		return &ExecError{text: text, errno: errno}
	}
	text := s.name() + ": " + errno.Error()
	if errno == unix.ENOEXEC {
		text += " (no program for linux/amd64, and no script that names its interpreter; is the image for another architecture?)"
	}
	return &ExecError{text: text, errno: errno}
}

// String renders the program one operation per line, for golden files and debugging.
func (p *Program) String() string {
	var out strings.Builder
	last := -1
	for i, o := range p.ops {
		if int(o.step) != last {
			last = int(o.step)
			fmt.Fprintf(&out, "# %s\n", p.steps[last].name())
		}
		fmt.Fprintf(&out, "%3d  ", i)
		if o.save != 0 {
			fmt.Fprintf(&out, "r%d = ", o.save)
		}
		args := make([]string, o.nargs)
		for j := range o.nargs {
			args[j] = p.render(o.args[j])
		}
		fmt.Fprintf(&out, "%s(%s)%s\n", callName(o.nr), strings.Join(args, ", "), o.suffix())
	}
	return out.String()
}

// render shows an argument: strings quoted, words of memory in hex.
func (p *Program) render(a arg) string {
	switch {
	case a.reg:
		return fmt.Sprintf("r%d", a.val)
	case a.addr && (a.str == "{argv}" || a.str == "{envp}"):
		return fmt.Sprintf("%q", p.strings(a))
	case a.addr && a.n > 0:
		words := make([]string, a.n)
		for i := range words {
			words[i] = fmt.Sprintf("%#x", p.word(a.val+8*uint64(i)))
		}
		return strings.TrimSuffix(a.str, "}") + ": " + strings.Join(words, " ") + "}"
	case a.addr && strings.HasPrefix(a.str, "{"):
		return a.str
	case a.addr:
		return fmt.Sprintf("%q", a.str)
	case int64(a.val) < 0:
		return fmt.Sprintf("%d", int64(a.val))
	case a.val < 10:
		return fmt.Sprintf("%d", a.val)
	default:
		return fmt.Sprintf("%#x", a.val)
	}
}

// word reads a word of the program by its address.
func (p *Program) word(addr uint64) uint64 {
	return binary.LittleEndian.Uint64(p.Code[addr-base:])
}

// strings reads an array of strings.
func (p *Program) strings(a arg) []string {
	var list []string
	for i := range a.n - 1 {
		s := p.Code[p.word(a.val+8*uint64(i))-base:]
		list = append(list, string(s[:bytes.IndexByte(s, 0)]))
	}
	return list
}

func (o *op) suffix() string {
	var s string
	if o.flags&flagAnyErr != 0 {
		s = " ignoring errors"
	}
	for _, e := range o.errs {
		if e != 0 {
			s += " ignoring " + unix.ErrnoName(unix.Errno(e))
		}
	}
	if o.flags&flagErrJump != 0 {
		s += fmt.Sprintf(" on error goto %d", o.target)
	}
	if o.flags&flagOKJump != 0 {
		s += fmt.Sprintf(" on success goto %d", o.target)
	}
	return s
}

func callName(nr uint16) string {
	names := map[uint16]string{
		unix.SYS_MOUNT: "mount", unix.SYS_UMOUNT2: "umount2", unix.SYS_MKDIR: "mkdir",
		unix.SYS_MKNOD: "mknod", unix.SYS_SYMLINK: "symlink", unix.SYS_PIVOT_ROOT: "pivot_root",
		unix.SYS_CHDIR: "chdir", unix.SYS_OPEN: "open", unix.SYS_OPENAT2: "openat2",
		unix.SYS_OPEN_TREE: "open_tree", unix.SYS_MOVE_MOUNT: "move_mount",
		unix.SYS_MOUNT_SETATTR: "mount_setattr", unix.SYS_CLOSE_RANGE: "close_range",
		unix.SYS_SETSID: "setsid", unix.SYS_UNSHARE: "unshare", unix.SYS_SETNS: "setns",
		unix.SYS_UMASK: "umask", unix.SYS_CHOWN: "chown", unix.SYS_FCHOWN: "fchown",
		unix.SYS_WRITE: "write", unix.SYS_CLOSE: "close", unix.SYS_IOCTL: "ioctl",
		unix.SYS_SENDMSG: "sendmsg", unix.SYS_DUP2: "dup2", unix.SYS_PRLIMIT64: "prlimit64",
		unix.SYS_PRCTL: "prctl", unix.SYS_CAPSET: "capset", unix.SYS_SETGROUPS: "setgroups",
		unix.SYS_SETGID: "setgid", unix.SYS_SETUID: "setuid", unix.SYS_SECCOMP: "seccomp",
		unix.SYS_ACCESS: "access", unix.SYS_EXECVE: "execve", unix.SYS_PAUSE: "pause",
		unix.SYS_RT_SIGACTION: "rt_sigaction", unix.SYS_CHMOD: "chmod", unix.SYS_DUP3: "dup3",
		unix.SYS_EXECVEAT: "execveat", unix.SYS_IOPRIO_SET: "ioprio_set",
		unix.SYS_SCHED_SETATTR: "sched_setattr", unix.SYS_PERSONALITY: "personality",
		unix.SYS_FSOPEN: "fsopen", unix.SYS_FSCONFIG: "fsconfig", unix.SYS_FSMOUNT: "fsmount",
		unix.SYS_MKDIRAT: "mkdirat", unix.SYS_MKNODAT: "mknodat", unix.SYS_SYMLINKAT: "symlinkat",
		opFail: "FAIL", opFailLast: "FAIL_LAST", opStore32: "STORE32", opNext: "NEXT",
	}
	if n, ok := names[nr]; ok {
		return n
	}
	return fmt.Sprintf("syscall_%d", nr)
}
