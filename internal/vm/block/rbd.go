package block

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"

	"atoll.dev/atoll/internal/linux/memfd"
	"atoll.dev/atoll/internal/vm/qmp"
)

// RBD is an image in Ceph. QEMU connects to the cluster itself, over the network of the host.
type RBD struct {
	Pool, Namespace, Image string
	User                   string // without "client."; empty is admin
	// Conf is a ceph.conf, which QEMU reads from memory: the host's own may be closed to its user. It bounds how
	// long connecting takes, during which the machine stands still.
	Conf []byte
	// Key is the user's cephx key in base64; empty without authentication.
	Key string
}

// ErrModule is wrapped when QEMU lacks its driver for Ceph.
var ErrModule = errors.New("QEMU cannot open images in Ceph; install the package qemu-block-extra")

func (r *RBD) check() error {
	if r.Pool == "" || r.Image == "" || len(r.Conf) == 0 {
		return fmt.Errorf("%w: an image in Ceph without pool, name or configuration", ErrImage)
	}
	if _, err := base64.StdEncoding.DecodeString(r.Key); err != nil {
		return fmt.Errorf("the cephx key of %s is no key", r.User)
	}
	return nil
}

// openRBD makes a block node of an image. Key and configuration are with QEMU for as long as this takes. There is
// no cache, whose memory would count as the pod's: a write is on the disks of the cluster when it is done.
func (g *Graph) openRBD(ctx context.Context, node string, r RBD, writable bool) error {
	doing := "opening rbd:" + r.Pool + "/" + r.Image
	conf, err := inMemory("ceph.conf", r.Conf)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	defer conf.Close()
	set := g.nextSet
	g.nextSet++
	var added struct {
		FD int `json:"fd"`
	}
	if err := g.do(ctx, doing, qmp.Command{Name: "add-fd", Args: map[string]any{"fdset-id": set}, File: conf, Result: &added}); err != nil {
		return err
	}
	options := r.options(node, added.FD, writable)
	after := []qmp.Command{{Name: "remove-fd", Args: map[string]any{"fdset-id": set}}}
	if r.Key != "" {
		secret := rbdSecret(node)
		err = g.do(ctx, doing, qmp.Command{Name: "object-add", Args: map[string]any{
			"qom-type": "secret", "id": secret, "format": "base64", "data": r.Key,
		}})
		after = append(after, qmp.Command{Name: "object-del", Args: map[string]any{"id": secret}})
	}
	if err == nil {
		err = module(g.do(ctx, doing, qmp.Command{Name: "blockdev-add", Args: options}))
	}
	for _, c := range after {
		if afterErr := g.do(ctx, doing, c); err == nil {
			err = afterErr
		}
	}
	return err
}

// options is the blockdev-add argument of an image; conf is the descriptor of its configuration in QEMU.
func (r *RBD) options(node string, conf int, writable bool) map[string]any {
	options := map[string]any{
		"driver": "rbd", "node-name": node, "read-only": !writable, "pool": r.Pool, "image": r.Image,
		"conf": fmt.Sprintf("/proc/self/fd/%d", conf), "cache": map[string]any{"direct": true},
	}
	if r.Namespace != "" {
		options["namespace"] = r.Namespace
	}
	if r.User != "" {
		options["user"] = r.User
	}
	if r.Key != "" {
		options["key-secret"] = rbdSecret(node)
	}
	if writable {
		options["discard"] = "unmap"
	}
	return options
}

// rbdSecret is the object with the key for an image, while that is being opened.
func rbdSecret(node string) string { return node + "c" }

// module knows what QEMU says without its driver.
func module(err error) error {
	var q *qmp.Error
	if errors.As(err, &q) && strings.Contains(q.Desc, "'rbd'") && strings.Contains(q.Desc, "driver") {
		return fmt.Errorf("%w: %w", ErrModule, err)
	}
	return err
}

// frozenNode is the node of an image that is open for reading only, after freezing.
func frozenNode(l layer) string { return l.node + "r" }

// freezeRBD makes QEMU open the image of layer i anew for reading only, in place of the node it could write with. It
// can be done again.
func (g *Graph) freezeRBD(ctx context.Context, v *Chain, i int, frozen RBD) error {
	l := &v.layers[i]
	node := frozenNode(*l)
	if l.file == node {
		return nil
	}
	remove := qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": node}}
	// There may be one of an attempt that was not waited for, in use already if reopening was what took so long.
	if err := g.do(ctx, "freezing layer", remove); err == nil || Missing(err) {
		if err := g.openRBD(ctx, node, frozen, false); err != nil {
			return err
		}
	} else if !inUse(err) {
		return err
	}
	options := maps.Clone(l.open)
	delete(options, "discard")
	options["file"], options["read-only"] = node, true
	if i > 0 {
		options["backing"] = v.layers[i-1].node
	}
	if err := g.do(ctx, "freezing layer", qmp.Command{Name: "blockdev-reopen", Args: map[string]any{"options": []any{options}}}); err != nil {
		return errors.Join(err, g.do(ctx, "freezing layer", remove))
	}
	old := l.file
	l.file, l.open = node, options
	err := g.do(ctx, "freezing layer", qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": old}})
	if Missing(err) {
		return nil
	}
	return err
}

// inMemory is a file that has no name.
func inMemory(name string, data []byte) (*os.File, error) {
	f, err := memfd.Create(name, 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(data); err != nil {
		return nil, errors.Join(fmt.Errorf("making a file in memory: %w", err), f.Close())
	}
	return f, nil
}
