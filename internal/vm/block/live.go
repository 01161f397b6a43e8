package block

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"atoll.dev/atoll/internal/vm/qmp"
)

// ErrNoVolume is wrapped when a machine has no such volume.
var ErrNoVolume = errors.New("no such volume")

// Snapshot freezes the top layer and lets the guest write to overlay, an empty qcow2 file as large as
// the volume, from one moment to the next. frozen is what was the top layer, its file opened anew for reading
// only: from then on QEMU cannot write to it.
//
// After an error the volume is as before, unless the error wraps monitor.ErrExited or is a timeout. What became of it
// after a timeout is found out with the next change of the volume; the same snapshot again goes on from there.
func (g *Graph) Snapshot(ctx context.Context, c *Chain, frozen, overlay Layer) error {
	if overlay.Format != QCOW2 {
		return fmt.Errorf("a layer of format %q cannot be on top of another", overlay.Format)
	}
	if err := errors.Join(checkLayer(overlay, true), checkLayer(frozen, false), c.writable()); err != nil {
		return err
	}
	ctx, cancel := g.WithPatience(ctx)
	defer cancel()
	if err := g.settle(ctx, c); err != nil {
		return err
	}
	old := len(c.layers) - 1
	if old > 0 && c.layers[old].image == imageOf(overlay) {
		g.freezeOrWarn(ctx, c, old-1, frozen)
		return nil
	}
	if len(c.layers) >= MaxLayers {
		return fmt.Errorf("%w: it has %d layers; delete snapshots of it", ErrLimit, MaxLayers)
	}
	err := g.addLayer(ctx, c, overlay, "", true)
	if err == nil {
		err = g.do(ctx, "putting the overlay on top", qmp.Command{Name: "blockdev-snapshot", Args: map[string]any{
			"node": c.layers[old].node, "overlay": c.Top(),
		}})
	}
	if err != nil {
		failed := c.layers[old+1]
		c.layers = c.layers[:old+1]
		if ctx.Err() != nil {
			c.unsure = &failed
			return err
		}
		return errors.Join(Locked(err), g.dropLayer(ctx, failed))
	}
	g.freezeOrWarn(ctx, c, old, frozen)
	return nil
}

// freezeOrWarn freezes layer i, which is below a snapshot that is taken. That QEMU could still write there is no
// reason to call the snapshot failed.
func (g *Graph) freezeOrWarn(ctx context.Context, c *Chain, i int, frozen Layer) {
	var err error
	if frozen.RBD != nil {
		err = g.freezeRBD(ctx, c, i, *frozen.RBD)
	} else {
		err = g.freezeFile(ctx, &c.layers[i], frozen.File)
	}
	if err != nil {
		slog.Warn("opening a frozen layer for reading only", "chain", c.prefix, "error", err)
	}
}

// freezeFile makes QEMU reopen a file for reading only and give up the descriptor it could write with.
func (g *Graph) freezeFile(ctx context.Context, l *layer, frozen *os.File) error {
	var added struct {
		FD int `json:"fd"`
	}
	err := g.do(
		ctx, "freezing layer",
		qmp.Command{Name: "add-fd", Args: map[string]any{"fdset-id": l.set}, File: frozen, Result: &added},
		qmp.Command{Name: "blockdev-reopen", Args: map[string]any{"options": []any{fileNodeOf(*l, false)}}},
	)
	if err != nil {
		return err
	}
	commands := make([]qmp.Command, 0, len(l.fds))
	for _, fd := range l.fds {
		commands = append(commands, qmp.Command{Name: "remove-fd", Args: map[string]any{"fdset-id": l.set, "fd": fd}})
	}
	l.fds = []int{added.FD}
	return g.do(ctx, "freezing layer", commands...)
}

// writable refuses a chain that cannot be changed.
func (c *Chain) writable() error {
	if c.readOnly {
		return errors.New("the volume is read-only")
	}
	return nil
}

// Depth is how many layers a volume has.
func (g *Graph) Depth(ctx context.Context, c *Chain) (int, error) {
	if err := g.settle(ctx, c); err != nil {
		return 0, err
	}
	return len(c.layers), nil
}

// Resize makes a volume at least that size, in bytes. The guest is told and has to look. A volume that
// is larger, because growing it was interrupted before it was written down, stays as it is.
func (g *Graph) Resize(ctx context.Context, c *Chain, bytes int64) error {
	if err := c.writable(); err != nil {
		return err
	}
	if bytes <= 0 || bytes%512 != 0 {
		return fmt.Errorf("a disk cannot have %d bytes", bytes)
	}
	ctx, cancel := g.WithPatience(ctx)
	defer cancel()
	if err := g.settle(ctx, c); err != nil {
		return err
	}
	if n, err := g.blockNode(ctx, c.Top()); err != nil || n.Image.Size >= bytes {
		return err
	}
	return g.do(ctx, "growing", qmp.Command{Name: "block_resize", Args: map[string]any{"node-name": c.Top(), "size": bytes}})
}

// Size is how large a volume is, in bytes.
func (g *Graph) Size(ctx context.Context, c *Chain) (int64, error) {
	n, err := g.blockNode(ctx, c.Top())
	return n.Image.Size, err
}

// Throttle is the command that changes what the disk of a device may do per second.
func Throttle(device string, l Limits) qmp.Command {
	return qmp.Command{Name: "block_set_io_throttle", Args: map[string]any{
		"id": device, "iops": l.IOPS, "iops_rd": l.ReadIOPS, "iops_wr": l.WriteIOPS,
		"bps": l.Bytes, "bps_rd": l.ReadBytes, "bps_wr": l.WriteBytes,
	}}
}

// IsLockMessage knows what QEMU says about an image that another process has open.
func IsLockMessage(text string) bool {
	return strings.Contains(text, "lock") && (strings.Contains(text, "Failed to get") || strings.Contains(text, "another process"))
}

// Missing knows what QEMU says about a node, a device, a set of descriptors or an object that is not there.
func Missing(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && (strings.Contains(q.Desc, "Failed to find node") || strings.Contains(q.Desc, "not found"))
}

// inUse knows what QEMU says about a node that another one needs.
func inUse(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && strings.Contains(q.Desc, "is in use")
}
