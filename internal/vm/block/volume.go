// Package block keeps the block nodes of persistent disks in a running QEMU: a volume is a chain of layers,
// each a file or an image in Ceph, that QEMU gets by descriptor.
//
// A Graph opens, closes, snapshots and grows chains over QMP. It knows no device: packages vm and hardware put
// one on the top of a chain. It opens no file by name. What can go wrong: another process has an image open
// (ErrLocked), an image is damaged or names other files (ErrImage), QEMU has ended (monitor.ErrExited), or takes
// too long; what became of a change that was not waited for is found out with the next one.
package block

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/qmp"
)

// Format is how a layer of a volume is written in its file.
type Format string

// The formats. A raw layer can only be the lowest.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// Layer is one file of a volume, or one image in Ceph. A file name or backing file that is named inside of it is
// never followed.
type Layer struct {
	Format Format
	File   *os.File // open for reading only, but the top layer of a writable volume for both
	RBD    *RBD     // instead of File
	Key    []byte   // opens LUKS, inside of qcow2 or over raw; nil: not encrypted
}

// name is for messages.
func (l Layer) name() string {
	if l.RBD != nil {
		return "rbd:" + l.RBD.Pool + "/" + l.RBD.Image
	}
	return l.File.Name()
}

// Limits is what a volume may do per second; zero is no limit.
type Limits struct {
	IOPS, ReadIOPS, WriteIOPS    int64 // requests
	Bytes, ReadBytes, WriteBytes int64
}

// Volume is a persistent disk, to be added to a running machine. Files stay owned by the caller, who may
// close them once AddVolume has returned: QEMU's lock on the top layer goes with the last descriptor, which
// then is QEMU's.
type Volume struct {
	Serial   string  // unit serial number, 1 to 36 letters, digits, '-', '_' or '.'
	Layers   []Layer // lowest first
	ReadOnly bool    // for all layers
	Shared   bool    // others may write to it at the same time; raw only
	Limits   Limits
}

// MaxLayers bounds the layers of a volume. It is more than the engine makes (handover.MaxLayers), so that whatever
// the engine made can be opened.
const MaxLayers = 160

const (
	firstFDSet = 1000 // of the sets with files of layers
	// Patience bounds a change of the block graph. It goes on when its caller gives up, since half of
	// it is worse than waiting.
	Patience = 60 * time.Second
)

// Errors to tell apart with errors.Is.
var (
	// ErrLocked: another process has a volume open.
	ErrLocked = errors.New("volume is in use by another process")
	// ErrImage: the image of a volume is damaged or no image that may be attached.
	ErrImage = errors.New("image is not usable")
	// ErrLimit: the volume has as many layers as it can have.
	ErrLimit = errors.New("beyond what the machine allows")
)

// Graph is the block nodes of one QEMU. Its methods must not be called at the same time.
type Graph struct {
	do       Do
	patience time.Duration
	nextSet  int
}

// Do executes commands; errors begin with doing.
type Do func(ctx context.Context, doing string, commands ...qmp.Command) error

// New is the graph of a QEMU that has no chains yet. patience is Patience, but in tests.
func New(do Do, patience time.Duration) *Graph {
	return &Graph{do: do, patience: patience, nextSet: firstFDSet}
}

// SetPatience is for tests that do not want to wait for long.
func (g *Graph) SetPatience(d time.Duration) { g.patience = d }

// WithPatience is a context for a change of the graph, which does not end with its caller's.
func (g *Graph) WithPatience(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), g.patience)
}

// Chain is a volume that QEMU has open.
type Chain struct {
	prefix   string // of the names of its nodes
	readOnly bool
	layers   []layer // lowest first
	next     int     // number for the next layer
	unsure   *layer  // of a snapshot whose end was not waited for, see settle
}

// layer is the nodes of one layer.
type layer struct {
	node, file string
	set        int   // of descriptors, of a file
	fds        []int // in it, as QEMU numbers them
	secret     string
	image      image
	open       map[string]any // how node was opened
}

