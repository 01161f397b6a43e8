// Package program compiles an OCI runtime spec into a program for the exec helper
// (guestos/exec/exec.c): a flat list of raw system calls that ends in execve, plus the table that
// turns a failed step back into a message for a person.
//
// It is pure: no file is opened, no call made, so that what a container start does can be read in
// golden files. internal/guest/container runs the programs. What it does not know (does a bind
// source exist, is it a directory, what is the user's home) the caller tells it.
//
// The helper trusts the program, and the program trusts only constants: paths inside the container
// are resolved by the kernel after pivot_root, so that a symlink in an image cannot lead out.
package program

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// The format, shared with guestos/exec/exec.c.
const (
	base       = 0x100000000 // address the helper loads the program at
	maxSize    = 1 << 20
	magic      = 0x31585441
	headerSize = 16
	opSize     = 64

	// FD is the pipe from which the helper reads the program, ErrorFD the one it reports on.
	FD      = 3
	ErrorFD = 4
	// TargetFD is the pidfd of the container that an exec joins.
	TargetFD = 5

	opFail     = 0xf000
	opStore32  = 0xf001
	opFailLast = 0xf002
	opNext     = 0xf003 // go on with the next program

	flagOKJump  = 1
	flagErrJump = 2
	flagAnyErr  = 4
)

// arg is one argument of an operation: a constant, an address in the program, or a register.
type arg struct {
	val  uint64
	reg  bool
	addr bool
	str  string // the string at an address, or in braces what is there
	n    int    // 64-bit words at the address, for rendering
}

// op is one operation before encoding.
type op struct {
	nr     uint16
	step   uint16
	save   uint8
	flags  uint8
	errs   [4]uint8
	target int
	args   [6]arg
	nargs  int
}

// tolerate makes the given errors no failure.
func (o *op) tolerate(errs ...unix.Errno) *op {
	for i, e := range errs {
		o.errs[i] = uint8(e)
	}
	return o
}

func (o *op) tolerateAll() *op {
	o.flags |= flagAnyErr
	return o
}

// builder collects operations and data.
type builder struct {
	data    []byte // from headerSize on
	strings map[string]arg
	ops     []*op
	unused  []op // of the last batch
	steps   []step
	regs    uint8
	err     error

	reportAs uint16 // the step that all failures are reported as; 0: their own
}

// opBatch is how many operations are allocated at a time: there are some two hundred in a program.
const opBatch = 64

func newBuilder() *builder {
	return &builder{
		strings: make(map[string]arg, 128), steps: append(make([]step, 0, 64), step{format: "loading exec program"}),
		data: make([]byte, 0, 4096), ops: make([]*op, 0, 192),
	}
}

func imm[T ~int | ~uint64 | ~uint32 | ~uint](v T) arg { return arg{val: uint64(v)} }

func reg(r uint8) arg { return arg{val: uint64(r), reg: true} }

// newReg allocates a register.
func (b *builder) newReg() uint8 {
	if b.regs == firstFurniture-1 {
		b.fail(fmt.Errorf("%w: more mounts than the exec helper has registers", ErrUnsupported))
		return b.regs
	}
	b.regs++
	return b.regs
}

func (b *builder) fail(err error) {
	if b.err == nil {
		b.err = err
	}
}

// str places a NUL-terminated string. A NUL inside is an error of the program.
func (b *builder) str(s string) arg {
	if a, ok := b.strings[s]; ok {
		return a
	}
	if strings.IndexByte(s, 0) >= 0 {
		b.fail(fmt.Errorf("%w: NUL byte in %q", ErrInvalid, s))
	}
	a := b.bytes(append([]byte(s), 0), 1, s)
	b.strings[s] = a
	return a
}

// bytes places raw data with the given alignment.
func (b *builder) bytes(p []byte, align int, label string) arg {
	for (headerSize+len(b.data))%align != 0 {
		b.data = append(b.data, 0)
	}
	a := arg{val: uint64(base + headerSize + len(b.data)), str: label, addr: true}
	b.data = append(b.data, p...)
	return a
}

// words places little-endian 64-bit words.
func (b *builder) words(label string, w ...uint64) arg {
	p := make([]byte, 0, 8*len(w))
	for _, v := range w {
		p = binary.LittleEndian.AppendUint64(p, v)
	}
	a := b.bytes(p, 8, label)
	a.n = len(w)
	return a
}

// strv places a NULL-terminated array of strings.
func (b *builder) strv(label string, list []string) arg {
	w := make([]uint64, 0, len(list)+1)
	for _, s := range list {
		w = append(w, b.str(s).val)
	}
	return b.words(label, append(w, 0)...)
}

// step starts a new step: all following operations are reported under it.
func (b *builder) step(s step) {
	b.steps = append(b.steps, s)
}

// do names a step whose failure reads "name: errno". Nothing is formatted before it fails.
func (b *builder) do(format string, a ...any) {
	b.step(step{format: format, args: a})
}

// call appends a system call to the current step.
func (b *builder) call(nr int, args ...arg) *op {
	if len(b.unused) == 0 {
		b.unused = make([]op, opBatch)
	}
	o := &b.unused[0]
	b.unused = b.unused[1:]
	o.nr, o.step, o.nargs = uint16(nr), uint16(len(b.steps)-1), len(args)
	copy(o.args[:], args)
	b.ops = append(b.ops, o)
	return o
}

// callReg is call with the result kept in a new register.
func (b *builder) callReg(nr int, args ...arg) uint8 {
	o := b.call(nr, args...)
	o.save = b.newReg()
	return o.save
}

// here is the index of the next operation.
func (b *builder) here() int { return len(b.ops) }

// encode lays the program out: header, data, operations.
func (b *builder) encode() []byte {
	for (headerSize+len(b.data))%8 != 0 {
		b.data = append(b.data, 0)
	}
	entry := headerSize + len(b.data)
	size := entry + opSize*len(b.ops)
	p := make([]byte, 0, size)
	le := binary.LittleEndian
	p = le.AppendUint32(p, magic)
	p = le.AppendUint32(p, uint32(len(b.ops)))
	p = le.AppendUint32(p, uint32(entry))
	p = le.AppendUint32(p, uint32(size))
	p = append(p, b.data...)
	for _, o := range b.ops {
		var regs uint8
		for i, a := range o.args {
			if a.reg {
				regs |= 1 << i
			}
		}
		p = le.AppendUint16(p, o.nr)
		p = le.AppendUint16(p, cmp.Or(b.reportAs, o.step))
		p = append(p, o.save, regs, o.flags, 0)
		p = le.AppendUint32(p, uint32(o.target))
		p = append(p, o.errs[:]...)
		for _, a := range o.args {
			p = le.AppendUint64(p, a.val)
		}
	}
	return p
}

// Program is a compiled program.
type Program struct {
	Code  []byte
	steps []step
	ops   []*op
}

func (b *builder) build() (*Program, error) {
	if b.err != nil {
		return nil, b.err
	}
	if len(b.steps) >= furnishStep {
		return nil, fmt.Errorf("%w: too many steps", ErrUnsupported)
	}
	p := &Program{Code: b.encode(), steps: b.steps, ops: b.ops}
	if len(p.Code) > maxSize {
		return nil, fmt.Errorf("%w: arguments, environment and mounts take %d bytes", ErrUnsupported, len(p.Code))
	}
	return p, nil
}
