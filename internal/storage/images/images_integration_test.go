//go:build integration

package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/directory"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/library"
	"atoll.dev/atoll/internal/storage/qemuimg"
	"atoll.dev/atoll/internal/storage/stores"
)

// files is a source of one file.
type files struct {
	path string
	err  error
}

func (f files) Open(string, int) (convert.Image, library.Disk, error) {
	if f.err != nil {
		return convert.Image{}, library.Disk{}, f.err
	}
	file, err := os.Open(f.path)
	if err != nil {
		return convert.Image{}, library.Disk{}, err
	}
	st, err := file.Stat()
	if err != nil {
		return convert.Image{}, library.Disk{}, err
	}
	info, err := diskimage.Detect(file, st.Size(), true)
	return convert.Image{File: file, Info: info}, library.Disk{Info: info, Size: info.Size}, err
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// store is an empty datastore.
func store(t testing.TB) stores.Store {
	t.Helper()
	k := keys.Static{"gold": {[]byte(strings.Repeat("g", keys.Size))}}
	s, err := directory.New(directory.Config{Path: filepath.Join(t.TempDir(), "store"), Keys: keys.Wrapper{Source: k}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	return stores.Store{Name: "store", Backend: s}
}

// image makes an image of a size with some data at its end.
func image(t testing.TB, megabytes int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprintf("%dM", megabytes))
	run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 7 %dM 64M", megabytes-64), path)
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	return path
}

// holds reads the data at the end of a volume.
func holds(t testing.TB, s stores.Store, id string, megabytes int) {
	t.Helper()
	disk, err := s.Attach(context.Background(), id, "test", datastore.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Detach(context.Background(), id, "test")
	secrets, err := s.Unlock(context.Background(), disk)
	if err != nil {
		t.Fatal(err)
	}
	name, err := qemuimg.Name(qemuimg.Node(disk.Layers))
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-r", "-c", fmt.Sprintf("read -P 7 %dM 64M", megabytes-64), "-c", "read -P 0 0 1M"}
	for key, secret := range secrets {
		file := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(file, secret, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--object", "secret,id="+qemuimg.SecretID(key)+",file="+file)
	}
	out, err := exec.Command("qemu-io", append(args, name)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Errorf("%s: %v\n%s", id, err, out)
	}
}

// TestImport: many who want one image wait for one import, and copies are made at once after that, whatever the size.
func TestImport(t *testing.T) {
	const size = 10 << 10 // MiB
	s := store(t)
	i := New(files{path: image(t, size)}, slog.New(slog.DiscardHandler))
	d := Disk{Item: "a-b-c", Name: "debian"}
	var wg sync.WaitGroup
	begin := time.Now()
	for range 4 {
		wg.Go(func() {
			if v, err := i.Ensure(t.Context(), s, d); err != nil || v.Size != size<<20 || v.Labels[LabelItem] != "a-b-c" || v.Layers != 1 {
				t.Errorf("%+v, %v", v, err)
			}
		})
	}
	wg.Wait()
	t.Logf("importing %d MiB took %v", size, time.Since(begin))
	for n := range 3 {
		spec := datastore.Spec{ID: fmt.Sprintf("boot%d", n), Source: &datastore.Source{Volume: d.VolumeID()}}
		if n == 2 {
			spec.Encryption = "gold"
		}
		v, err := s.Create(t.Context(), spec)
		if err != nil || !IsCopy(v) {
			t.Fatalf("%+v, %v", v, err)
		}
		if v.Layers != 2 || v.Used >= 8<<20 { // nothing was copied
			t.Errorf("a copy has %d layers and uses %d bytes", v.Layers, v.Used)
		}
		holds(t, s, v.ID, size)
	}
	if err := Forget(t.Context(), s, func(item string) bool { return item == "a-b-c" }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Volume(t.Context(), d.VolumeID()); !errors.Is(err, datastore.ErrNotFound) {
		t.Error(err)
	}
	for n := range 3 {
		holds(t, s, fmt.Sprintf("boot%d", n), size)
	}
	report, err := s.Check(t.Context(), nil)
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("%+v, %v", report, err)
	}
}

// empty waits until a store has no volume.
func empty(t *testing.T, s stores.Store) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		all, err := s.List(t.Context())
		if err == nil && len(all.Volumes) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v, %v", all, err)
		}
	}
}

// TestImportEnds: an import that is given up, or of something that is not sound, leaves nothing; another one works.
func TestImportEnds(t *testing.T) {
	s := store(t)
	path := image(t, 1024)
	i := New(files{path: path}, slog.New(slog.DiscardHandler))
	d := Disk{Item: "x", Name: "x"}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	// A store that is slow just then lets go of whom it works for, and ends what it does later.
	if _, err := i.Ensure(ctx, s, d); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, datastore.ErrUnavailable) {
		t.Error(err)
	}
	bad := filepath.Join(t.TempDir(), "bad")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := 3 << 16; n < 4<<16; n++ {
		b[n] ^= 0x5a
	}
	if err := os.WriteFile(bad, b, 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := New(files{path: bad}, slog.New(slog.DiscardHandler)).Ensure(t.Context(), s, d); err == nil {
		t.Error("a damaged image was imported")
	} else {
		t.Log(err)
	}
	if _, err := New(files{err: library.ErrNotFound}, slog.New(slog.DiscardHandler)).Ensure(t.Context(), s, d); !errors.Is(err, library.ErrNotFound) {
		t.Error(err)
	}
	empty(t, s)
	if _, err := i.Ensure(t.Context(), s, d); err != nil {
		t.Error(err)
	}
	holds(t, s, d.VolumeID(), 1024)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		out, err := exec.Command("pgrep", "-u", "789998").Output()
		if err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("readers are left: %s", out)
		}
	}
}

// TestFullDatastore: an image that turns out to be larger than the room leaves nothing, and the error says what is full.
func TestFullDatastore(t *testing.T) {
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	engine, err := directory.New(directory.Config{Path: filepath.Join(dir, "store"), Limits: datastore.Limits{WarnAt: 0.2, RefuseAt: 0.3}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := stores.Store{Name: "small", Backend: engine}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 300M", path)
	run(t, "chmod", "444", path)
	_, err = New(files{path: path}, slog.New(slog.DiscardHandler)).Ensure(t.Context(), s, Disk{Item: "x", Name: "x"})
	if !errors.Is(err, datastore.ErrFull) {
		t.Error(err)
	}
	empty(t, s)
	if st := s.Status(t.Context()); st.Full || st.Used > 0 {
		t.Errorf("%+v", st)
	}
}
