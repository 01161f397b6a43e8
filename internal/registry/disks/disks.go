// Package disks finds disks of virtual machines among the images and artifacts of a registry's projects.
//
// A disk is a container image with the file below /disk in one of its top layers (KubeVirt's containerDisk), or an
// artifact that has it as a blob whose title ends as the names of disks do. To tell a containerDisk from other images
// the first file of each of its layers is looked at; nothing is unpacked, and what was found is kept by digest. It does
// not say that the disk is sound: who imports it does.
//
// internal/registry calls it. What clients have pushed is hostile: what is read of it is bounded. What can go wrong: the
// disk of the registry fails.
package disks

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/registry/store"
)

// Disk is a tag that is one.
type Disk struct {
	// Repository without the project, Tag, and the digest that the tag points to.
	Repository, Tag, Digest string
	Pushed                  time.Time
	// What the manifest says of it; empty where it says nothing.
	Firmware, OSID, OSType, OSVersion, Description string
}

// Store is what there is to look at. *store.Store is one.
type Store interface {
	Repositories(project string) ([]store.Repository, error)
	Manifest(repo, digest string) (*store.Manifest, int64, error)
	Blob(repo, digest string) (*os.File, error)
}

// Finder finds disks.
type Finder struct {
	store Store

	mu    sync.Mutex // guards known and used
	known map[string]*list.Element
	used  *list.List // of *known, what was used last first
}

// known is what is known of a digest: nil is no disk.
type known struct {
	digest string
	disk   *Disk
}

const (
	// maxTags is how many tags of a project are looked at, the newest. maxKnown is how many digests are remembered: some
	// projects with as many tags as they like do not have all others read again each time.
	maxTags  = 4096
	maxKnown = 4 * maxTags
	// maxLayers is how many layers of an image are looked at, from the top down.
	maxLayers = 4
	// maxText is how long what a manifest says may be.
	maxText = 200
)

// NewFinder makes a finder.
func NewFinder(s Store) *Finder {
	return &Finder{store: s, known: map[string]*list.Element{}, used: list.New()}
}

// Find returns the disks of a project, by repository and tag, and how many of its older tags it did not look at. A
// manifest that cannot be read is none.
func (f *Finder) Find(ctx context.Context, project string) (out []Disk, unseen int, err error) {
	tags, unseen, err := f.newest(project)
	if err != nil {
		return nil, 0, err
	}
	for _, t := range tags {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		d, err := f.look(t.repo, t.Digest)
		if err != nil {
			return nil, 0, fmt.Errorf("looking at %s:%s: %w", t.repo, t.Name, err)
		}
		if d == nil {
			continue
		}
		found := *d
		found.Repository, found.Tag, found.Digest, found.Pushed = strings.TrimPrefix(t.repo, project+"/"), t.Name, t.Digest, t.Pushed
		out = append(out, found)
	}
	slices.SortFunc(out, func(a, b Disk) int {
		return strings.Compare(a.Repository+":"+a.Tag, b.Repository+":"+b.Tag)
	})
	return out, unseen, nil
}

// tagged is a tag of a repository.
type tagged struct {
	store.Tag
	repo string
}

// newest are the newest tags of a project, and how many more it has.
func (f *Finder) newest(project string) (tags []tagged, more int, err error) {
	repositories, err := f.store.Repositories(project)
	if err != nil {
		return nil, 0, err
	}
	for _, repo := range repositories {
		for _, t := range repo.Tags {
			tags = append(tags, tagged{t, repo.Name})
		}
	}
	if len(tags) <= maxTags {
		return tags, 0, nil
	}
	slices.SortStableFunc(tags, func(a, b tagged) int { return b.Pushed.Compare(a.Pushed) })
	return tags[:maxTags], len(tags) - maxTags, nil
}

