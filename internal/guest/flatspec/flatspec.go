// Package flatspec is the form in which an OCI spec goes from the shim into the guest: flat bytes that are
// read in one pass and without copying. Parsing the same as JSON was half of what a guest did to create a
// container.
//
// It holds what guest init uses of a spec, see the functions that list the fields, and drops the rest: the
// shim has seen to it. It is no format to store: shim and init are the same binary. internal/shim/task
// writes, internal/guest/container reads.
//
// Form: numbers are varints (signed ones zigzag), strings and lists start with their length, what may be
// missing with a 0 or a 1. Fields come in the order in which they are listed here.
//
// What can go wrong: bytes that are no spec (ErrInvalid); lengths are bounded by the input's.
package flatspec

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ErrInvalid is returned for bytes that are not what Spec, Process or Resources has written.
var ErrInvalid = errors.New("not a flat spec")

// Spec writes a container's spec.
func Spec(s *specs.Spec) []byte { return write(s, spec) }

// ReadSpec reads what Spec has written.
func ReadSpec(data []byte) (*specs.Spec, error) { return read(data, spec) }

// Process writes a process.
func Process(p *specs.Process) []byte { return write(p, process) }

// ReadProcess reads what Process has written.
func ReadProcess(data []byte) (*specs.Process, error) { return read(data, process) }

// Resources writes limits.
func Resources(r *specs.LinuxResources) []byte { return write(r, resources) }

// ReadResources reads what Resources has written.
func ReadResources(data []byte) (*specs.LinuxResources, error) { return read(data, resources) }

func write[T any](v *T, fields func(*codec, *T)) []byte {
	c := &codec{out: make([]byte, 0, 4096)}
	fields(c, v)
	return c.out
}

func read[T any](data []byte, fields func(*codec, *T)) (*T, error) {
	// The strings of the result are parts of this one.
	c := &codec{in: string(data), reading: true}
	v := new(T)
	fields(c, v)
	if c.failed || c.in != "" {
		return nil, ErrInvalid
	}
	return v, nil
}

func spec(c *codec, s *specs.Spec) {
	pointer(c, &s.Process, process)
	pointer(c, &s.Root, func(c *codec, r *specs.Root) { truth(c, &r.Readonly) })
	list(c, &s.Mounts, func(c *codec, m *specs.Mount) {
		text(c, &m.Destination)
		text(c, &m.Type)
		text(c, &m.Source)
		texts(c, &m.Options)
	})
	pointer(c, &s.Linux, linux)
}

func process(c *codec, p *specs.Process) {
	truth(c, &p.Terminal)
	pointer(c, &p.ConsoleSize, func(c *codec, b *specs.Box) {
		number(c, &b.Height)
		number(c, &b.Width)
	})
	number(c, &p.User.UID)
	number(c, &p.User.GID)
	pointer(c, &p.User.Umask, number)
	list(c, &p.User.AdditionalGids, number)
	texts(c, &p.Args)
	texts(c, &p.Env)
	text(c, &p.Cwd)
	pointer(c, &p.Capabilities, func(c *codec, l *specs.LinuxCapabilities) {
		for _, set := range []*[]string{&l.Bounding, &l.Effective, &l.Inheritable, &l.Permitted, &l.Ambient} {
			texts(c, set)
		}
	})
	list(c, &p.Rlimits, func(c *codec, l *specs.POSIXRlimit) {
		text(c, &l.Type)
		number(c, &l.Hard)
		number(c, &l.Soft)
	})
	truth(c, &p.NoNewPrivileges)
	pointer(c, &p.OOMScoreAdj, signed)
}

func linux(c *codec, l *specs.Linux) {
	dictionary(c, &l.Sysctl)
	pointer(c, &l.Resources, resources)
	list(c, &l.Namespaces, func(c *codec, n *specs.LinuxNamespace) {
		text(c, &n.Type)
		text(c, &n.Path)
	})
	list(c, &l.Devices, func(c *codec, d *specs.LinuxDevice) {
		text(c, &d.Path)
		text(c, &d.Type)
		signed(c, &d.Major)
		signed(c, &d.Minor)
		pointer(c, &d.FileMode, number)
		pointer(c, &d.UID, number)
		pointer(c, &d.GID, number)
	})
	texts(c, &l.MaskedPaths)
	texts(c, &l.ReadonlyPaths)
}