// Open opens the layers of a volume; prefix begins the names of its nodes, and is no other chain's. The chain is
// there also after an error, for Close.
func (g *Graph) Open(ctx context.Context, prefix string, v Volume) (*Chain, error) {
	c := &Chain{prefix: prefix, readOnly: v.ReadOnly}
	for i, l := range v.Layers {
		if err := g.addLayer(ctx, c, l, c.Top(), v.writable(i)); err != nil {
			return c, Locked(err)
		}
	}
	return c, nil
}

// writable tells whether layer i is written to.
func (v Volume) writable(i int) bool { return i == len(v.Layers)-1 && !v.ReadOnly }

// Check refuses what cannot be opened. It looks into files.
func (v Volume) Check() error {
	if len(v.Layers) == 0 || len(v.Layers) > MaxLayers {
		return fmt.Errorf("a volume has 1 to %d layers, not %d", MaxLayers, len(v.Layers))
	}
	for i, l := range v.Layers {
		if l.Format == Raw && i > 0 {
			return errors.New("a raw layer has no layer below it")
		}
		if v.Shared && l.Format != Raw {
			return fmt.Errorf("only a raw volume can be shared, not %s", l.Format)
		}
		if err := checkLayer(l, v.writable(i)); err != nil {
			return err
		}
	}
	return nil
}

// CheckSerial refuses serial numbers that a guest could not find again.
func CheckSerial(s string) error {
	if len(s) < 1 || len(s) > 36 {
		return errors.New("serial number needs 1 to 36 characters")
	}
	for _, r := range s {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.", r) {
			return fmt.Errorf("serial number %q has the character %q", s, r)
		}
	}
	return nil
}

// CheckAccess refuses a file that is open for more or less than it is needed for: QEMU, and a guest
// that took it over, can do with a file whatever it was opened for.
func CheckAccess(f *os.File, want int) error {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("reading the flags of %s: %w", f.Name(), err)
	}
	if flags&unix.O_ACCMODE != want {
		return fmt.Errorf("%s is open with access mode %d instead of %d", f.Name(), flags&unix.O_ACCMODE, want)
	}
	return nil
}

func checkLayer(l Layer, writable bool) error {
	access := unix.O_RDONLY
	if writable {
		access = unix.O_RDWR
	}
	if l.Format != Raw && l.Format != QCOW2 {
		return fmt.Errorf("unknown format %q of %s", l.Format, l.name())
	}
	if l.RBD != nil {
		return l.RBD.check() // no one but the caller can look into it
	}
	if err := CheckAccess(l.File, access); err != nil || l.Format == Raw {
		return err
	}
	return checkQCOW2(l.File)
}

// Locked tells QEMU's complaint about an image lock from others.
func Locked(err error) error {
	var q *qmp.Error
	if errors.As(err, &q) && IsLockMessage(q.Desc) {
		return fmt.Errorf("%w: %w", ErrLocked, err)
	}
	return err
}

// Top is the node that the guest writes to, "" without layers.
func (c *Chain) Top() string {
	if len(c.layers) == 0 {
		return ""
	}
	return c.layers[len(c.layers)-1].node
}

// File is a blockdev-add argument: the node of a file.
type File struct {
	Driver   string `json:"driver"`
	Node     string `json:"node-name"`
	Filename string `json:"filename"`
	ReadOnly bool   `json:"read-only"`
	Locking  string `json:"locking"`
	Discard  string `json:"discard,omitempty"` // how the guest's trim reaches the file
}

// FileNode describes the node of the file in a set of descriptors.
func FileNode(set int, node string, writable, locking bool) File {
	n := File{Driver: "file", Node: node, Filename: fmt.Sprintf("/dev/fdset/%d", set), ReadOnly: !writable, Locking: "off"}
	if locking {
		n.Locking = "on"
	}
	if writable {
		n.Discard = "unmap"
	}
	return n
}

// fileNodeOf describes the node of a layer's file.
func fileNodeOf(l layer, writable bool) File {
	return FileNode(l.set, l.file, writable, true)
}

