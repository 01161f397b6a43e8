package rbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

const (
	// newSuffix marks an image that is being made.
	newSuffix = ".new"
	// headSize is what is read of an image: its header and the LUKS header behind it.
	headSize = 48 * qcow2.ClusterSize
	// fillTime bounds writing all of an image.
	fillTime = lockTime
)

// imageStore is images in a pool.
type imageStore struct {
	place *place
	qemu  *qemuimg.Tool

	// mu guards use, what images take, as it was at useAt: asking takes as long for one as for all.
	mu    sync.Mutex
	use   map[string]int64
	useAt time.Time
}

// names lists all images.
func (s *imageStore) names() ([]string, error) {
	out, err := s.place.run(nil, "rbd", "ls", "--format", "json")
	if err != nil {
		return nil, err
	}
	var names []string
	if err := json.Unmarshal(out, &names); err != nil {
		return nil, chain.Unavailable(err)
	}
	return names, nil
}

// size is the length of an image. fs.ErrNotExist.
func (s *imageStore) size(name string) (int64, error) {
	out, err := s.place.run(nil, "rbd", "info", "--format", "json", s.place.spec(name))
	if err != nil {
		return 0, err
	}
	var info struct {
		Size int64 `json:"size"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return 0, chain.Unavailable(err)
	}
	return info.Size, nil
}

// Make makes an image under another name first. Whether one is there already is found out at the end, which
// is cheaper in the usual case, or before what takes long.
func (s *imageStore) Make(ctx context.Context, i chain.Image) error {
	final := chain.ImageName(i.Layer)
	half := final + newSuffix
	if i.Provisioning != datastore.Thin {
		if _, err := s.size(final); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	err := s.makeHalf(ctx, half, i)
	if errors.Is(err, fs.ErrExist) { // of an interrupted call
		if err := s.rm(half); err != nil {
			return err
		}
		err = s.makeHalf(ctx, half, i)
	}
	if err == nil {
		_, err = s.place.run(nil, "rbd", "rename", s.place.spec(half), s.place.spec(final))
	}
	if err == nil {
		return nil
	}
	rm := s.rm(half)
	if errors.Is(err, fs.ErrExist) {
		return rm
	}
	return errors.Join(err, rm)
}

// makeHalf makes an image.
func (s *imageStore) makeHalf(ctx context.Context, half string, i chain.Image) error {
	if i.Format == handover.FormatRaw {
		args := []string{"create", "--no-progress", "--size", strconv.FormatInt(i.Size>>20, 10), s.place.spec(half)}
		if i.Provisioning == datastore.Thin {
			_, err := s.place.run(nil, "rbd", args...)
			return err
		}
		_, err := s.place.runFor(fillTime, nil, "rbd", append(args, "--thick-provision")...)
		if err == nil && i.Progress != nil {
			i.Progress(i.Size, i.Size)
		}
		return err
	}
	if err := s.makeQCOW2(half, i); err != nil || i.Provisioning == datastore.Thin || i.Below != nil {
		return err
	}
	node := s.Locate(i.Layer)
	node.RBD.Image = half
	secrets := qemuimg.Secrets{}
	if i.Key != "" {
		secrets[i.Key] = i.Passphrase
	}
	return chain.FromTool(s.qemu.Fill(ctx, node, secrets, i.Progress))
}

// makeQCOW2 makes an empty qcow2 image. It does not name the layer below: QEMU does not open an image in Ceph
// that names one by a relative name, not even if it is told another one.
func (s *imageStore) makeQCOW2(name string, i chain.Image) error {
	empty := qcow2.Image{Size: i.Size, LUKS: i.LUKS}
	f, err := os.CreateTemp("", "atoll-rbd-")
	if err != nil {
		return fmt.Errorf("making a temporary file: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := empty.Write(f); err != nil {
		return err
	}
	if _, err = s.place.run(nil, "rbd", "import", "--no-progress", f.Name(), s.place.spec(name)); err != nil {
		return err
	}
	return s.makeRoom(name, i.Size)
}

// makeRoom makes an image long enough for all that qcow2 may put into it, which costs nothing. QEMU would make
// it longer by and by, each time with a change of Ceph's metadata.
func (s *imageStore) makeRoom(name string, size int64) error {
	const mib, fixed = 1 << 20, 16 << 20 // LUKS and other headers
	_, err := s.place.run(nil, "rbd", "resize", "--no-progress", "--size", strconv.FormatInt((size+size/4096+fixed)/mib, 10), s.place.spec(name))
	return err
}

// rm removes an image if it is there. Ceph would keep one that a process has open, also one that was killed a
// moment ago.
func (s *imageStore) rm(name string) error {
	if err := s.place.fence(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if _, err := s.place.run(nil, "rbd", "rm", "--no-progress", s.place.spec(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Remove removes images.
func (s *imageStore) Remove(layers []chain.Layer) error {
	if len(layers) == 0 {
		return nil
	}
	names, err := s.names()
	if err != nil {
		return err
	}
	doomed := map[string]bool{}
	for _, l := range layers {
		doomed[chain.ImageName(l)], doomed[chain.ImageName(l)+newSuffix] = true, true
	}
	for _, name := range names {
		if doomed[name] {
			if err := s.rm(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// file is an image that is looked at. Its start is read when it is asked for.
type file struct {
	images *imageStore
	name   string
	length int64
	head   []byte
}

// Open opens an image.
func (s *imageStore) Open(l chain.Layer, _ bool) (chain.File, error) {
	name := chain.ImageName(l)
	length, err := s.size(name)
	if err != nil {
		return nil, err
	}
	return &file{images: s, name: name, length: length}, nil
}

func (f *file) Size() (int64, error) { return f.length, nil }
func (f *file) Sync() error          { return nil } // writing flushes
func (f *file) Close() error         { return nil }

// node is the image as raw bytes, for QEMU's tools.
func (f *file) node() (string, error) {
	return qemuimg.Name(qemuimg.Node([]handover.Layer{{Format: handover.FormatRaw, RBD: f.images.place.located(f.name)}}))
}

// tool runs one of QEMU's tools on raw bytes.
func (f *file) tool(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), f.images.place.Timeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil || name == "qemu-io" && !bytes.Contains(out, []byte("wrote ")) {
		return fmt.Errorf("%w: %s: %w: %.300s", datastore.ErrUnavailable, name, err, out)
	}
	return nil
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if f.head == nil {
		dir, err := os.MkdirTemp("", "atoll-rbd-")
		if err != nil {
			return 0, fmt.Errorf("making a temporary directory: %w", err)
		}
		defer os.RemoveAll(dir)
		node, err := f.node()
		if err != nil {
			return 0, err
		}
		file := dir + "/head"
		if err := f.tool("qemu-img", "dd", "-U", "-O", "raw", "bs="+strconv.Itoa(qcow2.ClusterSize), "count="+strconv.Itoa(headSize/qcow2.ClusterSize), "if="+node, "of="+file); err != nil {
			return 0, err
		}
		if f.head, err = os.ReadFile(file); err != nil {
			return 0, fmt.Errorf("reading the start of an image: %w", err)
		}
	}
	if off >= int64(len(f.head)) {
		return 0, io.EOF
	}
	n := copy(p, f.head[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	t, err := os.CreateTemp("", "atoll-rbd-")
	if err != nil {
		return 0, fmt.Errorf("making a temporary file: %w", err)
	}
	defer os.Remove(t.Name())
	defer t.Close()
	if _, err := t.Write(p); err != nil {
		return 0, fmt.Errorf("writing a temporary file: %w", err)
	}
	node, err := f.node()
	if err != nil {
		return 0, err
	}
	f.head = nil
	if err := f.tool("qemu-io", "-c", fmt.Sprintf("write -s %s %d %d", t.Name(), off, len(p)), "-c", "flush", node); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Grow makes an image larger.
func (s *imageStore) Grow(ctx context.Context, l chain.Layer, bytes int64, _ bool, unlock func() (qemuimg.Secrets, error)) error {
	f, err := s.Open(l, false)
	if err != nil {
		return err
	}
	if l.Format == handover.FormatRaw {
		if length, err := f.Size(); err != nil || length >= bytes {
			return err
		}
		_, err := s.place.run(nil, "rbd", "resize", "--no-progress", "--size", strconv.FormatInt(bytes>>20, 10), s.place.spec(chain.ImageName(l)))
		return err
	}
	h, err := qcow2.Read(f)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", datastore.ErrCorrupt, chain.ImageName(l), err)
	}
	if h.Size >= bytes {
		return nil
	}
	secrets, err := unlock()
	if err != nil {
		return err
	}
	if length, err := f.Size(); err != nil || length < bytes {
		if err := errors.Join(err, s.makeRoom(chain.ImageName(l), bytes)); err != nil {
			return err
		}
	}
	return chain.FromTool(s.qemu.Resize(ctx, s.Locate(l), secrets, bytes))
}

// Reserve does nothing: Ceph cannot reserve room.
func (s *imageStore) Reserve(chain.Layer, int64) error { return nil }

// Used is what an image takes, in whole objects of 4 MiB, as of a moment ago.
func (s *imageStore) Used(l chain.Layer) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.useAt) > time.Second {
		out, err := s.place.run(nil, "rbd", "du", "--format", "json")
		if err != nil {
			return 0, err
		}
		var du struct {
			Images []struct {
				Name string `json:"name"`
				Used int64  `json:"used_size"`
			} `json:"images"`
		}
		if err := json.Unmarshal(out, &du); err != nil {
			return 0, chain.Unavailable(err)
		}
		s.use, s.useAt = map[string]int64{}, time.Now()
		for _, i := range du.Images {
			s.use[i.Name] += i.Used
		}
	}
	used, ok := s.use[chain.ImageName(l)]
	if !ok {
		return 0, fs.ErrNotExist
	}
	return used, nil
}

// Locate says how to open an image.
func (s *imageStore) Locate(l chain.Layer) handover.Layer {
	return handover.Layer{ID: l.ID, RBD: s.place.located(chain.ImageName(l)), Format: l.Format, Size: l.Size, ReadOnly: true, Key: l.Key}
}

// Strays returns images that nobody knows.
func (s *imageStore) Strays(known map[string]chain.Layer) (map[string]int64, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	out := map[string]int64{}
	for _, name := range names {
		id := strings.TrimSuffix(strings.TrimSuffix(name, newSuffix), ".img")
		if l, ok := known[id]; !ok || strings.TrimSuffix(name, newSuffix) != chain.ImageName(l) {
			out["rbd:"+s.place.Pool+"/"+name] = 0
		}
	}
	return out, nil
}
