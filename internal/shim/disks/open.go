package disks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/vm"
)

const (
	// openTimeout bounds how long to wait for the agent, which may be restarting.
	openTimeout = 60 * time.Second
	openRetry   = 100 * time.Millisecond
)

// Ask asks the agent of a run directory how to open a volume, and again while it does not answer.
func Ask(ctx context.Context, runDir string, r attach.OpenRequest) (attach.Opened, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	for {
		var opened attach.Opened
		err := attach.Call(ctx, attach.AgentSocket(runDir), attach.MethodOpen, r, &opened)
		var refused *attach.Error
		if err == nil || errors.As(err, &refused) {
			return opened, err
		}
		select {
		case <-ctx.Done():
			return attach.Opened{}, err
		case <-time.After(openRetry):
		}
	}
}

// Volume opens what the agent has said, for QEMU. CloseVolume must follow, also after an error.
func Volume(opened attach.Opened, readOnly bool) (vm.Volume, error) {
	v := vm.Volume{ReadOnly: readOnly, Shared: opened.Disk.Shared && !readOnly, Limits: Limits(opened.Limits)}
	for i, l := range opened.Disk.Layers {
		flags := os.O_RDONLY
		if i == len(opened.Disk.Layers)-1 && !readOnly {
			flags = os.O_RDWR
		}
		layer, err := OpenLayer(l, opened.Ceph, flags)
		if err != nil {
			return v, err
		}
		v.Layers = append(v.Layers, layer)
		if l.Key == "" {
			continue
		}
		key, ok := opened.Keys[l.Key]
		if !ok {
			return v, fmt.Errorf("layer %s is encrypted and its key is missing", l.ID)
		}
		v.Layers[i].Key = key
	}
	return v, nil
}

// CloseVolume closes the files of a volume. QEMU has its own.
func CloseVolume(v vm.Volume) {
	for _, l := range v.Layers {
		CloseLayer(l)
	}
}

// OpenLayer opens the file of a layer, never a link or anything but a regular file. An image in Ceph is opened by
// QEMU.
func OpenLayer(l handover.Layer, ceph *handover.Ceph, flags int) (vm.Layer, error) {
	if l.RBD != nil {
		if ceph == nil {
			return vm.Layer{}, fmt.Errorf("layer %s is in Ceph, and the agent did not say how to reach it", l.ID)
		}
		return vm.Layer{Format: vm.Format(l.Format), RBD: &vm.RBD{
			Pool: l.RBD.Pool, Namespace: l.RBD.Namespace, Image: l.RBD.Image, User: l.RBD.User, Conf: ceph.Conf, Key: ceph.Key,
		}}, nil
	}
	f, err := os.OpenFile(l.File, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return vm.Layer{}, fmt.Errorf("opening layer: %w", err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return vm.Layer{}, errors.Join(fmt.Errorf("layer %s is not a regular file", l.File), err, f.Close())
	}
	return vm.Layer{Format: vm.Format(l.Format), File: f}, nil
}

// CloseLayer closes a file. QEMU has its own.
func CloseLayer(l vm.Layer) {
	if l.File != nil {
		_ = l.File.Close()
	}
}

// Overlay opens the layers of a snapshot: the one that is on top until then, and the one that is to be. CloseLayer
// must follow for both.
func Overlay(top handover.Layer, r attach.SnapshotRequest) (frozen, overlay vm.Layer, err error) {
	if r.Overlay.Key != "" && len(r.Key) == 0 {
		return vm.Layer{}, vm.Layer{}, fmt.Errorf("layer %s is encrypted and its key is missing", r.Overlay.ID)
	}
	if frozen, err = OpenLayer(top, r.Ceph, os.O_RDONLY); err != nil {
		return vm.Layer{}, vm.Layer{}, err
	}
	if overlay, err = OpenLayer(r.Overlay, r.Ceph, os.O_RDWR); err != nil {
		CloseLayer(frozen)
		return vm.Layer{}, vm.Layer{}, err
	}
	if r.Overlay.Key != "" {
		overlay.Key = r.Key
	}
	return frozen, overlay, nil
}

// Limits are limits in the words of QEMU.
func Limits(l attach.Limits) vm.Limits {
	return vm.Limits{
		IOPS: l.IOPS, ReadIOPS: l.ReadIOPS, WriteIOPS: l.WriteIOPS,
		Bytes: l.Bytes, ReadBytes: l.ReadBytes, WriteBytes: l.WriteBytes,
	}
}
