package enginetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"reflect"
	"strings"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// snapshotsAndCopies: a snapshot does not change any more, and copies of all kinds are independent.
func snapshotsAndCopies(b *bench) {
	b.create("v", gib)
	b.io("v", "write -P 1 0 1M", "write -P 1 512M 1M")
	s := b.snapshot("s1", "v")
	if s.Size != gib || s.Volume != "v" {
		b.Errorf("%+v", s)
	}
	b.io("v", "write -P 2 0 1M")
	b.snapshot("s2", "v")
	b.snapshot("s2b", "v") // nothing written between
	b.io("v", "write -P 3 0 1M")
	b.copyOf("r1", "s:s1")
	b.copyOf("r2", "s:s2")
	b.copyOf("r2b", "s:s2b")
	b.copyOf("c", "v")
	b.copyOf("cc", "c")
	must(b.s.Create(b.Context(), datastore.Spec{ID: "big", Size: 2 * gib, Source: &datastore.Source{Snapshot: "s1"}}))(b)
	for id, want := range map[string]int{"r1": 1, "r2": 2, "r2b": 2, "c": 3, "v": 3, "cc": 3} {
		b.io(id, fmt.Sprintf("read -P %d 0 1M", want), "read -P 1 512M 1M", "read -P 0 1M 1M")
	}
	b.io("big", "read -P 1 512M 1M", "read -P 0 1G 1G", "write -P 9 1G 1M")
	b.io("c", "write -P 8 0 1M")
	b.io("cc", "write -P 9 512M 1M")
	b.io("v", "read -P 3 0 1M", "read -P 1 512M 1M")
	b.io("c", "read -P 8 0 1M", "read -P 1 512M 1M")
	if v := must(b.s.Volume(b.Context(), "v"))(b); v.Layers > 5 || v.Used > 3*mib+b.slack {
		b.Errorf("%+v", v)
	}
	b.sound()
	b.empty()
}

// deleteInAnyOrder: whatever goes first, what stays is whole, and nothing is left at the end.
func deleteInAnyOrder(b *bench) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 4 {
		b.create("v", gib)
		b.io("v", "write -P 1 0 1M")
		b.snapshot("s1", "v")
		b.io("v", "write -P 2 1M 1M")
		b.copyOf("c1", "v")
		b.copyOf("r1", "s:s1")
		b.io("r1", "write -P 3 2M 1M")
		b.snapshot("s2", "r1")
		b.copyOf("r2", "s:s2")
		content := map[string][]string{
			"v":  {"read -P 1 0 1M", "read -P 2 1M 1M", "read -P 0 2M 1M"},
			"c1": {"read -P 1 0 1M", "read -P 2 1M 1M", "read -P 0 2M 1M"},
			"r1": {"read -P 1 0 1M", "read -P 0 1M 1M", "read -P 3 2M 1M"},
			"r2": {"read -P 1 0 1M", "read -P 0 1M 1M", "read -P 3 2M 1M"},
		}
		order := []string{"v", "c1", "r1", "r2", "s:s1", "s:s2"}
		rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		b.Logf("order %v", order)
		for n, id := range order {
			if snapshot, ok := strings.CutPrefix(id, "s:"); ok {
				b.ok(b.s.DeleteSnapshot(b.Context(), snapshot))
			} else {
				b.ok(b.s.Delete(b.Context(), id))
				delete(content, id)
			}
			if n%2 == 0 {
				b.ok(b.s.Tidy(b.Context()))
			}
			for id, reads := range content {
				b.io(id, reads...)
			}
			b.sound()
		}
		b.empty()
	}
}

// live is an open disk: what QEMU would do is done with files.
type live struct {
	disk   handover.Disk
	before func() error // before the switch
	after  func() error
	calls  int
}

