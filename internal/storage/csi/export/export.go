// Package export makes volumes visible on the host, for pods that do not run in a micro-VM: one storage daemon
// of QEMU for each volume shows it as a regular file, by FUSE.
//
// A daemon has a user of its own, no way to become another, and a file tree in which there is nothing but
// QEMU's libraries and the directories of the volume's layers, in which it may open any file. It gets the FUSE
// connection and its control socket as inherited descriptors. For a volume in Ceph its tree has no directories but
// a ceph.conf, and it gets the key over the control socket. It outlives the process that has started it:
// whoever comes next drives it through the socket. A daemon that dies takes the file with it; reads and
// writes then fail until the volume is removed and exported again.
//
//	<dir>/<name>/volume      the file (a FUSE mount)
//	<dir>/<name>/qmp.sock    control socket
//	<dir>/<name>/pid         of the daemon, once the volume is exported
//
// The CSI node service calls it; it knows neither pods nor the engine. What can go wrong: no FUSE or no
// qemu-storage-daemon or driver for Ceph on this host (ErrMissing), a layer that cannot be opened or is locked by somebody else.
package export

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Defaults of Config.
const (
	// DefaultBinary is where Debian has the storage daemon.
	DefaultBinary = "/usr/bin/qemu-storage-daemon"
	// DefaultUID is nobody's user id but the storage daemons'.
	DefaultUID = 789_999
)

const (
	defaultPatience = 30 * time.Second
	endTimeout      = 10 * time.Second
	poll            = 5 * time.Millisecond
)

// ErrMissing is wrapped when the host lacks something.
var ErrMissing = errors.New("not available on this host")

// Config of a Set.
type Config struct {
	Dir    string // for what is above
	Binary string // of the storage daemon
	UID    uint32 // and group of the daemons
	// Patience bounds the start of a daemon and each change of it; 30 s if 0.
	Patience time.Duration
}

// Set is the exported volumes of this host.
type Set struct {
	cfg Config

	mu    sync.Mutex // guards the field below
	locks map[string]*lock
}

// lock is held over each change of one volume: a daemon that does not answer holds up nobody else.
type lock struct {
	held  chan struct{} // has room for one
	users int           // that hold it or wait
}

// lock keeps others from a volume until the function it returns is called.
func (s *Set) lock(ctx context.Context, name string) (unlock func(), err error) {
	s.mu.Lock()
	l := s.locks[name]
	if l == nil {
		l = &lock{held: make(chan struct{}, 1)}
		s.locks[name] = l
	}
	l.users++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(s.locks, name)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("waiting for another change of the volume: %w", ctx.Err())
	}
}

// New makes the set, which may have volumes from before.
func New(cfg Config) *Set {
	if cfg.Binary == "" {
		cfg.Binary = DefaultBinary
	}
	if cfg.UID == 0 {
		cfg.UID = DefaultUID
	}
	if cfg.Patience == 0 {
		cfg.Patience = defaultPatience
	}
	return &Set{cfg: cfg, locks: map[string]*lock{}}
}

func (s *Set) dir(name string) string    { return filepath.Join(s.cfg.Dir, name) }
func (s *Set) file(name string) string   { return filepath.Join(s.cfg.Dir, name, "volume") }
func (s *Set) socket(name string) string { return filepath.Join(s.cfg.Dir, name, "qmp.sock") }
func (s *Set) pid(name string) string    { return filepath.Join(s.cfg.Dir, name, "pid") }

// File is the path of a volume that is exported, or was.
func (s *Set) File(name string) string { return s.file(name) }

// Exported tells whether a volume is a file, so that Export has nothing to do.
func (s *Set) Exported(name string) bool {
	_, ok := s.exported(name)
	return ok && s.isMounted(name)
}

