package enginetest

import (
	"bytes"
	"fmt"
	"strings"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/keys"
)

// provisioning: thick volumes take their room at once and read as zeros, eager ones with progress.
func provisioning(b *bench) {
	for _, spec := range []datastore.Spec{
		{ID: "thick", Size: 64 * mib, Provisioning: datastore.Thick},
		{ID: "thick-qcow2", Size: 64 * mib, Provisioning: datastore.Thick, Format: handover.FormatQCOW2},
		{ID: "thick-secret", Size: 64 * mib, Provisioning: datastore.Thick, Encryption: "gold"},
		{ID: "eager", Size: 64 * mib, Provisioning: datastore.EagerZeroed},
		{ID: "eager-qcow2", Size: 64 * mib, Provisioning: datastore.EagerZeroed, Format: handover.FormatQCOW2},
		{ID: "eager-secret", Size: 64 * mib, Provisioning: datastore.EagerZeroed, Encryption: "gold"},
	} {
		told := int64(0)
		spec.Progress = func(done, total int64) { told = done * 100 / total }
		must(b.s.Create(b.Context(), spec))(b)
		v := must(b.s.Volume(b.Context(), spec.ID))(b)
		if v.Used < 64*mib || v.Used > 70*mib+b.slack || v.Provisioning != spec.Provisioning {
			b.Errorf("%+v", v)
		}
		if strings.HasPrefix(spec.ID, "eager") && told != 100 {
			b.Errorf("%s: told of %d %%", spec.ID, told)
		}
		b.io(spec.ID, "read -P 0 0 64M", "write -P 1 1M 1M")
		v = must(b.s.Volume(b.Context(), spec.ID))(b)
		if v.Used > 70*mib+b.slack {
			b.Errorf("after writing: %+v", v)
		}
		b.snapshot("s-"+spec.ID, spec.ID)
		b.io(spec.ID, "write -P 2 1M 1M")
		must(b.s.Create(b.Context(), datastore.Spec{
			ID: "copy-" + spec.ID, Provisioning: spec.Provisioning, Encryption: spec.Encryption, Source: &datastore.Source{Snapshot: "s-" + spec.ID},
		}))(b)
		b.io("copy-"+spec.ID, "read -P 1 1M 1M", "read -P 0 2M 62M")
	}
	b.empty()
}

// encryption: nothing is readable without the key, copies have their own, classes may differ.
func encryption(b *bench) {
	v := must(b.s.Create(b.Context(), datastore.Spec{ID: "v", Size: gib, Encryption: "gold"}))(b)
	if v.Encryption != "gold" {
		b.Errorf("%+v", v)
	}
	b.io("v", "write -P 1 0 1M")
	if s := b.snapshot("s", "v"); s.Encryption != "gold" {
		b.Errorf("%+v", s)
	}
	b.io("v", "write -P 2 0 1M")
	must(b.s.Create(b.Context(), datastore.Spec{ID: "same", Encryption: "gold", Source: &datastore.Source{Snapshot: "s"}}))(b)
	must(b.s.Create(b.Context(), datastore.Spec{ID: "other", Encryption: "silver", Source: &datastore.Source{Volume: "v"}}))(b)
	_, err := b.s.Create(b.Context(), datastore.Spec{ID: "clear", Source: &datastore.Source{Volume: "v"}})
	b.fails(err, datastore.ErrUnsupported)
	if !strings.Contains(fmt.Sprint(err), "csi.vsphere.encryption-class") {
		b.Errorf("no way out: %v", err)
	}
	b.create("plain", mib)
	must(b.s.Create(b.Context(), datastore.Spec{ID: "more", Encryption: "gold", Source: &datastore.Source{Volume: "plain"}}))(b)
	b.io("more", "write -P 1 0 64k")
	b.ok(b.s.Delete(b.Context(), "plain"))
	b.ok(b.s.Tidy(b.Context()))
	if v := must(b.s.Volume(b.Context(), "more"))(b); v.Layers != 2 {
		b.Errorf("what is encrypted was merged into a clear layer: %+v", v)
	}
	b.io("same", "read -P 1 0 1M")
	b.io("other", "read -P 2 0 1M")

	disk := must(b.s.Attach(b.Context(), "other", "h", datastore.ReadOnly))(b)
	for _, l := range disk.Layers {
		if disk.Keys[l.Key].Class != "silver" {
			b.Errorf("%+v", disk)
		}
	}
	b.ok(b.s.Detach(b.Context(), "other", "h"))
	passphrases := must(b.s.Unlock(b.Context(), disk))(b)
	for name, passphrase := range passphrases {
		if len(passphrase) != 44 || strings.Contains(fmt.Sprintf("%+v", disk), string(passphrase)) {
			b.Errorf("key %s", name)
		}
	}

	gold := b.keys["gold"]
	b.keys["gold"] = [][]byte{bytes.Repeat([]byte("w"), keys.Size)}
	disk = must(b.s.Attach(b.Context(), "v", "h", datastore.ReadOnly))(b)
	_, err = b.s.Unlock(b.Context(), disk)
	b.fails(err, datastore.ErrKey)
	b.ok(b.s.Detach(b.Context(), "v", "h"))
	b.io("other", "read -P 2 0 1M") // does not need gold
	report := must(b.s.Check(b.Context(), nil))(b)
	if len(report.Problems) == 0 {
		b.Error("missing keys are no problem")
	}
	for _, p := range report.Problems {
		if p.Kind != datastore.ProblemKeyMissing {
			b.Errorf("%+v", p)
		}
	}
	_, err = b.s.Create(b.Context(), datastore.Spec{ID: "x", Encryption: "gold", Source: &datastore.Source{Volume: "v"}})
	b.fails(err, datastore.ErrKey)
	b.keys["gold"] = gold
	b.empty()
}

