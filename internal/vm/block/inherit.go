package block

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"atoll.dev/atoll/internal/vm/qmp"
)

// Launch collects what a QEMU that is yet to be started needs for its chains: arguments, and files to inherit.
// Secrets are in files in memory, never in arguments.
type Launch struct {
	// Args are for the command line.
	Args []string
	// Inherit notes a file and returns its descriptor in QEMU.
	Inherit func(*os.File) int

	secret []*os.File // in memory
}

// Clear empties and closes the files with secrets. It must be called once QEMU has opened everything, or failed.
func (l *Launch) Clear() error {
	var errs []error
	for _, f := range l.secret {
		errs = append(errs, f.Truncate(0), f.Close())
	}
	l.secret = nil
	return errors.Join(errs...)
}

// memory makes a file in memory for QEMU and returns its descriptor there.
func (l *Launch) memory(name string, data []byte) (int, error) {
	f, err := inMemory(name, data)
	if err != nil {
		return 0, err
	}
	l.secret = append(l.secret, f)
	return l.Inherit(f), nil
}

// object adds an object with a secret in base64.
func (l *Launch) object(id, data string) error {
	fd, err := l.memory(id, []byte(data))
	if err != nil {
		return err
	}
	l.Args = append(l.Args, "-object", fmt.Sprintf("secret,id=%s,format=base64,file=/proc/self/fd/%d", id, fd))
	return nil
}

// Node adds a block node.
func (l *Launch) Node(options any) error {
	data, err := json.Marshal(options)
	if err != nil {
		return fmt.Errorf("describing a block node: %w", err)
	}
	l.Args = append(l.Args, "-blockdev", string(data))
	return nil
}

// File adds the node of a file.
func (l *Launch) File(set int, node string, f *os.File, writable, locking bool) error {
	l.Args = append(l.Args, "-add-fd", fmt.Sprintf("fd=%d,set=%d", l.Inherit(f), set))
	return l.Node(FileNode(set, node, writable, locking))
}

// Inherit is Open for a QEMU that is yet to be started. Adopt must follow when it runs.
func (g *Graph) Inherit(l *Launch, prefix string, v Volume) (*Chain, error) {
	c := &Chain{prefix: prefix, readOnly: v.ReadOnly}
	for i, layer := range v.Layers {
		n := g.newLayer(c, layer)
		if err := g.inheritLayer(l, &n, layer, c.Top(), v.writable(i)); err != nil {
			return nil, fmt.Errorf("opening %s: %w", layer.name(), err)
		}
		c.layers = append(c.layers, n)
	}
	return c, nil
}

func (g *Graph) inheritLayer(l *Launch, n *layer, layer Layer, backing string, writable bool) error {
	if layer.Key != nil {
		if err := l.object(n.secret, base64.StdEncoding.EncodeToString(layer.Key)); err != nil {
			return err
		}
	}
	if layer.RBD == nil {
		if err := l.File(n.set, n.file, layer.File, writable, true); err != nil {
			return err
		}
	} else {
		if layer.RBD.Key != "" {
			if err := l.object(rbdSecret(n.file), layer.RBD.Key); err != nil {
				return err
			}
		}
		conf, err := l.memory("ceph.conf", layer.RBD.Conf)
		if err != nil {
			return err
		}
		if err := l.Node(layer.RBD.options(n.file, conf, writable)); err != nil {
			return err
		}
	}
	n.open = formatNode(*n, layer, backing, writable)
	return l.Node(n.open)
}

// Adopt takes on a chain that QEMU was started with.
func (g *Graph) Adopt(ctx context.Context, c *Chain) error {
	for i := range c.layers {
		n := &c.layers[i]
		if n.set == 0 {
			remove := qmp.Command{Name: "object-del", Args: map[string]any{"id": rbdSecret(n.file)}}
			if err := g.do(ctx, "forgetting a key", remove); err != nil && !Missing(err) {
				return err
			}
			continue
		}
		var err error
		if n.fds, err = g.descriptors(ctx, n.set); err != nil {
			return err
		}
	}
	return nil
}
