package vm

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/qemu"
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
	Serial   string  // unit serial number, see Disk
	Layers   []Layer // lowest first
	ReadOnly bool    // for all layers
	Shared   bool    // others may write to it at the same time; raw only
	Limits   Limits
}

// MaxLayers bounds the layers of a volume. It is more than the engine makes (handover.MaxLayers), so that whatever
// the engine made can be opened.
const MaxLayers = 160

const (
	volumeFDSet = 1000 // first of the sets with files of volumes
	// changeTimeout bounds a change of the block graph. It goes on when its caller gives up, since half of
	// it is worse than waiting.
	changeTimeout = 60 * time.Second
)

// ErrLocked is wrapped when another process has a volume open.
var ErrLocked = errors.New("volume is in use by another process")

// volume is a volume that the machine has.
type volume struct {
	lun      int
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

// AddVolume adds a volume as a SCSI disk. Everything that reaches a disk and is flushed by the guest is
// flushed to the file. When the host's file system is full the machine stops instead of failing a write; see
// Stalled.
//
// After an error, RemoveVolume tells whether QEMU has closed all files: it has if there is no such volume.
//
// It returns the LUN on target 0 of bus 0.
func (m *Machine) AddVolume(ctx context.Context, v Volume) (lun int, err error) {
	doing := fmt.Sprintf("adding volume %q", v.Serial)
	if err := checkVolume(v); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	if _, ok := m.disks[v.Serial]; ok {
		return 0, fmt.Errorf("%s: there is one already", doing)
	}
	if lun, err = m.takeLUN(); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.patience)
	defer cancel()
	vol := &volume{lun: lun, readOnly: v.ReadOnly}
	for i, l := range v.Layers {
		writable := i == len(v.Layers)-1 && !v.ReadOnly
		if err := m.addLayer(ctx, vol, l, vol.top(), writable); err != nil {
			return 0, fmt.Errorf("%s: %w", doing, errors.Join(locked(err), m.abandonVolume(ctx, v.Serial, vol)))
		}
	}
	device := map[string]any{
		"driver": "scsi-hd", "id": diskID(lun), "bus": qemu.SCSIBus, "channel": 0, "scsi-id": 0, "lun": lun,
		"drive": vol.top(), "serial": v.Serial, "rerror": "report", "werror": "enospc",
	}
	if v.Shared {
		device["share-rw"] = true
	}
	err = m.run(ctx, doing, qmp.Command{Name: "device_add", Args: device})
	if err == nil && v.Limits != (Limits{}) {
		if err = m.run(ctx, doing, throttle(lun, v.Limits)); err != nil {
			err = errors.Join(err, m.unplug(ctx, lun))
		}
	}
	if err != nil {
		return 0, errors.Join(locked(err), m.abandonVolume(ctx, v.Serial, vol))
	}
	m.disks[v.Serial] = lun
	m.volumes[v.Serial] = vol
	return lun, nil
}

