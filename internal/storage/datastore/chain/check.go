package chain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sort"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// graph is how to open layers.
func (o *op) graph(layers []Layer) []handover.Layer {
	out := make([]handover.Layer, 0, len(layers))
	for _, l := range layers {
		out = append(out, o.place.Images().Locate(l))
	}
	return out
}

// setBacking names the layer below in a header that names one.
func setBacking(f File, below Layer) error {
	if h, err := qcow2.Read(f); err == nil && h.Backing == "" {
		return nil
	}
	switch err := qcow2.SetBacking(f, ImageName(below), below.Format); {
	case errors.Is(err, qcow2.ErrFormat), errors.Is(err, qcow2.ErrFeature):
		return fmt.Errorf("%w: %w", datastore.ErrCorrupt, err)
	case err != nil:
		return NoSpace(err)
	}
	return nil
}

// checked is one image and who needs it.
type checked struct {
	layer  Layer
	below  []Layer
	users  []*record
	inUse  bool // open for writing
	making bool // need not exist
}

// Check reads every record and image and reports what is wrong. It takes no locks for longer than a moment, so
// what is made or removed meanwhile may show as unfinished.
func (s *Store) Check(ctx context.Context, progress func(done, total int)) (datastore.Report, error) {
	var report datastore.Report
	var todo []*checked
	err := s.run(ctx, func(o *op) error {
		return o.locked(func() error {
			records, damaged, err := o.readAll()
			if err != nil {
				return err
			}
			reportRecords(&report, records, damaged)
			todo = imagesOf(records)
			return o.orphans(&report, records, len(damaged) == 0)
		})
	})
	if err != nil {
		return datastore.Report{}, fmt.Errorf("checking the datastore: %w", err)
	}
	for n, c := range todo {
		if progress != nil {
			progress(n, len(todo))
		}
		var found []datastore.Problem
		err := s.run(ctx, func(o *op) error {
			var err error
			found, err = o.checkImage(c)
			return err
		})
		if err != nil {
			return report, fmt.Errorf("checking the datastore: %w", err)
		}
		report.Images++
		report.Problems = append(report.Problems, found...)
	}
	if progress != nil {
		progress(len(todo), len(todo))
	}
	return report, nil
}

// reportRecords reports records that are damaged or not finished.
func reportRecords(report *datastore.Report, records []*record, damaged map[string]error) {
	for _, name := range slices.Sorted(maps.Keys(damaged)) {
		report.Problems = append(report.Problems, datastore.Problem{Kind: datastore.ProblemRecord, Path: name + ".json", Text: damaged[name].Error()})
	}
	for _, r := range records {
		text := ""
		switch {
		case r.State != datastore.StateReady:
			text = "is " + string(r.State)
		case r.Pending != nil:
			text = "gets a new layer"
		case r.Rekey != "":
			text = "gets a new key"
		case len(r.Doomed) > 0:
			text = "has layers that are to be removed"
		default:
			continue
		}
		p := datastore.Problem{Kind: datastore.ProblemUnfinished, Text: fmt.Sprintf("%s %s", r.ID, text)}
		concern(&p, r)
		report.Problems = append(report.Problems, p)
	}
}

// concern adds a record to those concerned.
func concern(p *datastore.Problem, r *record) {
	if r.Kind == Volumes {
		p.Volumes = append(p.Volumes, r.ID)
	} else {
		p.Snapshots = append(p.Snapshots, r.ID)
	}
}

// imagesOf returns every image once, sorted by id.
func imagesOf(records []*record) []*checked {
	all := map[string]*checked{}
	for _, r := range records {
		if r.State == datastore.StateDeleting {
			continue
		}
		_, open := r.writer()
		layers := slices.Clone(r.Layers)
		if r.Pending != nil {
			layers = append(layers, r.Pending.Layer)
		}
		for i, l := range layers {
			c := all[l.ID]
			if c == nil {
				c = &checked{layer: l, below: layers[:i]}
				all[l.ID] = c
			}
			c.users = append(c.users, r)
			c.inUse = c.inUse || open && i >= len(r.Layers)-1
			c.making = c.making || r.State == datastore.StateCreating || i >= len(r.Layers)
		}
	}
	out := slices.Collect(maps.Values(all))
	sort.Slice(out, func(i, j int) bool { return out[i].layer.ID < out[j].layer.ID })
	return out
}