func (l *live) Snapshot(_ context.Context, overlay handover.Layer, key *handover.WrappedKey) error {
	l.calls++
	if l.before != nil {
		if err := l.before(); err != nil {
			return err
		}
	}
	if top := l.disk.Layers[len(l.disk.Layers)-1]; top.ID != overlay.ID {
		l.disk.Layers[len(l.disk.Layers)-1].ReadOnly = true
		l.disk.Layers = append(l.disk.Layers, overlay)
		if key != nil {
			l.disk.Keys[overlay.Key] = *key
		}
	}
	if l.after != nil {
		return l.after()
	}
	return nil
}

func (l *live) Resize(_ context.Context, bytes int64) error {
	l.calls++
	if l.before != nil {
		if err := l.before(); err != nil {
			return err
		}
	}
	name, err := qemuimg.Name(qemuimg.Node(l.disk.Layers))
	if err != nil {
		return err
	}
	if out, err := exec.Command("qemu-img", "resize", name, fmt.Sprint(bytes)).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	l.disk.Size = bytes
	return nil
}

// attach opens volume v for writing.
func (b *bench) attach() *live {
	b.Helper()
	return &live{disk: must(b.s.Attach(b.Context(), "v", "live", datastore.ReadWrite))(b)}
}

// liveSnapshot: snapshots and copies of a volume while it is written.
func liveSnapshot(b *bench) {
	for _, class := range []string{"", "gold"} {
		must(b.s.Create(b.Context(), datastore.Spec{ID: "v", Size: gib, Encryption: class}))(b)
		l := b.attach()
		b.ok(b.open(l.disk, "write -P 1 0 1M"))
		must(b.s.Snapshot(b.Context(), "s", "v", l))(b)
		b.ok(b.open(l.disk, "write -P 2 0 1M"))
		if len(l.disk.Layers) != 2 || !l.disk.Layers[0].ReadOnly || l.disk.Layers[1].ReadOnly {
			b.Errorf("%+v", l.disk)
		}
		must(b.s.Create(b.Context(), datastore.Spec{ID: "c", Encryption: class, Source: &datastore.Source{Volume: "v", Live: l}}))(b)
		b.ok(b.open(l.disk, "write -P 3 0 1M"))
		must(b.s.Create(b.Context(), datastore.Spec{ID: "r", Encryption: class, Source: &datastore.Source{Snapshot: "s"}}))(b)
		if again := must(b.s.Attach(b.Context(), "v", "live", datastore.ReadWrite))(b); !reflect.DeepEqual(again.Layers, l.disk.Layers) {
			b.Errorf("engine: %+v\nQEMU: %+v", again, l.disk)
		}
		b.ok(b.s.Tidy(b.Context())) // leaves what is open alone
		b.ok(b.open(l.disk, "read -P 3 0 1M"))
		b.ok(b.s.Detach(b.Context(), "v", "live"))
		b.io("v", "read -P 3 0 1M")
		b.io("c", "read -P 2 0 1M")
		b.io("r", "read -P 1 0 1M")
		b.empty()
	}
}

// liveFailure: the switch fails, before or after QEMU did it, and is done again, given up, or overtaken.
func liveFailure(b *bench) {
	lost := errors.New("the monitor is gone")
	fail := func() error { return lost }
	for _, switched := range []bool{false, true} {
		for _, next := range []string{"again", "other", "detach", "delete", "restart"} {
			b.Logf("switched %t, then %s", switched, next)
			b.create("v", gib)
			l := b.attach()
			b.ok(b.open(l.disk, "write -P 1 0 1M"))
			if switched {
				l.after = fail
			} else {
				l.before = fail
			}
			_, err := b.s.Snapshot(b.Context(), "s", "v", l)
			b.fails(err, lost)
			l.before, l.after = nil, nil
			b.ok(b.open(l.disk, "write -P 2 1M 1M"))
			snapshot := "s"
			switch next {
			case "again":
				must(b.s.Snapshot(b.Context(), "s", "v", l))(b)
			case "other":
				must(b.s.Snapshot(b.Context(), "t", "v", l))(b)
				snapshot = "t"
			case "detach":
				b.ok(b.s.Detach(b.Context(), "v", "live"))
				b.ok(b.s.Tidy(b.Context()))
				l = b.attach()
			case "delete":
				b.ok(b.s.DeleteSnapshot(b.Context(), "s"))
				b.ok(b.s.Detach(b.Context(), "v", "live"))
				l = b.attach()
				snapshot = ""
			case "restart": // of QEMU, with the volume attached all the time
				l = b.attach()
				must(b.s.Snapshot(b.Context(), "s", "v", l))(b)
			}
			b.ok(b.open(l.disk, "write -P 3 0 1M"))
			b.ok(b.s.Detach(b.Context(), "v", "live"))
			b.io("v", "read -P 3 0 1M", "read -P 2 1M 1M")
			if _, err := b.s.SnapshotByID(b.Context(), snapshot); snapshot != "" {
				b.ok(err)
				b.copyOf("r", "s:"+snapshot)
				b.io("r", "read -P 1 0 1M")
			}
			b.empty()
		}
	}
}

