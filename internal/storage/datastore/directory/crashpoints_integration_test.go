//go:build integration

package directory

import (
	"context"
	"errors"
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
	"atoll.dev/atoll/internal/storage/qemuimg"
	"atoll.dev/atoll/internal/storage/rotation"
	"atoll.dev/atoll/internal/storage/stores"
)

// operations are all operations that change something.
func operations() []operation {
	create := func(spec datastore.Spec) func(context.Context, *chain.Store, fileLive) error {
		return func(ctx context.Context, s *chain.Store, l fileLive) error {
			if spec.Source != nil && spec.Source.Live != nil {
				spec.Source.Live = l
			}
			_, err := s.Create(ctx, spec)
			return err
		}
	}
	filled := func(spec datastore.Spec) func(*crashBench) {
		return func(c *crashBench) { c.create(spec); c.fill(spec.ID, "ab") }
	}
	v := datastore.Spec{ID: "v"}
	secret := datastore.Spec{ID: "v", Encryption: "gold"}
	chained := func(spec datastore.Spec) func(*crashBench) {
		return func(c *crashBench) {
			c.create(spec)
			for n, patterns := range []string{"a", "-b", "--c"} {
				c.fill("v", patterns)
				c.snapshot(fmt.Sprintf("s%d", n))
			}
			c.fill("v", "---d")
		}
	}
	return []operation{
		{name: "create", setup: func(*crashBench) {}, run: create(datastore.Spec{ID: "v", Size: datastore.SizeUnit, Encryption: "gold"}), done: map[string]string{"v": "00"}},
		{
			name: "copy a volume", setup: filled(secret), holds: map[string]string{"v": "ab"}, done: map[string]string{"w": "ab"},
			run: create(datastore.Spec{ID: "w", Encryption: "gold", Source: &datastore.Source{Volume: "v"}}),
		},
		{
			name: "copy an open volume", running: true, holds: map[string]string{"v": "ab-z"}, done: map[string]string{"w": "ab"},
			setup: func(c *crashBench) { filled(v)(c); c.attach("v") },
			run:   create(datastore.Spec{ID: "w", Source: &datastore.Source{Volume: "v", Live: fileLive{}}}),
		},
		{
			name: "restore", setup: func(c *crashBench) { filled(v)(c); c.snapshot("s"); c.fill("v", "c") },
			holds: map[string]string{"v": "cb", "s:s": "ab"}, done: map[string]string{"w": "ab"},
			run: create(datastore.Spec{ID: "w", Source: &datastore.Source{Snapshot: "s"}}),
		},
		{
			name: "snapshot", setup: filled(secret), holds: map[string]string{"v": "ab"}, done: map[string]string{"s:s": "ab"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error {
				_, err := s.Snapshot(ctx, "s", "v", nil)
				return err
			},
		},
		{
			name: "snapshot of an open volume", running: true, holds: map[string]string{"v": "ab-z"}, done: map[string]string{"s:s": "ab"},
			setup: func(c *crashBench) { filled(v)(c); c.attach("v") },
			run: func(ctx context.Context, s *chain.Store, l fileLive) error {
				_, err := s.Snapshot(ctx, "s", "v", l)
				return err
			},
		},
		{
			name: "delete a volume", gone: []string{"v"}, holds: map[string]string{"w": "ab", "s:s": "ab"},
			setup: func(c *crashBench) {
				filled(v)(c)
				c.snapshot("s")
				c.create(datastore.Spec{ID: "w", Source: &datastore.Source{Volume: "v"}})
				c.fill("v", "c")
			},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error { return s.Delete(ctx, "v") },
		},
		{
			name: "delete a snapshot", gone: []string{"s:s1"}, setup: chained(v), holds: map[string]string{"v": "abcd", "s:s0": "a0", "s:s2": "abc0"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error { return s.DeleteSnapshot(ctx, "s1") },
		},
		{
			name: "delete the last copy", gone: []string{"s:s"},
			setup: func(c *crashBench) { filled(v)(c); c.snapshot("s"); c.ok(c.s.Delete(c.Context(), "v")) },
			run:   func(ctx context.Context, s *chain.Store, _ fileLive) error { return s.DeleteSnapshot(ctx, "s") },
		},
		{
			name: "grow", setup: filled(secret), holds: map[string]string{"v": "ab"}, done: map[string]string{"v": "ab00000000000000" + "00"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error {
				_, err := s.Expand(ctx, "v", 2*datastore.SizeUnit, nil)
				return err
			},
		},
		{
			name: "grow an open volume", running: true, holds: map[string]string{"v": "ab-z"}, done: map[string]string{"v": "ab-z000000000000" + "00"},
			setup: func(c *crashBench) { filled(v)(c); c.attach("v") },
			run: func(ctx context.Context, s *chain.Store, l fileLive) error {
				_, err := s.Expand(ctx, "v", 2*datastore.SizeUnit, l)
				return err
			},
		},
		{
			name: "attach and detach", setup: filled(v), holds: map[string]string{"v": "ab"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error {
				if _, err := s.Attach(ctx, "v", "h", datastore.ReadWrite); err != nil {
					return err
				}
				return s.Detach(ctx, "v", "h")
			},
		},
		{
			name: "merge", holds: map[string]string{"v": "abcd", "w": "ab0e"},
			setup: func(c *crashBench) {
				chained(secret)(c)
				c.create(datastore.Spec{ID: "w", Encryption: "gold", Source: &datastore.Source{Snapshot: "s1"}})
				c.fill("w", "---e")
				for n := range 3 {
					c.ok(c.s.DeleteSnapshot(c.Context(), fmt.Sprintf("s%d", n)))
				}
			},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error { return s.Tidy(ctx) },
		},
		{
			name: "change the key", setup: chained(secret), holds: map[string]string{"v": "abcd", "s:s0": "a0", "s:s2": "abc0"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error {
				_, err := s.Rekey(ctx, "v")
				return err
			},
		},
		{
			name: "change the wrapping", setup: chained(secret), holds: map[string]string{"v": "abcd"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error {
				return s.Rewrap(ctx, datastore.Source{Volume: "v"}, "gold")
			},
		},
		{
			name: "roll back", setup: chained(secret), holds: map[string]string{"s:s0": "a0", "s:s2": "abc0"}, done: map[string]string{"v": "a0"},
			run: func(ctx context.Context, s *chain.Store, _ fileLive) error {
				_, err := s.Rollback(ctx, "v", "s0")
				return err
			},
		},
		{
			name: "create and fill", setup: func(*crashBench) {}, done: map[string]string{"v": "ab"},
			run: create(datastore.Spec{ID: "v", Size: datastore.SizeUnit, Encryption: "gold", Fill: fillTest}),
		},
		{
			name: "rotate the key-encryption key", holds: map[string]string{"v": "abcd", "w": "ab", "s:s0": "a0", "s:s2": "abc0"},
			setup: func(c *crashBench) {
				chained(secret)(c)
				c.create(datastore.Spec{ID: "w", Encryption: "gold", Source: &datastore.Source{Snapshot: "s1"}})
				c.ok(os.WriteFile(filepath.Join(filepath.Dir(c.path), "rotated"), nil, 0o600))
			},
			run: rotate,
		},
	}
}

// fillTest writes what a new volume holds.
func fillTest(_ context.Context, to datastore.Target) error {
	dir, err := os.MkdirTemp("", "fill")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	name, err := qemuimg.Name(qemuimg.Node([]handover.Layer{to.Layer}))
	if err != nil {
		return err
	}
	var args []string
	for key, secret := range to.Secrets {
		file := filepath.Join(dir, "key")
		if err := os.WriteFile(file, secret, 0o600); err != nil {
			return err
		}
		args = append(args, "--object", "secret,id="+qemuimg.SecretID(key)+",file="+file)
	}
	out, err := exec.Command("qemu-io", append(args, "-c", "write -P 97 0 64k", "-c", "write -P 98 64k 64k", name)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// rotate wraps everything with the new key, and takes the old one away when that is done.
func rotate(ctx context.Context, s *chain.Store, l fileLive) error {
	dir := filepath.Dir(l.path)
	items, err := rotation.Items(ctx, []stores.Store{{Name: "store", Backend: s}})
	if err != nil {
		return err
	}
	switch r := rotation.Rewrap(ctx, crashKeys(dir), items, "gold", nil); {
	case r.Err != nil || r.KeyErr != nil || r.Total != 5 || r.Current != r.Total:
		return fmt.Errorf("after rotation: %+v", r)
	}
	return os.WriteFile(filepath.Join(dir, "retired"), nil, 0o600)
}

// TestCrashChild is the process that crashes. It does nothing in a normal run of the tests.
func TestCrashChild(t *testing.T) {
	path := os.Getenv(envStore)
	if path == "" {
		return
	}
	step, err := strconv.Atoi(os.Getenv(envStep))
	if err != nil {
		t.Fatal(err)
	}
	c := &crash{left: step}
	for _, o := range operations() {
		if o.name == os.Getenv(envOperation) {
			if err := o.run(t.Context(), crashStore(t, path, c), fileLive{livePath(path), c}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// livePath is where the open disk of a store is noted.
func livePath(store string) string { return filepath.Join(filepath.Dir(store), "live.json") }

// at returns the bench of a store.
func at(t testing.TB, path string) *crashBench {
	never := &crash{}
	return &crashBench{TB: t, path: path, s: crashStore(t, path, never), live: fileLive{livePath(path), never}}
}

// replace makes a directory a copy of another one.
func replace(t *testing.T, to, from string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestCrashAtEveryStep(t *testing.T) {
	points := 0
	for _, o := range operations() {
		t.Run(o.name, func(t *testing.T) {
			base := t.TempDir()
			before, crashed, now := filepath.Join(base, "before"), filepath.Join(base, "crashed"), filepath.Join(base, "now")
			store := filepath.Join(now, "store") // always this path, which an open disk knows
			if err := os.Mkdir(now, 0o700); err != nil {
				t.Fatal(err)
			}
			c := at(t, store)
			if _, err := c.s.Init(t.Context()); err != nil {
				t.Fatal(err)
			}
			o.setup(c)
			replace(t, before, now)
			for step := 1; ; step++ {
				replace(t, now, before)
				ended := crashIn(t, o.name, store, step)
				replace(t, crashed, now)
				afterCrash(t, o, store, true, ended)
				replace(t, now, crashed)
				afterCrash(t, o, store, false, ended)
				if t.Failed() {
					t.Fatalf("at step %d", step)
				}
				if ended {
					points += step - 1
					break
				}
			}
		})
	}
	t.Logf("%d crash points", points)
	if points < 60 && !t.Failed() {
		t.Errorf("only %d crash points; are steps still counted?", points)
	}
}

// crashIn runs an operation in a process that ends at a step, and tells whether it came to its end before.
func crashIn(t *testing.T, name, store string, step int) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrashChild$")
	cmd.Env = append(os.Environ(), envStore+"="+store, envOperation+"="+name, fmt.Sprintf("%s=%d", envStep, step))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL) {
		t.Fatalf("step %d: %v\n%s", step, err, out)
	}
	return err == nil
}

// TestCopyAfterCrash: QEMU goes on with the layer that a snapshot cut off has added, and what it writes there is in
// copies and snapshots that are made later.
func TestCopyAfterCrash(t *testing.T) {
	for step, ended := 1, false; !ended; step++ {
		t.Run(strconv.Itoa(step), func(t *testing.T) {
			for _, o := range operations() {
				if o.name != "snapshot of an open volume" {
					continue
				}
				c := at(t, filepath.Join(t.TempDir(), "store"))
				_, err := c.s.Init(t.Context())
				c.ok(err)
				o.setup(c)
				ended = crashIn(t, o.name, c.path, step)
				d, err := c.live.disk()
				c.ok(err)
				c.ok(qemuIO(t, c.s, d, "write -P 122 192k 64k")) // 'z'
				c.ok(c.s.Detach(t.Context(), "v", "live"))
				c.create(datastore.Spec{ID: "w", Source: &datastore.Source{Volume: "v"}})
				c.snapshot("later")
				for _, id := range []string{"v", "w", "s:later"} {
					c.holds(id, "ab-z")
				}
				return
			}
			t.Fatal("there is no such operation")
		})
		if t.Failed() {
			return
		}
	}
}

// afterCrash looks at what a crash left.
func afterCrash(t *testing.T, o operation, store string, repeat, ended bool) {
	t.Helper()
	c := at(t, store)
	c.sound(true)
	if o.running {
		d, err := c.live.disk()
		c.ok(err)
		c.ok(qemuIO(t, c.s, d, append(reads("ab"), "write -P 122 192k 64k")...)) // 'z'
	}
	if repeat {
		if err := o.run(t.Context(), c.s, c.live); err != nil {
			t.Errorf("repeating: %v", err)
			return
		}
	}
	if o.running {
		c.ok(c.s.Detach(t.Context(), "v", "live"))
	}
	if !repeat {
		all, err := c.s.List(t.Context())
		c.ok(err)
		for _, v := range all.Volumes {
			c.ok(c.s.Detach(t.Context(), v.ID, "h"))
		}
	}
	c.ok(c.s.Tidy(t.Context()))
	c.sound(false)
	for id, patterns := range o.holds {
		c.holds(id, patterns)
	}
	if repeat || ended {
		for id, patterns := range o.done {
			c.holds(id, patterns)
		}
		for _, id := range o.gone {
			var err error
			if snapshot, ok := strings.CutPrefix(id, "s:"); ok {
				_, err = c.s.SnapshotByID(t.Context(), snapshot)
			} else {
				_, err = c.s.Volume(t.Context(), id)
			}
			if !errors.Is(err, datastore.ErrNotFound) {
				t.Errorf("%s: %v", id, err)
			}
		}
	}
	c.empty()
}
