package vm

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"

	"golang.org/x/sys/unix"

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
func (m *Machine) openRBD(ctx context.Context, node string, r RBD, writable bool) error {
	doing := "opening rbd:" + r.Pool + "/" + r.Image
	conf, err := inMemory(r.Conf)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	defer conf.Close()
	set := m.nextSet
	m.nextSet++
	var added struct {
		FD int `json:"fd"`
	}
	if err := m.run(ctx, doing, qmp.Command{Name: "add-fd", Args: map[string]any{"fdset-id": set}, File: conf, Result: &added}); err != nil {
		return err
	}
	options := map[string]any{
		"driver": "rbd", "node-name": node, "read-only": !writable, "pool": r.Pool, "image": r.Image,
		"conf": fmt.Sprintf("/proc/self/fd/%d", added.FD), "cache": map[string]any{"direct": true},
	}
	if r.Namespace != "" {
		options["namespace"] = r.Namespace
	}
	if r.User != "" {
		options["user"] = r.User
	}
	if writable {
		options["discard"] = "unmap"
	}
	after := []qmp.Command{{Name: "remove-fd", Args: map[string]any{"fdset-id": set}}}
	if r.Key != "" {
		secret := node + "c"
		options["key-secret"] = secret
		err = m.run(ctx, doing, qmp.Command{Name: "object-add", Args: map[string]any{
			"qom-type": "secret", "id": secret, "format": "base64", "data": r.Key,
		}})
		after = append(after, qmp.Command{Name: "object-del", Args: map[string]any{"id": secret}})
	}
	if err == nil {
		err = module(m.run(ctx, doing, qmp.Command{Name: "blockdev-add", Args: options}))
	}
	for _, c := range after {
		if afterErr := m.run(ctx, doing, c); err == nil {
			err = afterErr
		}
	}
	return err
}

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
func (m *Machine) freezeRBD(ctx context.Context, v *volume, i int, frozen RBD) error {
	l := &v.layers[i]
	node := frozenNode(*l)
	if l.file == node {
		return nil
	}
	remove := qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": node}}
	// There may be one of an attempt that was not waited for, in use already if reopening was what took so long.
	if err := m.run(ctx, "freezing layer", remove); err == nil || missing(err) {
		if err := m.openRBD(ctx, node, frozen, false); err != nil {
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
	if err := m.run(ctx, "freezing layer", qmp.Command{Name: "blockdev-reopen", Args: map[string]any{"options": []any{options}}}); err != nil {
		return errors.Join(err, m.run(ctx, "freezing layer", remove))
	}
	old := l.file
	l.file, l.open = node, options
	err := m.run(ctx, "freezing layer", qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": old}})
	if missing(err) {
		return nil
	}
	return err
}

// inMemory is a file that has no name.
func inMemory(data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("ceph.conf", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ceph.conf")
	if _, err := f.Write(data); err != nil {
		return nil, errors.Join(fmt.Errorf("making a file in memory: %w", err), f.Close())
	}
	return f, nil
}