func resources(c *codec, r *specs.LinuxResources) {
	list(c, &r.Devices, func(c *codec, d *specs.LinuxDeviceCgroup) {
		truth(c, &d.Allow)
		text(c, &d.Type)
		pointer(c, &d.Major, signed)
		pointer(c, &d.Minor, signed)
		text(c, &d.Access)
	})
	pointer(c, &r.Memory, func(c *codec, m *specs.LinuxMemory) {
		pointer(c, &m.Limit, signed)
		pointer(c, &m.Reservation, signed)
		pointer(c, &m.Swap, signed)
		pointer(c, &m.CheckBeforeUpdate, truth)
	})
	pointer(c, &r.CPU, func(c *codec, p *specs.LinuxCPU) {
		pointer(c, &p.Shares, number)
		pointer(c, &p.Quota, signed)
		pointer(c, &p.Burst, number)
		pointer(c, &p.Period, number)
		text(c, &p.Cpus)
		text(c, &p.Mems)
		pointer(c, &p.Idle, signed)
	})
	pointer(c, &r.Pids, func(c *codec, p *specs.LinuxPids) { pointer(c, &p.Limit, signed) })
	dictionary(c, &r.Unified)
}

// codec goes one way or the other over the same list of fields.
type codec struct {
	out     []byte
	in      string // what is not read yet
	reading bool
	failed  bool
}

// varint carries a number both ways.
func (c *codec) varint(v uint64) uint64 {
	if !c.reading {
		c.out = binary.AppendUvarint(c.out, v)
		return v
	}
	var out uint64
	for i := 0; i < len(c.in) && i < binary.MaxVarintLen64; i++ {
		out |= uint64(c.in[i]&0x7f) << (7 * i)
		if c.in[i] < 0x80 {
			c.in = c.in[i+1:]
			return out
		}
	}
	c.fail()
	return 0
}

func (c *codec) fail() { c.failed, c.in = true, "" }

// length carries the length of something of which each element takes a byte at least.
func (c *codec) length(n int) int {
	v := c.varint(uint64(n))
	if c.reading && v > uint64(len(c.in)) {
		c.fail()
		return 0
	}
	return int(v)
}

func number[T ~uint | ~uint32 | ~uint64](c *codec, v *T) { *v = T(c.varint(uint64(*v))) }

func signed[T ~int | ~int64](c *codec, v *T) {
	n := int64(*v)
	u := c.varint(uint64(n<<1) ^ uint64(n>>63))
	*v = T(int64(u>>1) ^ -int64(u&1))
}

func truth(c *codec, v *bool) {
	n := uint64(0)
	if *v {
		n = 1
	}
	*v = c.varint(n) == 1
}

func text[T ~string](c *codec, v *T) {
	n := c.length(len(*v))
	if c.reading {
		*v, c.in = T(c.in[:n]), c.in[n:]
		return
	}
	c.out = append(c.out, *v...)
}

func texts(c *codec, v *[]string) { list(c, v, text) }

func list[T any](c *codec, v *[]T, element func(*codec, *T)) {
	n := c.length(len(*v))
	if c.reading && n > 0 {
		*v = make([]T, n)
	}
	for i := range *v {
		element(c, &(*v)[i])
	}
}

func pointer[T any](c *codec, v **T, element func(*codec, *T)) {
	present := *v != nil
	if truth(c, &present); !present {
		return
	}
	if c.reading {
		*v = new(T)
	}
	element(c, *v)
}

func dictionary(c *codec, v *map[string]string) {
	keys := slices.Sorted(maps.Keys(*v))
	n := c.length(len(keys))
	if c.reading {
		if n > 0 {
			*v = make(map[string]string, n)
		}
		keys = make([]string, n)
	}
	for _, key := range keys {
		value := (*v)[key]
		text(c, &key)
		text(c, &value)
		if c.reading {
			(*v)[key] = value
		}
	}
}
