package block

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/qmp"
)

// image identifies the file of a layer, or its image in Ceph.
type image struct {
	dev, inode uint64
	rbd        string
}

// imageOf is zero for a file that cannot be looked at, which QEMU will refuse.
func imageOf(l Layer) image {
	if l.RBD != nil {
		return image{rbd: l.RBD.Pool + "/" + l.RBD.Namespace + "/" + l.RBD.Image}
	}
	var st unix.Stat_t
	if unix.Fstat(int(l.File.Fd()), &st) != nil {
		return image{}
	}
	return image{dev: st.Dev, inode: st.Ino}
}

// settle finds out what became of a snapshot for whose end nobody waited: QEMU answers in order, so that it has
// come to an end when this is answered.
func (g *Graph) settle(ctx context.Context, v *Chain) error {
	if v.unsure == nil {
		return nil
	}
	l := *v.unsure
	n, err := g.blockNode(ctx, l.node)
	if err != nil && !errors.Is(err, errNoNode) {
		return fmt.Errorf("looking for the last snapshot: %w", err)
	}
	if n.Depth == 0 { // it has nothing below it, so the guest does not use it
		if err := g.dropLayer(ctx, l); err != nil {
			return fmt.Errorf("undoing the last snapshot: %w", err)
		}
		v.unsure = nil
		return nil
	}
	if l.fds, err = g.descriptors(ctx, l.set); err != nil {
		return fmt.Errorf("looking for the last snapshot: %w", err)
	}
	v.layers, v.unsure = append(v.layers, l), nil
	return nil
}

// errNoNode is wrapped when QEMU has no block node of a name.
var errNoNode = errors.New("no such block node")

// blockNode is what QEMU says about a block node.
type blockNode struct {
	Node  string `json:"node-name"`
	Depth int    `json:"backing_file_depth"` // how many there are below it
	Image struct {
		Size int64 `json:"virtual-size"`
	} `json:"image"`
}

func (g *Graph) blockNode(ctx context.Context, name string) (blockNode, error) {
	var nodes []blockNode
	query := qmp.Command{Name: "query-named-block-nodes", Args: map[string]any{"flat": true}, Result: &nodes}
	if err := g.do(ctx, "looking at a volume", query); err != nil {
		return blockNode{}, err
	}
	for _, n := range nodes {
		if n.Node == name {
			return n, nil
		}
	}
	return blockNode{}, fmt.Errorf("looking at a volume: %w: %q", errNoNode, name)
}

// descriptors are those in a set, as QEMU numbers them.
func (g *Graph) descriptors(ctx context.Context, set int) ([]int, error) {
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			FD int `json:"fd"`
		} `json:"fds"`
	}
	if err := g.do(ctx, "looking at descriptors", qmp.Command{Name: "query-fdsets", Result: &sets}); err != nil {
		return nil, err
	}
	var fds []int
	for _, s := range sets {
		if s.ID != set {
			continue
		}
		for _, fd := range s.FDs {
			fds = append(fds, fd.FD)
		}
	}
	return fds, nil
}