// formatNode is the blockdev-add argument of what is in a layer's file.
func formatNode(n layer, l Layer, backing string, writable bool) map[string]any {
	node := map[string]any{"driver": string(l.Format), "node-name": n.node, "file": n.file, "read-only": !writable}
	if writable {
		node["discard"] = "unmap"
	}
	switch {
	case l.Format == Raw && n.secret != "":
		node["driver"], node["key-secret"] = "luks", n.secret
	case l.Format == QCOW2:
		node["backing"] = nil // whatever the file says
		if backing != "" {
			node["backing"] = backing
		}
		if n.secret != "" {
			node["encrypt"] = map[string]any{"format": "luks", "key-secret": n.secret}
		}
	}
	return node
}

// newLayer is the names of the next layer.
func (g *Graph) newLayer(c *Chain, l Layer) layer {
	name := fmt.Sprintf("%s.%d", c.prefix, c.next)
	n := layer{node: name, file: name + "f", image: imageOf(l)}
	c.next++
	if l.RBD == nil {
		n.set = g.nextSet
	}
	g.nextSet++
	if l.Key != nil {
		n.secret = name + "k"
	}
	return n
}

// addLayer puts a layer on the nodes of a volume. The layer is noted as soon as there is anything to undo.
func (g *Graph) addLayer(ctx context.Context, c *Chain, l Layer, backing string, writable bool) error {
	n := g.newLayer(c, l)
	doing := "opening " + l.name()
	var err error
	if l.Key != nil {
		err = g.do(ctx, doing, qmp.Command{Name: "object-add", Args: map[string]any{
			"qom-type": "secret", "id": n.secret, "format": "base64", "data": base64.StdEncoding.EncodeToString(l.Key),
		}})
	}
	switch {
	case err != nil:
	case l.RBD != nil:
		err = g.openRBD(ctx, n.file, *l.RBD, writable)
	default:
		var added struct {
			FD int `json:"fd"`
		}
		err = g.do(
			ctx, doing,
			qmp.Command{Name: "add-fd", Args: map[string]any{"fdset-id": n.set}, File: l.File, Result: &added},
			qmp.Command{Name: "blockdev-add", Args: fileNodeOf(n, writable)},
		)
		n.fds = []int{added.FD}
	}
	if err == nil {
		n.open = formatNode(n, l, backing, writable)
		err = g.do(ctx, doing, qmp.Command{Name: "blockdev-add", Args: n.open})
	}
	c.layers = append(c.layers, n)
	return err
}

// Close closes all layers, highest first. Whatever of a layer is not there is fine. What the guest has flushed is
// in the files, and what QEMU keeps of their structure is written.
func (g *Graph) Close(ctx context.Context, c *Chain) error {
	var first error
	all := c.layers
	if c.unsure != nil { // on top if it is anywhere
		all = append(slices.Clip(all), *c.unsure)
	}
	for _, l := range slices.Backward(all) {
		if err := g.dropLayer(ctx, l); err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (g *Graph) dropLayer(ctx context.Context, l layer) error {
	commands := []qmp.Command{
		{Name: "blockdev-del", Args: map[string]any{"node-name": l.node}},
		{Name: "blockdev-del", Args: map[string]any{"node-name": l.file}},
	}
	if l.set != 0 {
		commands = append(commands, qmp.Command{Name: "remove-fd", Args: map[string]any{"fdset-id": l.set}})
	}
	if l.image.rbd != "" { // one of the two is l.file, unless freezing was not waited for
		for _, node := range []string{l.node + "f", frozenNode(l)} {
			if node != l.file {
				commands = append(commands, qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": node}})
			}
		}
	}
	if l.secret != "" {
		commands = append(commands, qmp.Command{Name: "object-del", Args: map[string]any{"id": l.secret}})
	}
	var first error
	for _, c := range commands {
		err := g.do(ctx, "closing layer", c)
		if err != nil && first == nil && !Missing(err) {
			first = err
		}
	}
	return first
}

// Prefix begins the names of the chain's nodes: up to the first dot.
func (c *Chain) Prefix() string { return c.prefix }
