package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/vm/qmp"
)

const (
	// cephConf is the ceph.conf in a daemon's tree.
	cephConf = "/etc/ceph.conf"
	// cephSecret is the object with the key. It stays, for layers that are added later.
	cephSecret = "ceph"
)

// addCeph gives a daemon what it takes to find a cluster: its ceph.conf, and how this host finds names.
func addCeph(root string, conf []byte) error {
	dir := filepath.Join(root, filepath.Dir(cephConf))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"hosts", "resolv.conf", "nsswitch.conf"} {
		data, err := os.ReadFile(filepath.Join("/etc", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(root, cephConf), conf, 0o644)
}

// giveKey gives a daemon the key of the cluster, if there is one.
func giveKey(ctx context.Context, c *qmp.Client, ceph *handover.Ceph) error {
	if ceph == nil || ceph.Key == "" {
		return nil
	}
	err := c.Execute(ctx, "object-add", map[string]any{"qom-type": "secret", "id": cephSecret, "format": "base64", "data": ceph.Key}, nil)
	if err != nil {
		return fmt.Errorf("handing over the key of Ceph: %w", err)
	}
	return nil
}

// protocol says where a layer is.
func protocol(ctx context.Context, c *qmp.Client, l handover.Layer) (map[string]any, error) {
	if l.RBD == nil {
		return map[string]any{"driver": "file", "filename": l.File, "locking": "on"}, nil
	}
	args := map[string]any{
		"driver": "rbd", "pool": l.RBD.Pool, "image": l.RBD.Image, "conf": cephConf, "cache": map[string]any{"direct": true},
	}
	if l.RBD.Namespace != "" {
		args["namespace"] = l.RBD.Namespace
	}
	if l.RBD.User != "" {
		args["user"] = l.RBD.User
	}
	var objects []struct {
		Name string `json:"name"`
	}
	if err := c.Execute(ctx, "qom-list", map[string]any{"path": "/objects"}, &objects); err != nil {
		return nil, fmt.Errorf("looking for the key of Ceph: %w", err)
	}
	for _, o := range objects {
		if o.Name == cephSecret {
			args["key-secret"] = cephSecret
		}
	}
	return args, nil
}

// noDriver knows what a daemon says without the driver for Ceph.
func noDriver(err error) error {
	var q *qmp.Error
	if errors.As(err, &q) && strings.Contains(q.Desc, "'rbd'") && strings.Contains(q.Desc, "driver") {
		return fmt.Errorf("%w: install the package qemu-block-extra: %w", ErrMissing, err)
	}
	return err
}