// look tells whether a manifest is a disk, from memory if it was asked before: a digest never changes.
func (f *Finder) look(repo, digest string) (*Disk, error) {
	if d, ok := f.recall(digest); ok {
		return d, nil
	}
	d, err := f.read(repo, digest)
	if errors.Is(err, fs.ErrNotExist) { // it goes while we look
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f.remember(digest, d)
	return d, nil
}

func (f *Finder) recall(digest string) (d *Disk, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.known[digest]
	if !ok {
		return nil, false
	}
	f.used.MoveToFront(e)
	return e.Value.(*known).disk, true
}

// remember forgets for it what was not used for longest.
func (f *Finder) remember(digest string, d *Disk) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.known[digest]; ok {
		return
	}
	f.known[digest] = f.used.PushFront(&known{digest, d})
	if f.used.Len() > maxKnown {
		delete(f.known, f.used.Remove(f.used.Back()).(*known).digest)
	}
}

// read looks at a manifest, or in an index at that for this architecture.
func (f *Finder) read(repo, digest string) (*Disk, error) {
	m, _, err := f.store.Manifest(repo, digest)
	if err == nil && len(m.Manifests) > 0 {
		child := own(m.Manifests)
		if child == "" {
			return nil, nil
		}
		m, _, err = f.store.Manifest(repo, child)
	}
	if isPath(err) {
		return nil, err
	}
	if err != nil || len(m.Manifests) > 0 {
		return nil, nil //nolint:nilerr // what is no manifest is no disk
	}
	found := isArtifact(m)
	if isImage(m) {
		if found, err = f.inLayers(repo, m.Layers); err != nil {
			return nil, err
		}
	}
	if !found {
		return nil, nil
	}
	d := &Disk{
		OSID: text(m.Annotations[api.ManifestOSID]), OSType: text(m.Annotations[api.ManifestOSType]),
		OSVersion: text(m.Annotations[api.ManifestOSVersion]), Description: text(m.Annotations[api.ManifestDescription]),
	}
	if firmware := m.Annotations[api.ManifestFirmware]; firmware == "bios" || firmware == "efi" {
		d.Firmware = firmware
	}
	return d, nil
}

// isPath recognises errors of the file system.
func isPath(err error) bool {
	_, ok := errors.AsType[*fs.PathError](err)
	return ok
}

// own is the manifest of an index for this architecture.
func own(manifests []store.Descriptor) string {
	for _, m := range manifests {
		if p := m.Platform; p == nil && len(manifests) == 1 || p != nil && p.OS == "linux" && p.Architecture == runtime.GOARCH {
			return m.Digest
		}
	}
	return ""
}

// isImage tells a container image.
func isImage(m *store.Manifest) bool {
	return m.Config != nil && slices.Contains([]string{
		"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json",
	}, m.Config.MediaType)
}

// isArtifact tells an artifact whose one disk is known by its title.
func isArtifact(m *store.Manifest) bool {
	if isImage(m) {
		return false
	}
	n := 0
	for _, l := range m.Layers {
		if isDiskName(l.Annotations["org.opencontainers.image.title"]) {
			n++
		}
	}
	return n == 1
}

// isDiskName tells names of disks, perhaps compressed.
func isDiskName(name string) bool {
	name = strings.ToLower(name)
	for _, packed := range []string{".gz", ".xz", ".zst"} {
		if plain, ok := strings.CutSuffix(name, packed); ok {
			name = plain
			break
		}
	}
	return slices.Contains([]string{".qcow2", ".qcow", ".img", ".raw", ".iso", ".vmdk", ".vhd", ".vhdx", ".ova"}, path.Ext(name))
}

// inLayers tells whether one of the top layers of an image has a disk.
func (f *Finder) inLayers(repo string, layers []store.Descriptor) (bool, error) {
	for n, l := range slices.Backward(layers) {
		if len(layers)-n > maxLayers {
			break
		}
		found, err := f.inLayer(repo, l.Digest)
		if err != nil || found {
			return found, err
		}
	}
	return false, nil
}

func (f *Finder) inLayer(repo, digest string) (bool, error) {
	blob, err := f.store.Blob(repo, digest)
	if errors.Is(err, fs.ErrNotExist) { // layers that are not distributed, for one
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer blob.Close()
	found, err := hasDisk(blob)
	if isPath(err) {
		return false, err
	}
	return found && err == nil, nil
}

// text bounds what a manifest says.
func text(s string) string {
	if len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return s
}
