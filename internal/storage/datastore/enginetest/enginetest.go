// Package enginetest is what every storage engine has to pass: the promises of datastore.Engine and
// datastore.Upkeep, tried with real images and qemu-io. It is imported by tests only.
package enginetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Store is what is tested.
type Store interface {
	datastore.Engine
	datastore.Upkeep
	Init(ctx context.Context) (string, error)
}

// Maker makes an empty store with these keys.
type Maker func(t *testing.T, k datastore.Keys) Store

// Suite runs everything. It needs qemu-img and qemu-io. Slack is how many bytes more than needed an engine may
// count for a volume, for its large allocation units.
func Suite(t *testing.T, slack int64, maker Maker) {
	for _, c := range []struct {
		name string
		test func(*bench)
	}{
		{"Lifecycle", lifecycle},
		{"Idempotence", idempotence},
		{"BadRequests", badRequests},
		{"Attachments", attachments},
		{"Snapshots", snapshotsAndCopies},
		{"DeleteInAnyOrder", deleteInAnyOrder},
		{"LiveSnapshot", liveSnapshot},
		{"LiveFailure", liveFailure},
		{"NotOpen", notOpen},
		{"Expand", expand},
		{"Provisioning", provisioning},
		{"Encryption", encryption},
		{"KeyRotation", keyRotation},
		{"Merge", merge},
		{"Rollback", rollback},
		{"Fill", fill},
		{"Concurrency", concurrency},
	} {
		t.Run(c.name, func(t *testing.T) {
			source := keys.Static{"gold": {[]byte(strings.Repeat("g", keys.Size))}, "silver": {[]byte(strings.Repeat("s", keys.Size))}}
			b := &bench{T: t, keys: source, slack: slack}
			b.s = maker(t, keys.Wrapper{Source: source})
			c.test(b)
			b.sound()
		})
	}
}

// bench is one store under test.
type bench struct {
	*testing.T
	s     Store
	keys  keys.Static
	slack int64
}

const (
	mib = 1 << 20
	gib = 1 << 30
)

// must ends the test on an error.
func must[V any](v V, err error) func(*bench) V {
	return func(b *bench) V {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
		return v
	}
}

// ok ends the test on an error.
func (b *bench) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// fails wants an error of a kind.
func (b *bench) fails(err, want error) {
	b.Helper()
	if !errors.Is(err, want) {
		b.Errorf("got %v, want %v", err, want)
	}
}

// create makes a thin volume.
func (b *bench) create(id string, size int64) {
	b.Helper()
	must(b.s.Create(b.Context(), datastore.Spec{ID: id, Size: size}))(b)
}

// copyOf makes a volume from a snapshot ("s:id") or a volume.
func (b *bench) copyOf(id, source string) {
	b.Helper()
	from := &datastore.Source{Volume: source}
	if s, ok := strings.CutPrefix(source, "s:"); ok {
		from = &datastore.Source{Snapshot: s}
	}
	must(b.s.Create(b.Context(), datastore.Spec{ID: id, Source: from}))(b)
}

// snapshot takes one of a volume that nobody has open.
func (b *bench) snapshot(id, volume string) datastore.Snapshot {
	b.Helper()
	return must(b.s.Snapshot(b.Context(), id, volume, nil))(b)
}

// io attaches a volume, runs qemu-io commands on it, and detaches it.
func (b *bench) io(volume string, commands ...string) {
	b.Helper()
	disk := must(b.s.Attach(b.Context(), volume, "io", datastore.ReadWrite))(b)
	b.ok(b.open(disk, commands...))
	b.ok(b.s.Detach(b.Context(), volume, "io"))
}

// open runs qemu-io commands on a disk.
func (b *bench) open(disk handover.Disk, commands ...string) error {
	b.Helper()
	passphrases, err := b.s.Unlock(b.Context(), disk)
	if err != nil {
		return err
	}
	return b.write(disk, passphrases, commands...)
}

// write is open with passphrases at hand.
func (b *bench) write(disk handover.Disk, passphrases map[string][]byte, commands ...string) error {
	b.Helper()
	name, err := qemuimg.Name(qemuimg.Node(disk.Layers))
	if err != nil {
		return err
	}
	var args []string
	for key, passphrase := range passphrases {
		file := filepath.Join(b.TempDir(), "key")
		if err := os.WriteFile(file, passphrase, 0o600); err != nil {
			return err
		}
		args = append(args, "--object", "secret,id="+qemuimg.SecretID(key)+",file="+file)
	}
	if disk.ReadOnly {
		args = append(args, "-r")
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.CommandContext(b.Context(), "qemu-io", append(args, name)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "verification failed") || strings.Contains(string(out), "rror") {
		return fmt.Errorf("qemu-io on %s: %w\n%s", disk.Volume, err, out)
	}
	return nil
}

// sound wants nothing wrong with the store.
func (b *bench) sound() {
	b.Helper()
	report := must(b.s.Check(context.Background(), nil))(b)
	for _, p := range report.Problems {
		b.Errorf("%+v", p)
	}
}

// empty removes everything and wants nothing left.
func (b *bench) empty() {
	b.Helper()
	all := must(b.s.List(b.Context()))(b)
	for _, v := range all.Volumes {
		b.ok(b.s.Delete(b.Context(), v.ID))
	}
	for _, s := range all.Snapshots {
		b.ok(b.s.DeleteSnapshot(b.Context(), s.ID))
	}
	if st := b.s.Status(b.Context()); st.Err != nil || st.Used != 0 || st.Provisioned != 0 || st.Volumes+st.Snapshots != 0 {
		b.Errorf("after removing everything: %+v", st)
	}
	b.sound()
}
