package seccomp

import (
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data, linux/seccomp.h.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

// emit writes the whole program: dispatch by architecture, then one search tree each.
func emit(a *assembler, filters []filter) {
	labels := make([]label, len(filters))
	for i := range filters {
		labels[i] = a.newLabel()
	}
	a.load(offArch)
	tested := map[uint32]bool{}
	for i, f := range filters {
		if !tested[f.audit] {
			tested[f.audit] = true
			next := a.newLabel()
			a.jump(opJEQ, f.audit, labels[i], next)
			a.place(next)
		}
	}
	a.ret(retKillThread)
	for i, f := range filters {
		a.place(labels[i])
		x32 := noLabel
		if f.name == specs.ArchX86_64 && i+1 < len(filters) && filters[i+1].name == specs.ArchX32 {
			x32 = labels[i+1]
		}
		emitArch(a, f, x32)
	}
}

// emitArch writes the tree of one architecture. x32 is where calls with the x32 bit go; without it
// they are from an architecture that the profile does not list.
func emitArch(a *assembler, f filter, x32 label) {
	a.load(offNumber)
	if f.name == specs.ArchX86_64 {
		native := a.newLabel()
		if x32 != noLabel {
			a.jump(opJGE, x32Bit, x32, native)
		} else {
			bad := a.newLabel()
			a.jump(opJGE, x32Bit, bad, native)
			a.place(bad)
			a.ret(retKillThread)
		}
		a.place(native)
	}
	if f.enosys {
		stub, known := a.newLabel(), a.newLabel()
		a.jump(opJGT, f.newest, stub, known)
		a.place(stub)
		a.ret(retErrno | uint32(unix.ENOSYS))
		a.place(known)
	}
	emitTree(a, f, spans(f))
}

// span is a range of syscall numbers that are treated alike, up to the next span's first.
type span struct {
	first uint32
	ret   uint32
	rules *rules // tests before ret, nil for none
}

// spans cuts all numbers into ranges, the first of which begins at 0.
func spans(f filter) []span {
	out := []span{{first: 0, ret: f.def}}
	put := func(s span) {
		last := &out[len(out)-1]
		switch {
		case last.first == s.first:
			*last = s
			if len(out) > 1 {
				if prev := out[len(out)-2]; prev.rules == nil && s.rules == nil && prev.ret == s.ret {
					out = out[:len(out)-1]
				}
			}
		case last.rules == nil && s.rules == nil && last.ret == s.ret:
		default:
			out = append(out, s)
		}
	}
	for _, n := range slices.Sorted(maps.Keys(f.calls)) {
		r := f.calls[n]
		s := span{first: n, ret: r.fallback}
		if len(r.alternatives) > 0 {
			s.rules = r
		}
		put(s)
		put(span{first: n + 1, ret: f.def})
	}
	return out
}

// emitTree writes a binary search for the span that holds the number in the accumulator.
func emitTree(a *assembler, f filter, s []span) {
	if len(s) == 1 {
		if s[0].rules != nil {
			emitRules(a, f, s[0].rules)
		} else {
			a.ret(s[0].ret)
		}
		return
	}
	mid := len(s) / 2
	low, high := a.newLabel(), a.newLabel()
	a.jump(opJGE, s[mid].first, high, low)
	a.place(low)
	emitTree(a, f, s[:mid])
	a.place(high)
	emitTree(a, f, s[mid:])
}

func emitRules(a *assembler, f filter, r *rules) {
	for _, alt := range r.alternatives {
		fail := a.newLabel()
		for _, c := range alt.conditions {
			emitCondition(a, f.wide, c, fail)
		}
		a.ret(alt.ret)
		a.place(fail)
	}
	a.ret(r.fallback)
}

// emitCondition falls through when the condition holds, else goes to fail.
func emitCondition(a *assembler, wide bool, c condition, fail label) {
	lo := uint32(offArgs + 8*c.index)
	hi := lo + 4
	hold := a.newLabel()
	valLo, valHi := uint32(c.value), uint32(c.value>>32)
	switch c.op {
	case specs.OpEqualTo, specs.OpNotEqual:
		yes, no := hold, fail
		if c.op == specs.OpNotEqual {
			yes, no = fail, hold
		}
		if wide {
			same := a.newLabel()
			a.load(hi)
			a.jump(opJEQ, valHi, same, no)
			a.place(same)
		}
		a.load(lo)
		a.jump(opJEQ, valLo, yes, no)
	case specs.OpMaskedEqual:
		// value is the mask, value2 what the masked argument must be.
		if wide {
			same := a.newLabel()
			a.load(hi)
			a.and(valHi)
			a.jump(opJEQ, uint32(c.value2>>32), same, fail)
			a.place(same)
		}
		a.load(lo)
		a.and(valLo)
		a.jump(opJEQ, uint32(c.value2), hold, fail)
	case specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpLessThan, specs.OpLessEqual:
		emitOrder(a, wide, c, hold, fail, lo, hi)
	}
	a.place(hold)
}

// emitOrder compares as unsigned 64-bit numbers: the high halves decide unless they are equal.
func emitOrder(a *assembler, wide bool, c condition, hold, fail label, lo, hi uint32) {
	above, below := hold, fail // where to go when the argument is above or below the value
	op := opJGT                // true above the value
	switch c.op {
	case specs.OpGreaterEqual:
		op = opJGE
	case specs.OpLessThan: // not greater or equal
		above, below, op = fail, hold, opJGE
	case specs.OpLessEqual: // not greater
		above, below = fail, hold
	}
	if wide {
		notAbove, equal := a.newLabel(), a.newLabel()
		a.load(hi)
		a.jump(opJGT, uint32(c.value>>32), above, notAbove)
		a.place(notAbove)
		a.jump(opJEQ, uint32(c.value>>32), equal, below)
		a.place(equal)
	}
	a.load(lo)
	a.jump(op, uint32(c.value), above, below)
}
