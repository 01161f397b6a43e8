package seccomp

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Conditional jumps of classic BPF with a constant operand.
const (
	opJEQ = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	opJGT = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	opJGE = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
)

// label is a place in the program, known by its number before it is placed.
type label int

const noLabel label = -1

// node is an instruction whose jump targets are still labels.
type node struct {
	code   uint16
	k      uint32
	jt, jf label // of a conditional jump, else noLabel
	far    bool  // a target is beyond 255 instructions: jumps over two unconditional ones
}

// size is the number of instructions the node becomes.
func (n node) size() int {
	if n.far {
		return 3
	}
	return 1
}

// assembler collects instructions and resolves labels. Jumps go forward only, as BPF demands.
type assembler struct {
	nodes  []node
	labels []int // node index by label
}

func (a *assembler) newLabel() label {
	a.labels = append(a.labels, -1)
	return label(len(a.labels) - 1)
}

// place makes the label mean the next instruction.
func (a *assembler) place(l label) { a.labels[l] = len(a.nodes) }

func (a *assembler) plain(code int, k uint32) {
	a.nodes = append(a.nodes, node{code: uint16(code), k: k, jt: noLabel, jf: noLabel})
}

func (a *assembler) load(offset uint32) { a.plain(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }
func (a *assembler) and(mask uint32)    { a.plain(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, mask) }
func (a *assembler) ret(value uint32)   { a.plain(unix.BPF_RET|unix.BPF_K, value) }

func (a *assembler) jump(op int, k uint32, jt, jf label) {
	a.nodes = append(a.nodes, node{code: uint16(op), k: k, jt: jt, jf: jf})
}

// assemble lays the program out. Jumps that turn out too long are widened until none is.
func (a *assembler) assemble() ([]unix.SockFilter, error) {
	for {
		at := a.positions()
		widened := false
		for i := range a.nodes {
			n := &a.nodes[i]
			if n.jt == noLabel || n.far {
				continue
			}
			if a.distance(at, i, n.jt) > 255 || a.distance(at, i, n.jf) > 255 {
				n.far, widened = true, true
			}
		}
		if !widened {
			return a.layout(at)
		}
	}
}

// positions are the offsets of the nodes in the program, and its length.
func (a *assembler) positions() []int {
	at := make([]int, len(a.nodes)+1)
	for i, n := range a.nodes {
		at[i+1] = at[i] + n.size()
	}
	return at
}

func (a *assembler) distance(at []int, from int, to label) int {
	return at[a.labels[to]] - at[from] - 1
}

func (a *assembler) layout(at []int) ([]unix.SockFilter, error) {
	size := at[len(a.nodes)]
	if size > maxInstructions {
		return nil, fmt.Errorf("%w: it needs %d instructions, the kernel takes %d", ErrProfile, size, maxInstructions)
	}
	prog := make([]unix.SockFilter, 0, size)
	for i, n := range a.nodes {
		if n.jt == noLabel {
			prog = append(prog, unix.SockFilter{Code: n.code, K: n.k})
			continue
		}
		t, f := a.distance(at, i, n.jt), a.distance(at, i, n.jf)
		if t < 0 || f < 0 {
			return nil, fmt.Errorf("assembling seccomp filter: jump backwards at %d", at[i])
		}
		if !n.far {
			prog = append(prog, unix.SockFilter{Code: n.code, Jt: uint8(t), Jf: uint8(f), K: n.k})
			continue
		}
		prog = append(prog,
			unix.SockFilter{Code: n.code, Jt: 0, Jf: 1, K: n.k},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(t - 1)},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(f - 2)},
		)
	}
	return prog, nil
}