// notOpen: the volume is attached, but no QEMU has it open: the engine changes the files, and who opens the
// volume after that gets what it made of them.
func notOpen(b *bench) {
	for _, spec := range []datastore.Spec{{ID: "v", Size: gib}, {ID: "v", Size: gib, Format: handover.FormatRaw}, {ID: "v", Size: gib, Encryption: "gold"}} {
		must(b.s.Create(b.Context(), spec))(b)
		l := b.attach()
		b.ok(b.open(l.disk, "write -P 1 0 1M"))
		l.before = func() error { return datastore.ErrNotOpen }
		must(b.s.Expand(b.Context(), "v", 2*gib, l))(b)
		must(b.s.Snapshot(b.Context(), "s", "v", l))(b)
		must(b.s.Expand(b.Context(), "v", 3*gib, l))(b)
		l = b.attach()
		if len(l.disk.Layers) != 2 || l.disk.Size != 3*gib {
			b.Errorf("%+v", l.disk)
		}
		b.ok(b.open(l.disk, "write -P 2 0 1M", "write -P 3 2560M 1M"))
		b.ok(b.s.Detach(b.Context(), "v", "live"))
		must(b.s.Create(b.Context(), datastore.Spec{ID: "r", Encryption: spec.Encryption, Source: &datastore.Source{Snapshot: "s"}}))(b)
		b.io("r", "read -P 1 0 1M", "read -P 0 1G 1M")
		b.empty()
	}
}