// Export makes a volume a file and returns its path. One that is exported already stays as it is. name must be
// fit for a file name.
func (s *Set) Export(ctx context.Context, name string, o attach.Opened) (string, error) {
	unlock, err := s.lock(ctx, name)
	if err != nil {
		return "", fmt.Errorf("exporting volume: %w", err)
	}
	defer unlock()
	if s.Exported(name) {
		return s.file(name), nil
	}
	if err := s.remove(name); err != nil { // what is left of a daemon that has died
		return "", fmt.Errorf("exporting volume: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Patience)
	defer cancel()
	for i := 1; ; i++ {
		err := s.export(ctx, name, o)
		if err == nil {
			return s.file(name), nil
		}
		err = errors.Join(err, s.remove(name))
		if i == attempts || !errors.Is(err, errUnclear) {
			return "", fmt.Errorf("exporting volume: %w", err)
		}
	}
}

func (s *Set) export(ctx context.Context, name string, o attach.Opened) error {
	dirs, err := directories(o.Disk)
	if err != nil {
		return err
	}
	pid, err := s.start(name, dirs, o.Ceph)
	if err != nil {
		return err
	}
	c, err := s.dial(ctx, name)
	if err != nil {
		return unclear(err)
	}
	defer c.Close()
	if err := show(ctx, c, o); err != nil {
		return unclear(err)
	}
	return os.WriteFile(s.pid(name), []byte(strconv.Itoa(pid)), 0o600)
}

// directories are those with the layers of a disk, which are all fit to be opened. In Ceph there are none.
func directories(d handover.Disk) ([]string, error) {
	var dirs []string
	if len(d.Layers) == 0 {
		return nil, errors.New("the volume has no layers")
	}
	for i, l := range d.Layers {
		if l.RBD != nil {
			continue
		}
		if err := check(l, i == 0); err != nil {
			return nil, err
		}
		dirs = append(dirs, filepath.Dir(l.File))
	}
	return dirs, nil
}

// show has a daemon open a volume and export it.
func show(ctx context.Context, c *qmp.Client, o attach.Opened) error {
	backing := ""
	if err := giveKey(ctx, c, o.Ceph); err != nil {
		return err
	}
	for i, l := range o.Disk.Layers {
		writable := i == len(o.Disk.Layers)-1 && !o.Disk.ReadOnly
		if err := addLayer(ctx, c, l, o.Keys, backing, writable); err != nil {
			return err
		}
		backing = node(l)
	}
	top := o.Disk.Layers[len(o.Disk.Layers)-1]
	if !o.Disk.ReadOnly {
		// It may have been decided to grow the volume while nobody had it open.
		if err := grow(ctx, c, node(top), o.Disk.Size); err != nil {
			return err
		}
	}
	return c.Run(
		ctx,
		qmp.Command{Name: "object-add", Args: map[string]any{"qom-type": "throttle-group", "id": throttleGroup, "limits": limits(o.Limits)}},
		qmp.Command{Name: "blockdev-add", Args: map[string]any{
			"driver": "throttle", "node-name": throttleNode, "throttle-group": throttleGroup, "file": node(top), "read-only": o.Disk.ReadOnly,
		}},
		qmp.Command{Name: "block-export-add", Args: map[string]any{
			"type": "fuse", "id": "volume", "node-name": throttleNode, "mountpoint": fmt.Sprintf("/dev/fd/%d", fdFUSE),
			"writable": !o.Disk.ReadOnly, "growable": false, "allow-other": "on",
		}},
	)
}

const (
	throttleNode  = "throttle"
	throttleGroup = "limits"
)

// check refuses a layer that would make the daemon open something else. The engine has looked at one in Ceph.
func check(l handover.Layer, lowest bool) error {
	if l.RBD != nil {
		return nil
	}
	if l.Format == handover.FormatRaw && lowest {
		return nil
	}
	if l.Format != handover.FormatQCOW2 {
		return fmt.Errorf("layer %s has the format %q", l.ID, l.Format)
	}
	f, err := os.OpenFile(l.File, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("opening layer: %w", err)
	}
	defer f.Close()
	h, err := qcow2.Read(f)
	if err == nil && h.Corrupt {
		err = qcow2.ErrFormat
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.ID, err)
	}
	return nil
}

// node is the name of a layer's node.
func node(l handover.Layer) string { return "l-" + l.ID }

func addLayer(ctx context.Context, c *qmp.Client, l handover.Layer, keys map[string][]byte, backing string, writable bool) error {
	file := node(l) + "-f"
	fileArgs, err := protocol(ctx, c, l)
	if err != nil {
		return err
	}
	fileArgs["node-name"], fileArgs["read-only"] = file, !writable
	args := map[string]any{"driver": l.Format, "node-name": node(l), "file": file, "read-only": !writable}
	if writable {
		fileArgs["discard"], args["discard"] = "unmap", "unmap"
	}
	if l.Format == handover.FormatQCOW2 {
		args["backing"] = nil // whatever the file says
		if backing != "" {
			args["backing"] = backing
		}
	}
	var commands []qmp.Command
	if l.Key != "" {
		key, ok := keys[l.Key]
		if !ok {
			return fmt.Errorf("layer %s is encrypted and its key is missing", l.ID)
		}
		secret := node(l) + "-k"
		commands = append(commands, qmp.Command{Name: "object-add", Args: map[string]any{
			"qom-type": "secret", "id": secret, "format": "base64", "data": base64.StdEncoding.EncodeToString(key),
		}})
		if l.Format == handover.FormatRaw {
			args["driver"], args["key-secret"] = "luks", secret
		} else {
			args["encrypt"] = map[string]any{"format": "luks", "key-secret": secret}
		}
	}
	commands = append(commands, qmp.Command{Name: "blockdev-add", Args: fileArgs}, qmp.Command{Name: "blockdev-add", Args: args})
	if err := noDriver(c.Run(ctx, commands...)); err != nil {
		return fmt.Errorf("opening layer %s: %w", l.ID, err)
	}
	return nil
}

// grow makes a node that large. One that is larger stays: the size at hand is an old one then, for example after
// a crash while the volume grew.
func grow(ctx context.Context, c *qmp.Client, name string, bytes int64) error {
	all, err := nodes(ctx, c)
	if err != nil {
		return err
	}
	for _, n := range all {
		if n.Name == name && n.Image.Size >= bytes {
			return nil
		}
	}
	return c.Execute(ctx, "block_resize", map[string]any{"node-name": name, "size": bytes}, nil)
}

// blockNode is what a daemon says about a node.
type blockNode struct {
	Name  string `json:"node-name"`
	Depth int    `json:"backing_file_depth"`
	Image struct {
		Size int64 `json:"virtual-size"`
	} `json:"image"`
}

func nodes(ctx context.Context, c *qmp.Client) ([]blockNode, error) {
	var out []blockNode
	err := c.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &out)
	return out, err
}