// checkImage looks at one image. An error is one of the datastore, not of the image.
func (o *op) checkImage(c *checked) ([]datastore.Problem, error) {
	p := datastore.Problem{Path: o.where(c.layer)}
	for _, r := range c.users {
		concern(&p, r)
	}
	problem := func(kind datastore.ProblemKind, format string, args ...any) ([]datastore.Problem, error) {
		p.Kind, p.Text = kind, fmt.Sprintf(format, args...)
		return []datastore.Problem{p}, nil
	}
	switch err := o.look(c.layer, c.below); {
	case errors.Is(err, fs.ErrNotExist) && !c.making && o.needed(c):
		return problem(datastore.ProblemMissing, "the image is missing")
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, errForeign):
		return problem(datastore.ProblemForeign, "%v", err)
	case errors.Is(err, datastore.ErrCorrupt):
		return problem(datastore.ProblemCorrupt, "%v", err)
	case err != nil:
		return nil, err
	case c.layer.Format == handover.FormatRaw:
		return nil, nil
	case c.inUse:
		return problem(datastore.ProblemUnchecked, "the image is open for writing; only its header was checked")
	}
	secrets := qemuimg.Secrets{}
	if key := c.layer.Key; key != "" {
		passphrase, err := o.unwrap(key, c.users[0].Keys[key])
		if err != nil {
			return problem(datastore.ProblemKeyMissing, "%v", err)
		}
		secrets[key] = passphrase
	}
	o.away()
	found, err := o.qemu.Check(o.ctx, o.place.Images().Locate(c.layer), secrets)
	o.tick()
	switch {
	case err != nil && o.ctx.Err() != nil, errors.Is(err, qemuimg.ErrMissing):
		return nil, err
	case errors.Is(err, qemuimg.ErrLocked):
		return problem(datastore.ProblemUnchecked, "the image is open for writing; only its header was checked")
	case errors.Is(err, qemuimg.ErrSecret):
		return problem(datastore.ProblemKeyMissing, "%v", err)
	case err != nil && !o.needed(c):
		return nil, nil
	case err != nil:
		return problem(datastore.ProblemCorrupt, "%v", err)
	case found.Corruptions > 0 || found.Errors > 0:
		return problem(datastore.ProblemCorrupt, "%d damaged entries, %d that could not be checked", found.Corruptions, found.Errors)
	case found.Leaks > 0:
		return problem(datastore.ProblemLeak, "%d clusters are taken for nothing", found.Leaks)
	}
	return nil, nil
}

// needed tells whether a record still names the image: it may have gone since the records were read.
func (o *op) needed(c *checked) bool {
	return slices.ContainsFunc(c.users, func(r *record) bool {
		now, err := o.find(r.Kind, r.ID)
		return err != nil || now != nil && slices.ContainsFunc(now.Layers, func(l Layer) bool { return l.ID == c.layer.ID })
	})
}

// orphans reports what no record names. With a record that cannot be read, no image can be said to be an orphan.
func (o *op) orphans(report *datastore.Report, records []*record, complete bool) error {
	strays := map[string]int64{}
	if complete {
		var err error
		if strays, err = o.strays(records); err != nil {
			return err
		}
	}
	for _, k := range Kinds() {
		_, among, err := o.place.List(k)
		if err != nil {
			return err
		}
		for _, path := range among {
			strays[path] = 0
		}
	}
	for _, path := range slices.Sorted(maps.Keys(strays)) {
		report.Problems = append(report.Problems, datastore.Problem{Kind: datastore.ProblemOrphan, Path: path, Text: "no record names this", Bytes: strays[path]})
	}
	return nil
}

// strays returns images that none of the records names, and none that was written since they were read.
func (o *op) strays(records []*record) (map[string]int64, error) {
	found, err := o.place.Images().Strays(known(records))
	if err != nil || len(found) == 0 {
		return found, err
	}
	now, damaged, err := o.readAll()
	if err != nil || len(damaged) > 0 {
		return map[string]int64{}, err
	}
	still, err := o.place.Images().Strays(known(now))
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(found, func(path string, _ int64) bool { _, stray := still[path]; return !stray })
	return found, nil
}

// known are all images that records name, by id.
func known(records []*record) map[string]Layer {
	out := map[string]Layer{}
	for _, r := range records {
		for _, l := range r.images() {
			out[l.ID] = l
		}
	}
	return out
}
