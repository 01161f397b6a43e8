package seccomp

import (
	_ "embed" // the syscall tables
	"fmt"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

//go:generate ./generate.sh

//go:embed syscalls_amd64.txt
var tableAMD64 string

//go:embed syscalls_386.txt
var table386 string

// x32Bit marks a syscall of the x32 ABI, which shares its architecture value with x86-64.
const x32Bit = 0x40000000

// x32Only are the syscalls that have their own number in the x32 ABI
// (arch/x86/entry/syscalls/syscall_64.tbl, numbers from 512).
const x32Only = `rt_sigaction rt_sigreturn ioctl readv writev recvfrom sendmsg recvmsg execve ptrace ` +
	`rt_sigpending rt_sigtimedwait rt_sigqueueinfo sigaltstack timer_create mq_notify kexec_load waitid ` +
	`set_robust_list get_robust_list vmsplice move_pages preadv pwritev rt_tgsigqueueinfo recvmmsg sendmmsg ` +
	`process_vm_readv process_vm_writev setsockopt getsockopt io_setup io_submit execveat preadv2 pwritev2`

const x32Base = 512

// arch is one way for an amd64 kernel to be called.
type arch struct {
	name  specs.Arch
	audit uint32 // AUDIT_ARCH_* that the filter sees
	wide  bool   // arguments have 64 bits
}

// arches in the order in which the program tests for them.
func arches() []arch {
	return []arch{
		{specs.ArchX86_64, unix.AUDIT_ARCH_X86_64, true},
		{specs.ArchX32, unix.AUDIT_ARCH_X86_64, true},
		{specs.ArchX86, unix.AUDIT_ARCH_I386, false},
	}
}

// syscalls returns the numbers of the architecture's syscalls by name.
func (a arch) syscalls() (map[string]uint32, error) {
	table := tableAMD64
	if a.name == specs.ArchX86 {
		table = table386
	}
	m := make(map[string]uint32, 512)
	for line := range strings.Lines(table) {
		name, number, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("reading syscall table: %w", err)
		}
		m[name] = uint32(n)
	}
	if a.name == specs.ArchX32 {
		for name := range m {
			m[name] |= x32Bit
		}
		for i, name := range strings.Fields(x32Only) {
			m[name] = uint32(x32Base+i) | x32Bit
		}
	}
	return m, nil
}

// filter is what to do with the syscalls of one architecture.
type filter struct {
	arch
	def    uint32            // what no rule matches
	newest uint32            // newest syscall that the profile names
	enosys bool              // answer ENOSYS above newest
	calls  map[uint32]*rules // by number
}

// rules of one syscall: alternatives in the order of the profile, then a fallback.
type rules struct {
	alternatives []alternative
	fallback     uint32
}

type alternative struct {
	conditions []condition
	ret        uint32
}

// condition is a test of one argument.
type condition struct {
	index  uint
	value  uint64
	value2 uint64
	op     specs.LinuxSeccompOperator
}

func archFilters(p *specs.LinuxSeccomp) ([]filter, error) {
	if err := checkSize(p); err != nil {
		return nil, err
	}
	def, err := action(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	var out []filter
	for _, a := range arches() {
		// The native architecture is always part of a filter, as in libseccomp.
		if a.name != specs.ArchX86_64 && !slices.Contains(p.Architectures, a.name) {
			continue
		}
		f := filter{
			arch: a, def: def, calls: map[uint32]*rules{},
			enosys: refuses(def) && def != retErrno|uint32(unix.ENOSYS),
		}
		if err := f.add(p.Syscalls); err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

func checkSize(p *specs.LinuxSeccomp) error {
	names, conditions := 0, 0
	for _, r := range p.Syscalls {
		names += len(r.Names)
		conditions += len(r.Names) * len(r.Args)
	}
	if len(p.Syscalls) > maxRules || names > maxNames || conditions > maxConditions {
		return fmt.Errorf("%w: %d rules with %d names and %d conditions are too many",
			ErrProfile, len(p.Syscalls), names, conditions)
	}
	return nil
}

func (f *filter) add(syscalls []specs.LinuxSyscall) error {
	numbers, err := f.syscalls()
	if err != nil {
		return err
	}
	for i, rule := range syscalls {
		ret, err := action(rule.Action, rule.ErrnoRet)
		if err != nil {
			return fmt.Errorf("rule %d: %w", i, err)
		}
		groups, err := conditionGroups(rule.Args)
		if err != nil {
			return fmt.Errorf("rule %d: %w", i, err)
		}
		for _, name := range rule.Names {
			number, ok := numbers[name]
			if !ok {
				continue
			}
			f.newest = max(f.newest, number)
			f.addRule(number, ret, groups)
		}
	}
	for number, r := range f.calls {
		if len(r.alternatives) == 0 && r.fallback == f.def {
			delete(f.calls, number)
		}
	}
	return nil
}

func (f *filter) addRule(number, ret uint32, groups [][]condition) {
	r := f.calls[number]
	if r == nil {
		r = &rules{fallback: f.def}
		f.calls[number] = r
	}
	switch {
	case ret == f.def:
		// Says nothing new; runc leaves such rules out.
	case len(groups) == 0:
		// Without conditions it holds for every call, whatever was or will be added.
		r.fallback, r.alternatives = ret, nil
	case r.fallback != f.def:
	default:
		for _, g := range groups {
			r.alternatives = append(r.alternatives, alternative{conditions: g, ret: ret})
		}
	}
}

// conditionGroups turns the conditions of a rule into alternatives: one with all of them, or one
// each when an argument occurs twice.
func conditionGroups(args []specs.LinuxSeccompArg) ([][]condition, error) {
	seen := map[uint]bool{}
	twice := false
	var all []condition
	for _, a := range args {
		if a.Index > 5 {
			return nil, fmt.Errorf("%w: argument index %d", ErrProfile, a.Index)
		}
		switch a.Op {
		case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo,
			specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual:
		default:
			return nil, fmt.Errorf("%w: unknown operator %q", ErrProfile, a.Op)
		}
		twice = twice || seen[a.Index]
		seen[a.Index] = true
		all = append(all, condition{index: a.Index, value: a.Value, value2: a.ValueTwo, op: a.Op})
	}
	if len(all) == 0 {
		return nil, nil
	}
	if !twice {
		return [][]condition{all}, nil
	}
	groups := make([][]condition, 0, len(all))
	for _, c := range all {
		groups = append(groups, []condition{c})
	}
	return groups, nil
}
