package store

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrCollecting says that a collection runs already.
var ErrCollecting = errors.New("a collection of the registry is running already; try again when it has ended")

// Options of a collection.
type Options struct {
	// DryRun only counts.
	DryRun bool
	// UntaggedAge is how long a manifest that no tag points to and nobody pulls is kept, 7 days when zero.
	UntaggedAge time.Duration
}

// Report is what a collection has removed, or would have.
type Report struct {
	DryRun    bool    `json:"dryRun,omitempty"`
	Manifests int     `json:"manifests"`
	Layers    int     `json:"layers"`
	Blobs     int     `json:"blobs"`
	Uploads   int     `json:"uploads"`
	Projects  int     `json:"projects"`
	Bytes     int64   `json:"bytes"`
	Seconds   float64 `json:"seconds"`
}

// collection is one run.
type collection struct {
	*Store
	ctx    context.Context
	opts   Options
	start  time.Time // what was used since then stays
	report Report
	live   map[string]struct{} // blobs with a link that stays
}

// Collect removes what nobody uses: manifests without a tag, links of layers that no manifest refers to, blobs without
// links, uploads that nobody goes on with, and projects whose namespace is gone. See the documentation of the package
// for why it may run at any time. Only what the disk says is not there counts as missing: when something cannot be read,
// nothing that may need it is removed, and the collection ends with the error.
func (s *Store) Collect(ctx context.Context, opts Options) (Report, error) {
	if !s.collecting.TryLock() {
		return Report{}, ErrCollecting
	}
	defer s.collecting.Unlock()
	if opts.UntaggedAge <= 0 {
		opts.UntaggedAge = defaultUntaggedAge
	}
	opts.UntaggedAge = max(opts.UntaggedAge, s.cfg.Grace)
	c := &collection{
		Store: s, ctx: ctx, opts: opts, start: s.heldSince(),
		report: Report{DryRun: opts.DryRun}, live: make(map[string]struct{}),
	}
	began := time.Now()
	err := c.run()
	c.report.Seconds = time.Since(began).Seconds()
	if err != nil {
		return c.report, fmt.Errorf("collecting what is unused in the registry: %w", err)
	}
	return c.report, nil
}

func (c *collection) run() error {
	if err := c.emptyTrash(); err != nil {
		return err
	}
	projects, err := c.Projects()
	if err != nil {
		return err
	}
	for _, p := range projects {
		err := c.eachRepository(p, func(repo string) error {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			return c.repository(repo)
		})
		if err != nil {
			return err
		}
	}
	if !c.opts.DryRun {
		// The links are gone from the disk before their blobs are.
		if err := c.sync(); err != nil {
			return err
		}
	}
	if err := c.sweep(); err != nil {
		return err
	}
	if !c.opts.DryRun {
		c.settle()
	}
	return nil
}