func limits(l attach.Limits) map[string]any {
	return map[string]any{
		"iops-total": l.IOPS, "iops-read": l.ReadIOPS, "iops-write": l.WriteIOPS,
		"bps-total": l.Bytes, "bps-read": l.ReadBytes, "bps-write": l.WriteBytes,
	}
}

// dial connects to a daemon, which may just be starting.
func (s *Set) dial(ctx context.Context, name string) (*qmp.Client, error) {
	for {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.socket(name), Net: "unix"})
		if err == nil {
			c := qmp.New(conn, nil)
			if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
				return nil, errors.Join(fmt.Errorf("reaching the storage daemon: %w", err), c.Close())
			}
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("reaching the storage daemon: %w", err)
		case <-time.After(poll):
		}
	}
}

// top finds the layer that is written to: the one with the most layers below it.
func top(ctx context.Context, c *qmp.Client) (string, error) {
	all, err := nodes(ctx, c)
	if err != nil {
		return "", err
	}
	name, depth := "", -1
	for _, n := range all {
		if strings.HasPrefix(n.Name, "l-") && !strings.HasSuffix(n.Name, "-f") && n.Depth > depth {
			name, depth = n.Name, n.Depth
		}
	}
	if name == "" {
		return "", errors.New("the storage daemon shows no volume")
	}
	return name, nil
}

