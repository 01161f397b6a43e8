//go:build integration

package directory

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// The crash test runs every operation in a process of its own that kills itself (SIGKILL) before its n-th
// change of the disk, for every n, and looks at what is left: with the operation repeated, and without.

const (
	envStore     = "ATOLL_CRASH_STORE"
	envOperation = "ATOLL_CRASH_OPERATION"
	envStep      = "ATOLL_CRASH_STEP"
)

// crash counts steps.
type crash struct{ left int }

func (c *crash) step() {
	if c.left--; c.left == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// crashPlace counts changes of a place.
type crashPlace struct {
	chain.Place
	crash *crash
}

func (p crashPlace) Write(k chain.Kind, id string, data []byte) error {
	p.crash.step()
	return p.Place.Write(k, id, data)
}

func (p crashPlace) Remove(k chain.Kind, id string) error {
	p.crash.step()
	return p.Place.Remove(k, id)
}

func (p crashPlace) Images() chain.Images { return crashImages{p.Place.Images(), p.crash} }

type crashImages struct {
	chain.Images
	crash *crash
}

func (i crashImages) Make(ctx context.Context, image chain.Image) error {
	i.crash.step()
	return i.Images.Make(ctx, image)
}

func (i crashImages) Remove(layers []chain.Layer) error {
	for n := range layers { // each file by itself
		i.crash.step()
		if err := i.Images.Remove(layers[n : n+1]); err != nil {
			return err
		}
	}
	return nil
}

func (i crashImages) Grow(ctx context.Context, l chain.Layer, bytes int64, thick bool, unlock func() (qemuimg.Secrets, error)) error {
	i.crash.step()
	return i.Images.Grow(ctx, l, bytes, thick, unlock)
}

func (i crashImages) Reserve(l chain.Layer, bytes int64) error {
	i.crash.step()
	return i.Images.Reserve(l, bytes)
}

func (i crashImages) Open(l chain.Layer, write bool) (chain.File, error) {
	f, err := i.Images.Open(l, write)
	if err != nil || !write {
		return f, err
	}
	return crashFile{f, i.crash}, nil
}

type crashFile struct {
	chain.File
	crash *crash
}

func (f crashFile) WriteAt(p []byte, off int64) (int, error) {
	f.crash.step()
	return f.File.WriteAt(p, off)
}

// crashStore opens a store that counts.
func crashStore(t testing.TB, path string, c *crash) *chain.Store {
	t.Helper()
	tool := &qemuimg.Tool{}
	place := &dir{path: path, layers: &layerDir{path: filepath.Join(path, layersDir), qemu: tool}}
	s, err := chain.New(crashPlace{place, c}, chain.Options{Keys: crashKeys(filepath.Dir(path)), Tool: tool})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// crashKeys has one key, a second one when there is a file "rotated", and only that when there is one "retired".
func crashKeys(dir string) datastore.Keys { return keys.Wrapper{Source: rotatedKeys(dir)} }

type rotatedKeys string

func (r rotatedKeys) source() keys.Static {
	all := [][]byte{[]byte(strings.Repeat("g", keys.Size)), []byte(strings.Repeat("n", keys.Size))}
	if _, err := os.Stat(filepath.Join(string(r), "rotated")); err != nil {
		all = all[:1]
	}
	if _, err := os.Stat(filepath.Join(string(r), "retired")); err == nil {
		all = all[1:]
	}
	return keys.Static{"gold": all}
}

func (r rotatedKeys) Class(ctx context.Context, class string) (provider, key string, err error) {
	return r.source().Class(ctx, class)
}

func (r rotatedKeys) Provider(ctx context.Context, name string) (string, map[string][]byte, error) {
	return r.source().Provider(ctx, name)
}

// fileLive is a QEMU whose open disk is noted in a file, and which goes on when the engine crashes.
type fileLive struct {
	path  string
	crash *crash
}

func (l fileLive) disk() (handover.Disk, error) {
	var d handover.Disk
	b, err := os.ReadFile(l.path)
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	return d, err
}

func (l fileLive) save(d handover.Disk) error {
	l.crash.step()
	b, err := json.Marshal(d)
	if err == nil {
		err = os.WriteFile(l.path, b, 0o600)
	}
	l.crash.step()
	return err
}

func (l fileLive) Snapshot(_ context.Context, overlay handover.Layer, _ *handover.WrappedKey) error {
	d, err := l.disk()
	if err != nil || d.Layers[len(d.Layers)-1].ID == overlay.ID {
		return err
	}
	d.Layers[len(d.Layers)-1].ReadOnly = true
	d.Layers = append(d.Layers, overlay)
	return l.save(d)
}

func (l fileLive) Resize(_ context.Context, bytes int64) error {
	d, err := l.disk()
	if err != nil {
		return err
	}
	name, err := qemuimg.Name(qemuimg.Node(d.Layers))
	if err != nil {
		return err
	}
	if out, err := exec.Command("qemu-img", "resize", name, strconv.FormatInt(bytes, 10)).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	d.Size = bytes
	return l.save(d)
}

// operation is one thing to crash in. After any crash everything that was there has its content, and after
// repeating it, or giving it up, nothing is left over.
type operation struct {
	name  string
	setup func(c *crashBench)
	run   func(ctx context.Context, s *chain.Store, l fileLive) error
	// holds is what volumes, and snapshots by "s:id", hold whatever happened; done what they hold after the
	// operation has ended well, and gone what does not exist then. The i-th character is the pattern of the
	// i-th 64 KiB.
	holds, done map[string]string
	gone        []string
	// running: a QEMU goes on with the volume after the crash, and writes.
	running bool
}

// crashBench is a store under test.
type crashBench struct {
	testing.TB
	path string
	s    *chain.Store
	live fileLive
}

func (c *crashBench) ok(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

func (c *crashBench) create(spec datastore.Spec) {
	c.Helper()
	if spec.Size == 0 && spec.Source == nil {
		spec.Size = datastore.SizeUnit
	}
	_, err := c.s.Create(c.Context(), spec)
	c.ok(err)
}

func (c *crashBench) snapshot(id string) {
	c.Helper()
	_, err := c.s.Snapshot(c.Context(), id, "v", nil)
	c.ok(err)
}

// attach opens a volume in the QEMU that is a file.
func (c *crashBench) attach(id string) {
	c.Helper()
	d, err := c.s.Attach(c.Context(), id, "live", datastore.ReadWrite)
	c.ok(err)
	c.ok(c.live.save(d))
}

// fill writes patterns.
func (c *crashBench) fill(id, patterns string) {
	c.Helper()
	d, err := c.s.Attach(c.Context(), id, "io", datastore.ReadWrite)
	c.ok(err)
	var commands []string
	for i, p := range patterns {
		if p != '-' {
			commands = append(commands, fmt.Sprintf("write -P %d %dk 64k", p, 64*i))
		}
	}
	c.ok(qemuIO(c, c.s, d, commands...))
	c.ok(c.s.Detach(c.Context(), id, "io"))
}

// holds wants patterns in a volume or, by a copy, a snapshot.
func (c *crashBench) holds(id, patterns string) {
	c.Helper()
	if snapshot, ok := strings.CutPrefix(id, "s:"); ok {
		s, err := c.s.SnapshotByID(c.Context(), snapshot)
		c.ok(err)
		c.create(datastore.Spec{ID: "copy-of-s", Encryption: s.Encryption, Source: &datastore.Source{Snapshot: snapshot}})
		c.holds("copy-of-s", patterns)
		c.ok(c.s.Delete(c.Context(), "copy-of-s"))
		return
	}
	d, err := c.s.Attach(c.Context(), id, "io", datastore.ReadOnly)
	c.ok(err)
	c.ok(qemuIO(c, c.s, d, reads(patterns)...))
	c.ok(c.s.Detach(c.Context(), id, "io"))
}

func reads(patterns string) []string {
	var commands []string
	for i, p := range patterns {
		switch p {
		case '-':
			continue
		case '0':
			p = 0
		}
		commands = append(commands, fmt.Sprintf("read -P %d %dk 64k", p, 64*i))
	}
	return commands
}

// qemuIO runs commands on a disk.
func qemuIO(t testing.TB, s *chain.Store, d handover.Disk, commands ...string) error {
	passphrases, err := s.Unlock(t.Context(), d)
	if err != nil {
		return err
	}
	name, err := qemuimg.Name(qemuimg.Node(d.Layers))
	if err != nil {
		return err
	}
	var args []string
	if d.ReadOnly {
		args = append(args, "-r")
	}
	for key, p := range passphrases {
		file := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(file, p, 0o600); err != nil {
			return err
		}
		args = append(args, "--object", "secret,id="+qemuimg.SecretID(key)+",file="+file)
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("qemu-io", append(args, name)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "verification failed") || strings.Contains(string(out), "rror") {
		return fmt.Errorf("qemu-io on %s: %w\n%s", d.Volume, err, out)
	}
	return nil
}

// sound wants no problem but unfinished operations.
func (c *crashBench) sound(unfinished bool) {
	c.Helper()
	report, err := c.s.Check(c.Context(), nil)
	c.ok(err)
	for _, p := range report.Problems {
		if p.Kind != datastore.ProblemUnchecked && (!unfinished || p.Kind != datastore.ProblemUnfinished) {
			c.Errorf("%+v", p)
		}
	}
}

// empty removes everything and looks for files that are left.
func (c *crashBench) empty() {
	c.Helper()
	all, err := c.s.List(c.Context())
	c.ok(err)
	for _, v := range all.Volumes {
		for _, a := range v.Attachments {
			c.ok(c.s.Detach(c.Context(), v.ID, a.Holder))
		}
		c.ok(c.s.Delete(c.Context(), v.ID))
	}
	for _, s := range all.Snapshots {
		c.ok(c.s.DeleteSnapshot(c.Context(), s.ID))
	}
	for _, name := range []string{string(chain.Volumes), string(chain.Snapshots), layersDir} {
		left, err := os.ReadDir(filepath.Join(c.path, name))
		c.ok(err)
		for _, e := range left {
			if !halfRecord(e.Name()) {
				c.Errorf("left over: %s/%s", name, e.Name())
			}
		}
	}
}