// expand: larger, never smaller, of all kinds.
func expand(b *bench) {
	for _, spec := range []datastore.Spec{
		{ID: "v", Size: gib},
		{ID: "v", Size: 64 * mib, Format: handover.FormatRaw},
		{ID: "v", Size: 64 * mib, Provisioning: datastore.Thick},
		{ID: "v", Size: 64 * mib, Provisioning: datastore.Thick, Encryption: "gold"},
		{ID: "v", Size: gib, Encryption: "gold"},
	} {
		b.Logf("%+v", spec)
		must(b.s.Create(b.Context(), spec))(b)
		b.io("v", "write -P 1 0 1M")
		v := must(b.s.Expand(b.Context(), "v", spec.Size+mib-1, nil))(b)
		if v.Size != spec.Size+mib {
			b.Errorf("%+v", v)
		}
		_, err := b.s.Expand(b.Context(), "v", spec.Size, nil)
		b.fails(err, datastore.ErrShrink)
		_, err = b.s.Expand(b.Context(), "v", 1<<60, nil)
		b.fails(err, datastore.ErrInvalid)
		_, err = b.s.Expand(b.Context(), "v", 0, nil)
		b.fails(err, datastore.ErrInvalid)
		b.io("v", "read -P 1 0 1M", fmt.Sprintf("read -P 0 %d 1M", spec.Size), fmt.Sprintf("write -P 2 %d 1M", spec.Size))
		if s := b.snapshot("s", "v"); s.Size != v.Size {
			b.Errorf("%+v", s)
		}
		v = must(b.s.Expand(b.Context(), "v", spec.Size+2*mib, nil))(b)
		b.io("v", fmt.Sprintf("read -P 2 %d 1M", spec.Size), fmt.Sprintf("write -P 3 %d 1M", spec.Size+mib))
		if spec.Encryption == "" {
			l := b.attach()
			v = must(b.s.Expand(b.Context(), "v", spec.Size+3*mib, l))(b)
			if again := b.attach(); again.disk.Size != v.Size || l.calls != 1 {
				b.Errorf("%+v", again.disk)
			}
			b.ok(b.s.Detach(b.Context(), "v", "live"))
		}
		r := must(b.s.Create(b.Context(), datastore.Spec{ID: "r", Encryption: spec.Encryption, Source: &datastore.Source{Snapshot: "s"}}))(b)
		if r.Size != spec.Size+mib {
			b.Errorf("%+v", r)
		}
		b.io("r", fmt.Sprintf("read -P 2 %d 1M", spec.Size))
		b.empty()
	}
	b.create("huge", 3<<40)
	must(b.s.Expand(b.Context(), "huge", 6<<40, nil))(b)
	b.io("huge", "write -P 1 5T 1M")
	must(b.s.Create(b.Context(), datastore.Spec{ID: "secret", Size: 3 << 40, Encryption: "gold"}))(b)
	must(b.s.Expand(b.Context(), "secret", 6<<40, nil))(b)
	b.io("secret", "write -P 1 5T 1M")
	b.empty()
}

// merge: chains become short again when nobody needs what is in between.
func merge(b *bench) {
	for _, spec := range []datastore.Spec{
		{ID: "v", Size: 64 * mib}, {ID: "v", Size: 64 * mib, Encryption: "gold"}, {ID: "v", Size: 64 * mib, Provisioning: datastore.Thick},
	} {
		must(b.s.Create(b.Context(), spec))(b)
		reads := []string{}
		for n := range 6 {
			b.io("v", fmt.Sprintf("write -P %d %dM 1M", n+1, n), fmt.Sprintf("write -P %d 32M 1M", n+1), "write -z 48M 64k", fmt.Sprintf("write -P 7 %dk 64k", 48<<10+64*n))
			b.snapshot(fmt.Sprintf("s%d", n), "v")
			reads = append(reads, fmt.Sprintf("read -P %d %dM 1M", n+1, n))
		}
		reads = append(reads, "read -P 6 32M 1M", "read -P 0 48M 64k")
		must(b.s.Create(b.Context(), datastore.Spec{ID: "c", Encryption: spec.Encryption, Source: &datastore.Source{Snapshot: "s2"}}))(b)
		must(b.s.Expand(b.Context(), "v", 128*mib, nil))(b)
		b.io("v", "write -P 8 100M 1M")
		reads = append(reads, "read -P 8 100M 1M")
		for _, n := range []int{1, 3, 0, 5, 4} {
			b.ok(b.s.DeleteSnapshot(b.Context(), fmt.Sprintf("s%d", n)))
			b.ok(b.s.Tidy(b.Context()))
			b.io("v", reads...)
			b.io("c", "read -P 3 2M 1M", "read -P 3 32M 1M", "read -P 0 3M 1M")
			b.sound()
		}
		if v := must(b.s.Volume(b.Context(), "v"))(b); v.Layers != 2 {
			b.Errorf("%d layers: %+v", v.Layers, v)
		}
		b.ok(b.s.DeleteSnapshot(b.Context(), "s2"))
		b.ok(b.s.Delete(b.Context(), "c"))
		b.ok(b.s.Tidy(b.Context()))
		if v := must(b.s.Volume(b.Context(), "v"))(b); v.Layers != 1 {
			b.Errorf("%d layers: %+v", v.Layers, v)
		}
		b.io("v", reads...)
		b.empty()
	}
}