// ErrNotExported is returned by changes of a volume that is not exported.
var ErrNotExported = errors.New("volume is not exported")

// change runs f with a connection to the daemon of a volume.
func (s *Set) change(ctx context.Context, name string, f func(context.Context, *qmp.Client) error) error {
	unlock, err := s.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if _, ok := s.exported(name); !ok {
		return ErrNotExported
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Patience)
	defer cancel()
	c, err := s.dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(ctx, c)
}

// Snapshot puts an empty layer on top of an exported volume, unless it is there already. Like the other
// changes it returns ErrNotExported for a volume that is not.
func (s *Set) Snapshot(ctx context.Context, name string, overlay handover.Layer, key []byte) error {
	if err := check(overlay, false); err != nil {
		return err
	}
	return s.change(ctx, name, func(ctx context.Context, c *qmp.Client) error {
		now, err := top(ctx, c)
		if err != nil || now == node(overlay) {
			return err
		}
		err = addLayer(ctx, c, overlay, map[string][]byte{overlay.Key: key}, "", true)
		if err == nil {
			err = c.Execute(ctx, "blockdev-snapshot", map[string]any{"node": now, "overlay": node(overlay)}, nil)
		}
		if err != nil {
			// Whatever of it there is would be in the way the next time.
			_ = c.Run(
				ctx,
				qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": node(overlay)}},
				qmp.Command{Name: "blockdev-del", Args: map[string]any{"node-name": node(overlay) + "-f"}},
				qmp.Command{Name: "object-del", Args: map[string]any{"id": node(overlay) + "-k"}},
			)
			return fmt.Errorf("taking a snapshot: %w", err)
		}
		return nil
	})
}

// Resize makes an exported volume at least that large.
func (s *Set) Resize(ctx context.Context, name string, bytes int64) error {
	return s.change(ctx, name, func(ctx context.Context, c *qmp.Client) error {
		// Through the throttle, which would not notice otherwise.
		return grow(ctx, c, throttleNode, bytes)
	})
}

// Limit changes what an exported volume may do per second.
func (s *Set) Limit(ctx context.Context, name string, l attach.Limits) error {
	return s.change(ctx, name, func(ctx context.Context, c *qmp.Client) error {
		return c.Execute(ctx, "qom-set", map[string]any{"path": "/objects/" + throttleGroup, "property": "limits", "value": limits(l)}, nil)
	})
}

// Remove ends the daemon of a volume, which nobody must use any more: everything that was written is in its
// files then. A volume that is not exported is fine.
func (s *Set) Remove(ctx context.Context, name string) error {
	unlock, err := s.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("removing exported volume: %w", err)
	}
	defer unlock()
	if err := s.remove(name); err != nil {
		return fmt.Errorf("removing exported volume: %w", err)
	}
	return nil
}

func (s *Set) remove(name string) error {
	// Before the daemon ends, so that nobody finds a file that cannot be read.
	err := unix.Unmount(s.file(name), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmounting %s: %w", s.file(name), err)
	}
	if err := s.end(name); err != nil {
		return err
	}
	if err := os.RemoveAll(s.dir(name)); err != nil {
		return err
	}
	return nil
}

// end has the daemon close the volume.
func (s *Set) end(name string) error {
	pid, running := s.running(name)
	if !running {
		pid, _ = s.noted(name)
	}
	p, err := process.Read(pid)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH):
		return nil
	case err == nil && running:
		err = process.End(context.Background(), endTimeout, p)
	case err == nil && len(p.Args) == 0: // one that ends has lost its name before it has let go of its files
		ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
		defer cancel()
		_ = p.Wait(ctx) // if it is one
	}
	if err != nil {
		return fmt.Errorf("ending storage daemon: %w", err)
	}
	return nil
}