// keyRotation: key-encryption keys and volume keys change, data stay.
func keyRotation(b *bench) {
	must(b.s.Create(b.Context(), datastore.Spec{ID: "v", Size: gib, Encryption: "gold"}))(b)
	b.io("v", "write -P 1 0 1M")
	b.snapshot("s", "v")
	b.io("v", "write -P 2 1M 1M")

	old := must(b.s.Attach(b.Context(), "v", "h", datastore.ReadWrite))(b)
	before := must(b.s.Unlock(b.Context(), old))(b)
	b.keys["gold"] = append(b.keys["gold"], bytes.Repeat([]byte("n"), keys.Size))
	b.ok(b.s.Rewrap(b.Context(), datastore.Source{Volume: "v"}, "gold")) // attached
	b.ok(b.s.Rewrap(b.Context(), datastore.Source{Snapshot: "s"}, "gold"))
	_, err := b.s.Rekey(b.Context(), "v")
	b.fails(err, datastore.ErrAttached)
	b.ok(b.s.Detach(b.Context(), "v", "h"))
	b.keys["gold"] = b.keys["gold"][1:]
	_, err = b.s.Unlock(b.Context(), old)
	b.fails(err, datastore.ErrKey)
	b.io("v", "read -P 1 0 1M", "read -P 2 1M 1M")
	b.ok(b.s.Rewrap(b.Context(), datastore.Source{Volume: "v"}, "silver"))
	if v := must(b.s.Volume(b.Context(), "v"))(b); v.Encryption != "silver" {
		b.Errorf("%+v", v)
	}

	if kept := must(b.s.Rekey(b.Context(), "v"))(b); kept != 1 {
		b.Errorf("%d layers kept their key", kept)
	}
	b.io("v", "read -P 1 0 1M", "read -P 2 1M 1M")
	must(b.s.Create(b.Context(), datastore.Spec{ID: "r", Encryption: "gold", Source: &datastore.Source{Snapshot: "s"}}))(b)
	b.io("r", "read -P 1 0 1M")
	b.ok(b.s.Delete(b.Context(), "r"))
	b.ok(b.s.DeleteSnapshot(b.Context(), "s"))
	b.ok(b.s.Tidy(b.Context()))
	if kept := must(b.s.Rekey(b.Context(), "v"))(b); kept != 0 {
		b.Errorf("%d layers kept their key", kept)
	}
	now := must(b.s.Attach(b.Context(), "v", "h", datastore.ReadOnly))(b)
	after := must(b.s.Unlock(b.Context(), now))(b)
	for name := range after {
		if before[name] != nil || len(after) != 1 {
			b.Errorf("keys before %v, now %v", before, after)
		}
	}
	stale := now
	stale.Keys, stale.Layers = old.Keys, nil
	for _, l := range now.Layers { // the old passphrase opens nothing
		for name := range old.Keys {
			l.Key = name
		}
		stale.Layers = append(stale.Layers, l)
	}
	b.keys["gold"] = append(b.keys["gold"], []byte(strings.Repeat("g", keys.Size)))
	if err := b.open(stale, "read 0 512"); err == nil {
		b.Error("the old key still opens the volume")
	}
	b.ok(b.s.Detach(b.Context(), "v", "h"))
	b.io("v", "read -P 1 0 1M", "read -P 2 1M 1M")
	b.empty()
}
