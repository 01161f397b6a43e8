package enginetest

import (
	"fmt"
	"sync"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// lifecycle: made, listed, written, read, removed.
func lifecycle(b *bench) {
	v := must(b.s.Create(b.Context(), datastore.Spec{ID: "v", Size: 10*gib - 1, Labels: map[string]string{"a": "b"}}))(b)
	if v.Size != 10*gib || v.State != datastore.StateReady || v.Provisioning != datastore.Thin || v.Layers != 1 || v.Labels["a"] != "b" {
		b.Errorf("%+v", v)
	}
	b.io("v", "write -P 7 9G 1M", "read -P 0 0 1M")
	b.io("v", "read -P 7 9G 1M")
	all := must(b.s.List(b.Context()))(b)
	if len(all.Volumes) != 1 || len(all.Snapshots) != 0 || all.Volumes[0].Used < mib || all.Volumes[0].Used > 4*mib+b.slack {
		b.Errorf("%+v", all)
	}
	st := b.s.Status(b.Context())
	if st.Err != nil || st.Volumes != 1 || st.Provisioned != 10*gib || st.Used != all.Volumes[0].Used || st.Capacity < st.Free || st.Free <= 0 || st.Creatable < gib {
		b.Errorf("%+v", st)
	}
	b.empty()
	b.fails(volumeError(b, "v"), datastore.ErrNotFound)
}

// volumeError is what Volume returns.
func volumeError(b *bench, id string) error {
	_, err := b.s.Volume(b.Context(), id)
	return err
}

// idempotence: everything twice.
func idempotence(b *bench) {
	spec := datastore.Spec{ID: "v", Size: gib}
	for range 2 {
		must(b.s.Create(b.Context(), spec))(b)
		b.snapshot("s", "v")
		b.copyOf("w", "s:s")
		must(b.s.Attach(b.Context(), "v", "h", datastore.ReadWrite))(b)
	}
	id := must(b.s.Init(b.Context()))(b)
	if again := must(b.s.Init(b.Context()))(b); id != again || id == "" {
		b.Errorf("ids %q, %q", id, again)
	}
	if v := must(b.s.Volume(b.Context(), "v"))(b); len(v.Attachments) != 1 {
		b.Errorf("%+v", v)
	}
	for range 2 {
		b.ok(b.s.Detach(b.Context(), "v", "h"))
		b.ok(b.s.DeleteSnapshot(b.Context(), "s"))
		b.ok(b.s.Delete(b.Context(), "v"))
		b.ok(b.s.Delete(b.Context(), "w"))
	}
	b.ok(b.s.Detach(b.Context(), "v", "h"))
	b.empty()
}

// badRequests: each gets its own error, and changes nothing.
func badRequests(b *bench) {
	b.create("v", gib)
	b.create("u", gib)
	b.snapshot("s", "v")
	for name, c := range map[string]struct {
		spec datastore.Spec
		want error
	}{
		"no size":          {datastore.Spec{ID: "x"}, datastore.ErrInvalid},
		"negative size":    {datastore.Spec{ID: "x", Size: -1}, datastore.ErrInvalid},
		"absurd size":      {datastore.Spec{ID: "x", Size: 1 << 62}, datastore.ErrInvalid},
		"limit":            {datastore.Spec{ID: "x", Size: mib + 1, Limit: mib + 2}, datastore.ErrInvalid},
		"no id":            {datastore.Spec{Size: gib}, datastore.ErrInvalid},
		"path as id":       {datastore.Spec{ID: "../x", Size: gib}, datastore.ErrInvalid},
		"dots as id":       {datastore.Spec{ID: "..", Size: gib}, datastore.ErrInvalid},
		"provisioning":     {datastore.Spec{ID: "x", Size: gib, Provisioning: "fat"}, datastore.ErrInvalid},
		"format":           {datastore.Spec{ID: "x", Size: gib, Format: "vmdk"}, datastore.ErrInvalid},
		"raw encrypted":    {datastore.Spec{ID: "x", Size: gib, Format: handover.FormatRaw, Encryption: "gold"}, datastore.ErrUnsupported},
		"raw copy":         {datastore.Spec{ID: "x", Format: handover.FormatRaw, Source: &datastore.Source{Volume: "v"}}, datastore.ErrUnsupported},
		"two sources":      {datastore.Spec{ID: "x", Source: &datastore.Source{Volume: "v", Snapshot: "s"}}, datastore.ErrInvalid},
		"empty source":     {datastore.Spec{ID: "x", Source: &datastore.Source{}}, datastore.ErrInvalid},
		"own copy":         {datastore.Spec{ID: "x", Source: &datastore.Source{Volume: "x"}}, datastore.ErrInvalid},
		"no source volume": {datastore.Spec{ID: "x", Source: &datastore.Source{Volume: "none"}}, datastore.ErrNotFound},
		"no snapshot":      {datastore.Spec{ID: "x", Source: &datastore.Source{Snapshot: "none"}}, datastore.ErrNotFound},
		"smaller copy":     {datastore.Spec{ID: "x", Size: mib, Source: &datastore.Source{Snapshot: "s"}}, datastore.ErrShrink},
		"limited copy":     {datastore.Spec{ID: "x", Limit: mib, Source: &datastore.Source{Snapshot: "s"}}, datastore.ErrInvalid},
		"no class":         {datastore.Spec{ID: "x", Size: gib, Encryption: "none"}, datastore.ErrKey},
		"other size":       {datastore.Spec{ID: "v", Size: 2 * gib}, datastore.ErrExists},
		"other kind":       {datastore.Spec{ID: "v", Size: gib, Provisioning: datastore.Thick}, datastore.ErrExists},
		"other source":     {datastore.Spec{ID: "v", Source: &datastore.Source{Volume: "u"}}, datastore.ErrExists},
		"other class":      {datastore.Spec{ID: "v", Size: gib, Encryption: "gold"}, datastore.ErrExists},
	} {
		if _, err := b.s.Create(b.Context(), c.spec); err == nil {
			b.Errorf("%s was accepted", name)
		} else {
			b.fails(fmt.Errorf("%s: %w", name, err), c.want)
		}
	}
	attach := func(id, holder string, mode datastore.Mode) error {
		_, err := b.s.Attach(b.Context(), id, holder, mode)
		return err
	}
	b.fails(attach("none", "h", datastore.ReadWrite), datastore.ErrNotFound)
	b.fails(attach("v", "", datastore.ReadWrite), datastore.ErrInvalid)
	b.fails(attach("v", "h", "all"), datastore.ErrInvalid)
	b.fails(attach("v", "h", datastore.ReadWriteMany), datastore.ErrUnsupported)
	_, err := b.s.Snapshot(b.Context(), "t", "none", nil)
	b.fails(err, datastore.ErrNotFound)
	_, err = b.s.Snapshot(b.Context(), "s", "u", nil)
	b.fails(err, datastore.ErrExists)
	_, err = b.s.Expand(b.Context(), "none", gib, nil)
	b.fails(err, datastore.ErrNotFound)
	_, err = b.s.Rekey(b.Context(), "v")
	b.fails(err, datastore.ErrUnsupported)
	b.fails(b.s.Rewrap(b.Context(), datastore.Source{Volume: "v"}, "gold"), datastore.ErrUnsupported)
	b.fails(b.s.Rewrap(b.Context(), datastore.Source{Snapshot: "none"}, "gold"), datastore.ErrNotFound)
	if all := must(b.s.List(b.Context()))(b); len(all.Volumes) != 2 || len(all.Snapshots) != 1 {
		b.Errorf("%+v", all)
	}
	b.empty()
}

// attachments: one writer or many readers.
func attachments(b *bench) {
	b.create("v", gib)
	disk := must(b.s.Attach(b.Context(), "v", "a", datastore.ReadWrite))(b)
	if n := len(disk.Layers); n != 1 || disk.ReadOnly || disk.Layers[0].ReadOnly || disk.Size != gib || disk.Volume != "v" {
		b.Errorf("%+v", disk)
	}
	attach := func(holder string, mode datastore.Mode) error {
		_, err := b.s.Attach(b.Context(), "v", holder, mode)
		return err
	}
	b.fails(attach("b", datastore.ReadWrite), datastore.ErrAttached)
	b.fails(attach("b", datastore.ReadOnly), datastore.ErrAttached)
	b.fails(attach("a", datastore.ReadOnly), datastore.ErrAttached)
	b.fails(b.s.Delete(b.Context(), "v"), datastore.ErrAttached)
	_, err := b.s.Snapshot(b.Context(), "s", "v", nil)
	b.fails(err, datastore.ErrAttached)
	_, err = b.s.Create(b.Context(), datastore.Spec{ID: "w", Source: &datastore.Source{Volume: "v"}})
	b.fails(err, datastore.ErrAttached)
	_, err = b.s.Expand(b.Context(), "v", 2*gib, nil)
	b.fails(err, datastore.ErrAttached)
	b.ok(b.s.Detach(b.Context(), "v", "b")) // not a holder
	b.fails(attach("b", datastore.ReadWrite), datastore.ErrAttached)
	b.ok(b.s.Detach(b.Context(), "v", "a"))

	b.ok(attach("a", datastore.ReadOnly))
	b.ok(attach("b", datastore.ReadOnly))
	b.fails(attach("c", datastore.ReadWrite), datastore.ErrAttached)
	b.fails(b.s.Delete(b.Context(), "v"), datastore.ErrAttached)
	b.snapshot("s", "v") // nobody writes it
	disk = must(b.s.Attach(b.Context(), "v", "a", datastore.ReadOnly))(b)
	if err := b.open(disk, "read -P 0 0 1M"); err != nil || !disk.ReadOnly || !disk.Layers[len(disk.Layers)-1].ReadOnly {
		b.Errorf("%+v: %v", disk, err)
	}
	b.ok(b.s.Detach(b.Context(), "v", "a"))
	b.ok(b.s.Detach(b.Context(), "v", "b"))

	must(b.s.Create(b.Context(), datastore.Spec{ID: "many", Size: mib, Format: handover.FormatRaw}))(b)
	for _, holder := range []string{"a", "b"} {
		if disk := must(b.s.Attach(b.Context(), "many", holder, datastore.ReadWriteMany))(b); !disk.Shared {
			b.Errorf("%+v", disk)
		}
	}
	_, err = b.s.Snapshot(b.Context(), "t", "many", &live{})
	b.fails(err, datastore.ErrUnsupported)
	b.ok(b.s.Detach(b.Context(), "many", "a"))
	b.ok(b.s.Detach(b.Context(), "many", "b"))
	b.empty()
}

// concurrency: many callers at once, on the same and on different things.
func concurrency(b *bench) {
	b.create("base", gib)
	b.io("base", "write -P 1 0 1M")
	const callers = 8
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	for n := range callers {
		wg.Go(func() {
			id := fmt.Sprintf("v%d", n/2) // two callers each
			_, err := b.s.Create(b.Context(), datastore.Spec{ID: id, Source: &datastore.Source{Volume: "base"}})
			errs <- err
			if n%2 == 0 {
				_, err = b.s.Snapshot(b.Context(), "s"+id, id, nil)
				errs <- err
				_, err = b.s.Snapshot(b.Context(), fmt.Sprintf("base%d", n), "base", nil)
				errs <- err
			}
			_, err = b.s.List(b.Context())
			errs <- err
			errs <- b.s.Tidy(b.Context())
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		b.ok(err)
	}
	var holders sync.WaitGroup
	var mu sync.Mutex
	got := 0
	for n := range callers {
		holders.Go(func() {
			if _, err := b.s.Attach(b.Context(), "v0", fmt.Sprint(n), datastore.ReadWrite); err == nil {
				mu.Lock()
				defer mu.Unlock()
				got++
			}
		})
	}
	holders.Wait()
	if got != 1 {
		b.Errorf("%d writers", got)
	}
	v := must(b.s.Volume(b.Context(), "v0"))(b)
	b.ok(b.s.Detach(b.Context(), "v0", v.Attachments[0].Holder))
	for n := range callers / 2 {
		b.io(fmt.Sprintf("v%d", n), "read -P 1 0 1M")
	}
	b.empty()
}
