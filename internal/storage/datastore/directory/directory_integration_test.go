//go:build integration

package directory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/datastore/enginetest"
	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/testkit/lukstest"
)

// store makes an empty store.
func store(t testing.TB, c Config) *chain.Store {
	t.Helper()
	if c.Path == "" {
		c.Path = filepath.Join(t.TempDir(), "store")
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSuite(t *testing.T) {
	enginetest.Suite(t, 0, func(t *testing.T, k datastore.Keys) enginetest.Store { return store(t, Config{Keys: k}) })
}

// make1 makes a volume of 1 GiB with data in it.
func make1(t testing.TB, s *chain.Store, id string) {
	t.Helper()
	if _, err := s.Create(t.Context(), datastore.Spec{ID: id, Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	d, err := s.Attach(t.Context(), id, "w", datastore.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := qemuIO(t, s, d, "write -P 1 0 1M"); err != nil {
		t.Fatal(err)
	}
	if err := s.Detach(t.Context(), id, "w"); err != nil {
		t.Fatal(err)
	}
}

// images returns the paths of a volume's layers, bottom to top.
func images(t testing.TB, s *chain.Store, id string) []string {
	t.Helper()
	d, err := s.Attach(t.Context(), id, "look", datastore.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Detach(t.Context(), id, "look"); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range d.Layers {
		out = append(out, l.File)
	}
	return out
}

// kinds are the kinds of all problems that Check finds.
func kinds(t testing.TB, s *chain.Store) string {
	t.Helper()
	report, err := s.Check(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range report.Problems {
		t.Logf("%+v", p)
		out = append(out, string(p.Kind))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// TestInit: only an empty directory becomes a datastore, and another one in its place is not taken for it.
func TestInit(t *testing.T) {
	path := t.TempDir()
	if err := os.WriteFile(filepath.Join(path, "letter"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Init(t.Context()); !errors.Is(err, datastore.ErrInvalid) {
		t.Errorf("a directory with something in it: %v", err)
	}
	if err := os.Remove(filepath.Join(path, "letter")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.List(t.Context()); !errors.Is(err, datastore.ErrUnavailable) {
		t.Errorf("no datastore: %v", err)
	}
	id, err := s.Init(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	known, err := New(Config{Path: path, ID: id})
	if err != nil {
		t.Fatal(err)
	}
	if st := known.Status(t.Context()); st.Err != nil {
		t.Error(st.Err)
	}
	other, err := New(Config{Path: path, ID: "dother"})
	if err != nil {
		t.Fatal(err)
	}
	if st := other.Status(t.Context()); !errors.Is(st.Err, datastore.ErrUnavailable) {
		t.Error(st.Err)
	}

	make1(t, s, "v")
	away := path + "-away" // the file system is not mounted
	if err := os.Rename(path, away); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := known.Init(t.Context()); !errors.Is(err, datastore.ErrUnavailable) {
		t.Errorf("a known datastore was made anew: %v", err)
	}
	if _, err := known.Create(t.Context(), datastore.Spec{ID: "x", Size: 1 << 20}); !errors.Is(err, datastore.ErrUnavailable) {
		t.Errorf("creating in an empty mount point: %v", err)
	}
	if err := known.Delete(t.Context(), "v"); !errors.Is(err, datastore.ErrUnavailable) {
		t.Errorf("a volume that cannot be seen was taken for deleted: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if st := known.Status(t.Context()); !errors.Is(st.Err, datastore.ErrUnavailable) {
		t.Error(st.Err)
	}
	if err := os.Rename(away, path); err != nil {
		t.Fatal(err)
	}
	if st := known.Status(t.Context()); st.Err != nil || st.Volumes != 1 {
		t.Errorf("%+v", st)
	}
	if found := kinds(t, known); found != "" {
		t.Error(found)
	}
}

// TestHostileImages: an image that was exchanged for one that leads elsewhere, or that is damaged, is not
// given out, and Check says which volume it is.
func TestHostileImages(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("s"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		damage func(path string) error
		want   datastore.ProblemKind
	}{
		"backing file": {func(path string) error {
			return qemuImg("create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", path, "1G")
		}, datastore.ProblemForeign},
		"backing protocol": {func(path string) error {
			return qemuImg("create", "-q", "-f", "qcow2", "-u", "-b", "nbd://192.0.2.1/x", "-F", "raw", path, "1G")
		}, datastore.ProblemForeign},
		"data file": {func(path string) error {
			return qemuImg("create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), path, "1G")
		}, datastore.ProblemCorrupt},
		"smaller": {func(path string) error { return qemuImg("create", "-q", "-f", "qcow2", path, "1M") }, datastore.ProblemCorrupt},
		"raw":     {func(path string) error { return qemuImg("create", "-q", "-f", "raw", path, "1G") }, datastore.ProblemCorrupt},
		"encrypted": {func(path string) error {
			return lukstest.Create("-f", "qcow2", "--object", "secret,id=k,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", path, "1G")
		}, datastore.ProblemCorrupt},
		"cut off": {func(path string) error { return os.Truncate(path, 50) }, datastore.ProblemCorrupt},
		"zeros":   {func(path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o600) }, datastore.ProblemCorrupt},
		"link": {func(path string) error {
			return errors.Join(os.Rename(path, path+"x"), os.Symlink(secret, path), os.Remove(path+"x"))
		}, datastore.ProblemCorrupt},
		"fifo":    {func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) }, datastore.ProblemCorrupt},
		"missing": {os.Remove, datastore.ProblemMissing},
		"tables":  {func(path string) error { return overwrite(path, 3<<16, bytes.Repeat([]byte{0xff}, 4096)) }, datastore.ProblemCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			s := store(t, Config{})
			make1(t, s, "v")
			make1(t, s, "good")
			if err := c.damage(images(t, s, "v")[0]); err != nil {
				t.Fatal(err)
			}
			if found := kinds(t, s); found != string(c.want) {
				t.Errorf("found %q, want %q", found, c.want)
			}
			if name != "tables" { // QEMU's to find
				if _, err := s.Attach(t.Context(), "v", "h", datastore.ReadOnly); !errors.Is(err, datastore.ErrCorrupt) {
					t.Errorf("attaching: %v", err)
				}
			}
			images(t, s, "good")
			if err := s.Delete(t.Context(), "v"); err != nil {
				t.Error(err)
			}
			if found := kinds(t, s); found != "" {
				t.Error(found)
			}
		})
	}
}

// qemuImg runs qemu-img.
func qemuImg(args ...string) error {
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func overwrite(path string, at int64, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(b, at)
	return err
}

// TestOrphans: what nobody knows is reported with its size, and stays through everything.
func TestOrphans(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	s := store(t, Config{Path: path})
	make1(t, s, "v")
	orphans := []string{"layers/l0123456789abcdef.img", "layers/l0123456789abcdef.img.new", "layers/letter", "volumes/letter", "snapshots/UPPER.json"}
	for _, name := range orphans {
		if err := os.WriteFile(filepath.Join(path, name), make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	half := filepath.Join(path, "volumes", ".v.json.123")
	if err := os.WriteFile(half, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(half, time.Now(), time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := s.Tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("half a record stays")
	}
	if err := s.Delete(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	report, err := s.Check(t.Context(), nil)
	if err != nil || len(report.Problems) != len(orphans) {
		t.Fatalf("%+v, %v", report, err)
	}
	for _, p := range report.Problems {
		if p.Kind != datastore.ProblemOrphan || strings.Contains(p.Path, "layers") && p.Bytes != 8192 {
			t.Errorf("%+v", p)
		}
		if _, err := os.Stat(p.Path); err != nil {
			t.Error(err)
		}
	}
}

// TestDamagedRecord: others can be used, but nothing is removed that the record may name.
func TestDamagedRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	s := store(t, Config{Path: path})
	make1(t, s, "v")
	make1(t, s, "w")
	record := filepath.Join(path, "volumes", "v.json")
	good, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, good[:len(good)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	images(t, s, "w")
	if _, err := s.Attach(t.Context(), "v", "h", datastore.ReadOnly); !errors.Is(err, datastore.ErrCorrupt) {
		t.Error(err)
	}
	for _, id := range []string{"v", "w"} {
		if err := s.Delete(t.Context(), id); !errors.Is(err, datastore.ErrCorrupt) {
			t.Errorf("deleting %s: %v", id, err)
		}
	}
	if all, err := s.List(t.Context()); !errors.Is(err, datastore.ErrCorrupt) || len(all.Volumes) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
	if found := kinds(t, s); !strings.Contains(found, "record") || strings.Contains(found, string(datastore.ProblemOrphan)) {
		t.Error(found)
	}
	if err := os.WriteFile(record, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), "w"); err != nil {
		t.Error(err)
	}
	images(t, s, "v")
	if found := kinds(t, s); found != "" {
		t.Error(found)
	}
}

// TestLimits: a warning, then refusal.
func TestLimits(t *testing.T) {
	s := store(t, Config{Limits: datastore.Limits{WarnAt: 1e-9, RefuseAt: 1}})
	if st := s.Status(t.Context()); st.Err != nil || !st.Warning || st.Full {
		t.Errorf("%+v", st)
	}
	if _, err := s.Create(t.Context(), datastore.Spec{ID: "v", Size: 1 << 30, Provisioning: datastore.Thick, Format: "raw"}); err != nil {
		t.Error(err)
	}
	for _, spec := range []datastore.Spec{
		{ID: "w", Size: 64 << 40, Provisioning: datastore.Thick},
		{ID: "w", Size: 64 << 40, Provisioning: datastore.EagerZeroed, Format: "qcow2"},
	} {
		if _, err := s.Create(t.Context(), spec); !errors.Is(err, datastore.ErrFull) {
			t.Errorf("%+v: %v", spec, err)
		}
	}
	if _, err := s.Expand(t.Context(), "v", 64<<40, nil); !errors.Is(err, datastore.ErrFull) {
		t.Errorf("growing: %v", err)
	}
	path := filepath.Join(t.TempDir(), "full")
	store(t, Config{Path: path})
	full, err := New(Config{Path: path, Limits: datastore.Limits{RefuseAt: 1e-9}})
	if err != nil {
		t.Fatal(err)
	}
	if st := full.Status(t.Context()); st.Err != nil || !st.Full || st.Creatable != 0 {
		t.Errorf("%+v", st)
	}
	if _, err := full.Create(t.Context(), datastore.Spec{ID: "v", Size: 1 << 20}); !errors.Is(err, datastore.ErrFull) {
		t.Errorf("creating: %v", err)
	}
	promised := store(t, Config{Limits: datastore.Limits{Overcommit: 1e-12 + 1e-6}})
	if _, err := promised.Create(t.Context(), datastore.Spec{ID: "v", Size: 64 << 40}); !errors.Is(err, datastore.ErrFull) {
		t.Errorf("promising: %v", err)
	}
}

// growing is a QEMU that has a volume open.
type growing struct{ file string }

func (g growing) Snapshot(context.Context, handover.Layer, *handover.WrappedKey) error { return nil }

func (g growing) Resize(_ context.Context, bytes int64) error {
	f, err := os.OpenFile(g.file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = qcow2.Grow(f, bytes)
	return err
}

// TestAnotherProcess: two stores on one directory respect each other's locks.
func TestAnotherProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	a, b := store(t, Config{Path: path}), store(t, Config{Path: path})
	make1(t, a, "v")
	if _, err := a.Attach(t.Context(), "v", "a", datastore.ReadWrite); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Attach(t.Context(), "v", "b", datastore.ReadWrite); !errors.Is(err, datastore.ErrAttached) || !strings.Contains(err.Error(), "by a since") {
		t.Errorf("a second writer: %v", err)
	}
	locks := &fileLocks{path: filepath.Join(path, lockFile)}
	if err := locks.Lock(t.Context(), "volumes/v"); err != nil {
		t.Fatal(err)
	}
	// Longer, if it is over before the lock is asked for.
	for wait := 100 * time.Millisecond; ; wait *= 4 {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		err := b.Detach(ctx, "v", "a")
		cancel()
		if errors.Is(err, datastore.ErrBusy) {
			break
		}
		early := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, datastore.ErrUnavailable)
		if !early || wait > time.Minute {
			t.Fatalf("while another one has the lock: %v", err)
		}
	}
	locks.Release()
	if err := b.Detach(t.Context(), "v", "a"); err != nil {
		t.Error(err)
	}
}

// TestNoSecrets: neither records nor arguments of qemu-img hold a passphrase.
func TestNoSecrets(t *testing.T) {
	dir := t.TempDir()
	log, tool := filepath.Join(dir, "log"), filepath.Join(dir, "qemu-img")
	script := "#!/bin/sh\nprintf '%s\\n' \"$@\" >>" + log + "\nenv >>" + log + "\nexec qemu-img \"$@\"\n"
	if err := os.WriteFile(tool, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "store")
	s := store(t, Config{Path: path, Keys: crashKeys(""), QEMUImg: tool})
	if _, err := s.Create(t.Context(), datastore.Spec{ID: "v", Size: 8 << 20, Encryption: "gold", Provisioning: datastore.EagerZeroed}); err != nil {
		t.Fatal(err)
	}
	disk, err := s.Attach(t.Context(), "v", "h", datastore.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Detach(t.Context(), "v", "h"); err != nil {
		t.Fatal(err)
	}
	if found := kinds(t, s); found != "" {
		t.Error(found)
	}
	passphrases, err := s.Unlock(t.Context(), disk)
	if err != nil || len(passphrases) != 1 {
		t.Fatal(passphrases, err)
	}
	for _, p := range passphrases {
		for _, file := range []string{log, filepath.Join(path, "volumes", "v.json"), disk.Layers[0].File} {
			text, err := os.ReadFile(file)
			if err != nil || len(text) == 0 || bytes.Contains(text, p) {
				t.Errorf("%s: %d bytes, %v, passphrase in it: %t", file, len(text), err, bytes.Contains(text, p))
			}
		}
	}
}