// emptyTrash removes projects that were put aside.
func (c *collection) emptyTrash() error {
	entries, err := os.ReadDir(c.trash())
	if err != nil {
		return err
	}
	for _, e := range entries {
		c.report.Projects++
		if c.opts.DryRun {
			continue
		}
		if err := os.RemoveAll(filepath.Join(c.trash(), e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// repository removes what a repository does not need, and notes what it does.
func (c *collection) repository(repo string) error {
	if err := c.uploads(repo); err != nil {
		return err
	}
	revisions, err := c.revisions(repo)
	if err != nil {
		return err
	}
	needed, layers, err := c.mark(repo, revisions)
	if err != nil {
		return err
	}
	for _, r := range revisions {
		if needed[r.digest] || !c.removeLink(repo, r, revision, c.opts.UntaggedAge) {
			if err := c.keep(c.revisionLink(repo, r.digest), r.digest); err != nil {
				return err
			}
			continue
		}
		c.report.Manifests++
	}
	links, err := c.links(c.repositories(repo, "_layers"))
	if err != nil {
		return err
	}
	for _, l := range links {
		if layers[l.digest] || !c.removeLink(repo, l, layer, c.cfg.Grace) {
			if err := c.keep(c.layerLink(repo, l.digest), l.digest); err != nil {
				return err
			}
			continue
		}
		c.report.Layers++
	}
	return nil
}

// keep notes that a blob has a link that stays. Names by other algorithms lead to a sha256.
func (c *collection) keep(link, digest string) error {
	if _, ok := keyOf(digest); !ok {
		target, err := os.ReadFile(link)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		digest = string(target)
	}
	c.live[digest] = struct{}{}
	return nil
}

// mark finds the manifests of a repository that are needed, and the layers they refer to: those with a tag, those that
// are young, what they list, and what has a needed one as its subject.
func (c *collection) mark(repo string, revisions []entry) (needed, layers map[string]bool, err error) {
	needed, layers = make(map[string]bool), make(map[string]bool)
	tags, err := c.Tags(repo)
	if err != nil {
		return nil, nil, err
	}
	var todo []string
	for _, t := range tags {
		todo = append(todo, t.Digest)
	}
	manifests, referrers := make(map[string]*Manifest, len(revisions)), make(map[string][]string)
	for _, r := range revisions {
		if c.start.Sub(r.used) < c.opts.UntaggedAge {
			todo = append(todo, r.digest)
		}
		m, _, err := c.Manifest(repo, r.digest)
		if errors.Is(err, fs.ErrNotExist) {
			c.cfg.Logger.Warn("manifest is missing", "repository", repo, "digest", r.digest)
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("manifest %s of %s: %w", r.digest, repo, err)
		}
		manifests[r.digest] = m
		if m.Subject != nil {
			referrers[m.Subject.Digest] = append(referrers[m.Subject.Digest], r.digest)
		}
	}
	for len(todo) > 0 {
		digest := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		m := manifests[digest]
		if needed[digest] || m == nil {
			continue
		}
		needed[digest] = true
		for _, b := range m.blobs() {
			layers[b] = true
		}
		for _, child := range m.Manifests {
			todo = append(todo, child.Digest)
		}
		todo = append(todo, referrers[digest]...)
	}
	return needed, layers, c.keepTargets(repo, layers)
}

// keepTargets adds the layers that needed names of other algorithms lead to.
func (c *collection) keepTargets(repo string, layers map[string]bool) error {
	var targets []string
	for digest := range layers {
		if _, ok := keyOf(digest); ok {
			continue
		}
		target, err := os.ReadFile(c.layerLink(repo, digest))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		targets = append(targets, string(target))
	}
	for _, t := range targets {
		layers[t] = true
	}
	return nil
}

// removeLink removes a link that is still as old as it has to be, and says whether it did. Age counts to the start of the
// collection: what was used since then was perhaps not seen when the manifests were read.
func (c *collection) removeLink(repo string, e entry, k kind, age time.Duration) bool {
	defer c.lock(e.digest)()
	link := c.layerLink(repo, e.digest)
	if k == revision {
		link = c.revisionLink(repo, e.digest)
	}
	info, err := os.Stat(link)
	if err != nil || c.start.Sub(info.ModTime()) < age {
		return false
	}
	if c.opts.DryRun {
		return true
	}
	if err := os.RemoveAll(filepath.Dir(link)); err != nil {
		c.cfg.Logger.Warn("link cannot be removed", "link", link, "error", err)
		return false
	}
	project, _, _ := strings.Cut(repo, "/")
	c.unlink(project, e.digest)
	return true
}

// uploads removes the uploads of a repository that nobody has gone on with.
func (c *collection) uploads(repo string) error {
	dir := c.repositories(repo, "_uploads")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	project, _, _ := strings.Cut(repo, "/")
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if time.Since(newest(path)) < c.cfg.UploadAge {
			continue
		}
		c.report.Uploads++
		if info, err := os.Stat(filepath.Join(path, "data")); err == nil {
			c.report.Bytes += info.Size()
		}
		if c.opts.DryRun {
			continue
		}
		if err := c.end(project, repo+"/"+e.Name(), func() error { return os.RemoveAll(path) }); err != nil {
			return err
		}
	}
	return nil
}

// newest is when something in a directory was last changed.
func newest(dir string) time.Time {
	var at time.Time
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it has just gone
		}
		if info, err := d.Info(); err == nil && info.ModTime().After(at) {
			at = info.ModTime()
		}
		return nil
	})
	return at
}

func (c *collection) sync() error {
	f, err := os.Open(c.cfg.Dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// sweep removes blobs without links.
func (c *collection) sweep() error {
	return filepath.WalkDir(c.base("blobs"), func(path string, d fs.DirEntry, err error) error {
		if ctxErr := c.ctx.Err(); ctxErr != nil {
			return ctxErr
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		if strings.HasSuffix(d.Name(), ".tmp") {
			return c.removeBlob(path, filepath.Base(filepath.Dir(path)), path)
		}
		at := parse(strings.TrimPrefix(path, c.cfg.Dir))
		if _, live := c.live[at.digest]; live || at.kind != blobData {
			return nil
		}
		return c.removeBlob(path, at.digest, filepath.Dir(path))
	})
}

// settle has projects not pay any more for blobs that are gone, or that somebody has a link of.
func (c *collection) settle() {
	c.mu.Lock()
	all := slices.Collect(maps.Values(c.projects))
	c.mu.Unlock()
	for _, p := range all {
		p.mu.Lock()
		for k := range p.loose {
			digest := "sha256:" + hex.EncodeToString(k[:])
			_, live := c.live[digest]
			if _, err := os.Stat(c.blobPath(digest)); live || errors.Is(err, fs.ErrNotExist) {
				p.settle(k)
			}
		}
		p.mu.Unlock()
	}
}

// removeBlob removes target if the file path is still as old as it has to be.
func (c *collection) removeBlob(path, digest, target string) error {
	defer c.lock(digest)()
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || c.start.Sub(info.ModTime()) < c.cfg.Grace {
		return err
	}
	c.report.Blobs++
	c.report.Bytes += info.Size()
	if c.opts.DryRun {
		return nil
	}
	return os.RemoveAll(target)
}