func checkVolume(v Volume) error {
	if err := checkSerial(v.Serial); err != nil {
		return err
	}
	if len(v.Layers) == 0 || len(v.Layers) > MaxLayers {
		return fmt.Errorf("a volume has 1 to %d layers, not %d", MaxLayers, len(v.Layers))
	}
	for i, l := range v.Layers {
		writable := i == len(v.Layers)-1 && !v.ReadOnly
		if l.Format == Raw && i > 0 {
			return errors.New("a raw layer has no layer below it")
		}
		if v.Shared && l.Format != Raw {
			return fmt.Errorf("only a raw volume can be shared, not %s", l.Format)
		}
		if err := checkLayer(l, writable); err != nil {
			return err
		}
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
	if err := checkAccess(l.File, access); err != nil || l.Format == Raw {
		return err
	}
	return checkQCOW2(l.File)
}

// locked tells QEMU's complaint about an image lock from others.
func locked(err error) error {
	var q *qmp.Error
	if errors.As(err, &q) && isLockMessage(q.Desc) {
		return fmt.Errorf("%w: %w", ErrLocked, err)
	}
	return err
}

// top is the node that the guest writes to, "" without layers.
func (v *volume) top() string {
	if len(v.layers) == 0 {
		return ""
	}
	return v.layers[len(v.layers)-1].node
}

// fileNodeOf describes the node of a layer's file.
func fileNodeOf(l layer, writable bool) fileNode {
	n := fileNode{
		Driver: "file", Node: l.file, Filename: fmt.Sprintf("/dev/fdset/%d", l.set),
		ReadOnly: !writable, Locking: "on",
	}
	if writable {
		n.Discard = "unmap"
	}
	return n
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

// addLayer puts a layer on the nodes of a volume. The layer is noted as soon as there is anything to undo.
func (m *Machine) addLayer(ctx context.Context, v *volume, l Layer, backing string, writable bool) error {
	name := fmt.Sprintf("v%d.%d", v.lun, v.next)
	n := layer{node: name, file: name + "f", set: m.nextSet, image: imageOf(l)}
	v.next++
	m.nextSet++
	doing := "opening " + l.name()
	var err error
	if l.Key != nil {
		n.secret = name + "k"
		err = m.run(ctx, doing, qmp.Command{Name: "object-add", Args: map[string]any{
			"qom-type": "secret", "id": n.secret, "format": "base64", "data": base64.StdEncoding.EncodeToString(l.Key),
		}})
	}
	switch {
	case err != nil:
	case l.RBD != nil:
		n.set = 0
		err = m.openRBD(ctx, n.file, *l.RBD, writable)
	default:
		var added struct {
			FD int `json:"fd"`
		}
		err = m.run(
			ctx, doing,
			qmp.Command{Name: "add-fd", Args: map[string]any{"fdset-id": n.set}, File: l.File, Result: &added},
			qmp.Command{Name: "blockdev-add", Args: fileNodeOf(n, writable)},
		)
		n.fds = []int{added.FD}
	}
	if err == nil {
		n.open = formatNode(n, l, backing, writable)
		err = m.run(ctx, doing, qmp.Command{Name: "blockdev-add", Args: n.open})
	}
	v.layers = append(v.layers, n)
	return err
}

// dropVolume closes all layers, highest first. Whatever of a layer is not there is fine.
func (m *Machine) dropVolume(ctx context.Context, v *volume) error {
	var first error
	all := v.layers
	if v.unsure != nil { // on top if it is anywhere
		all = append(slices.Clip(all), *v.unsure)
	}
	for _, l := range slices.Backward(all) {
		if err := m.dropLayer(ctx, l); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// abandonVolume closes what was opened of a volume that cannot be added. What cannot be closed is left to
// RemoveVolume.
func (m *Machine) abandonVolume(ctx context.Context, serial string, v *volume) error {
	err := m.dropVolume(ctx, v)
	if err != nil {
		m.disks[serial] = v.lun
		m.volumes[serial] = v
	}
	return err
}

func (m *Machine) dropLayer(ctx context.Context, l layer) error {
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
		err := m.run(ctx, "closing layer", c)
		if err != nil && first == nil && !missing(err) {
			first = err
		}
	}
	return first
}

// RemoveVolume takes a volume away, whether or not the guest still uses it, and closes its files. What the
// guest has flushed is in them, and what QEMU keeps of their structure is written.
func (m *Machine) RemoveVolume(ctx context.Context, serial string) error {
	doing := fmt.Sprintf("removing volume %q", serial)
	m.devices.Lock()
	defer m.devices.Unlock()
	v := m.volumes[serial]
	if v == nil {
		return fmt.Errorf("%s: %w", doing, ErrNoVolume)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.patience)
	defer cancel()
	if err := m.unplug(ctx, v.lun); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if err := m.dropVolume(ctx, v); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	delete(m.volumes, serial)
	delete(m.disks, serial)
	return nil
}
