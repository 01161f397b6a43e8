package store

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// MaxManifest is how many bytes a manifest may have.
const MaxManifest = 4 << 20

// Descriptor is what manifests say of what they refer to.
type Descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	URLs         []string          `json:"urls,omitempty"`
	Platform     *Platform         `json:"platform,omitempty"`
}

// Platform is what an image of an index is for.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
}

// Manifest is what the registry looks at in a manifest or an index.
type Manifest struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType"`
	Config       *Descriptor       `json:"config"`
	Layers       []Descriptor      `json:"layers"`
	Manifests    []Descriptor      `json:"manifests"`
	Subject      *Descriptor       `json:"subject"`
	Annotations  map[string]string `json:"annotations"`
}

// Kind is the type of an artifact: what it says itself, or the media type of its configuration.
func (m *Manifest) Kind() string {
	if m.ArtifactType == "" && m.Config != nil {
		return m.Config.MediaType
	}
	return m.ArtifactType
}

// blobs are the digests of what an image consists of.
func (m *Manifest) blobs() []string {
	var out []string
	if m.Config != nil {
		out = append(out, m.Config.Digest)
	}
	for _, l := range m.Layers {
		out = append(out, l.Digest)
	}
	return out
}

// Elsewhere is the digest of something that is to be had at another place, "" if there is none.
func (m *Manifest) Elsewhere() string {
	all := slices.Concat(m.Layers, m.Manifests)
	if m.Config != nil {
		all = append(all, *m.Config)
	}
	for _, d := range all {
		if len(d.URLs) > 0 {
			return d.Digest
		}
	}
	return ""
}

// Tag is one tag of a repository.
type Tag struct {
	Name   string    `json:"name"`
	Digest string    `json:"digest"`
	Pushed time.Time `json:"pushed"`
}

// Repository is one repository with its tags, the newest first.
type Repository struct {
	// Name with the project.
	Name      string `json:"name"`
	Tags      []Tag  `json:"tags"`
	Manifests int    `json:"manifests"`
}

// Manifest reads a manifest of a repository. It does not count as a use.
func (s *Store) Manifest(repo, digest string) (*Manifest, int64, error) {
	if _, err := os.Stat(s.revisionLink(repo, digest)); err != nil {
		return nil, 0, err
	}
	f, err := os.Open(s.blobPath(digest))
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxManifest+1))
	if err != nil {
		return nil, 0, err
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, 0, fmt.Errorf("manifest %s of %s: %w", digest, repo, err)
	}
	return &m, int64(len(data)), nil
}

// Blob opens a layer of a repository. It does not count as a use.
func (s *Store) Blob(repo, digest string) (*os.File, error) {
	if _, err := os.Stat(s.layerLink(repo, digest)); err != nil {
		return nil, err
	}
	return os.Open(s.blobPath(digest))
}

// Needs tells whether a manifest is another one or lists it, itself or by way of other indexes.
func (s *Store) Needs(repo, digest, other string) (bool, error) {
	todo, seen := []string{digest}, map[string]bool{digest: true}
	for i := 0; i < len(todo); i++ {
		if todo[i] == other {
			return true, nil
		}
		m, _, err := s.Manifest(repo, todo[i])
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("manifest %s of %s: %w", todo[i], repo, err)
		}
		for _, child := range m.Manifests {
			if !seen[child.Digest] {
				seen[child.Digest] = true
				todo = append(todo, child.Digest)
			}
		}
	}
	return false, nil
}

// Tags of a repository, the newest first. One that is half made is left out; one that cannot be read is an error.
func (s *Store) Tags(repo string) ([]Tag, error) {
	dir := s.repositories(repo, "_manifests", "tags")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing tags of %s: %w", repo, err)
	}
	var out []Tag
	for _, e := range entries {
		t, ok, err := s.Tag(repo, e.Name())
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b Tag) int {
		return cmp.Or(b.Pushed.Compare(a.Pushed), strings.Compare(b.Name, a.Name))
	})
	return out, nil
}

// Tag reads one tag. It is an error, and not missing, when the disk does not say.
func (s *Store) Tag(repo, name string) (tag Tag, ok bool, err error) {
	link := s.repositories(repo, "_manifests", "tags", name, "current", "link")
	info, err := os.Stat(link)
	if err == nil {
		var digest []byte
		if digest, err = os.ReadFile(link); err == nil {
			return Tag{Name: name, Digest: string(digest), Pushed: info.ModTime()}, true, nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return Tag{}, false, nil
	}
	return Tag{}, false, fmt.Errorf("reading tag %s:%s: %w", repo, name, err)
}

// Untag removes a tag if it still is what the caller has seen.
func (s *Store) Untag(repo string, seen Tag) error {
	defer s.lock(repo + ":" + seen.Name)()
	if now, ok, err := s.Tag(repo, seen.Name); err != nil || !ok || !now.Pushed.Equal(seen.Pushed) || now.Digest != seen.Digest {
		return err
	}
	if err := os.RemoveAll(s.repositories(repo, "_manifests", "tags", seen.Name)); err != nil {
		return fmt.Errorf("removing tag %s:%s: %w", repo, seen.Name, err)
	}
	return nil
}

// Repositories of a project that have a manifest, by name.
func (s *Store) Repositories(project string) ([]Repository, error) {
	var out []Repository
	err := s.eachRepository(project, func(repo string) error {
		revisions, err := s.revisions(repo)
		if err != nil || len(revisions) == 0 {
			return err
		}
		tags, err := s.Tags(repo)
		if err != nil {
			return err
		}
		out = append(out, Repository{Name: repo, Tags: tags, Manifests: len(revisions)})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing repositories of %s: %w", project, err)
	}
	slices.SortFunc(out, func(a, b Repository) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// eachRepository calls do with the name of every directory of a project that is a repository.
func (s *Store) eachRepository(project string, do func(repo string) error) error {
	root := s.repositories()
	return filepath.WalkDir(filepath.Join(root, project), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		if strings.HasPrefix(d.Name(), "_") {
			return fs.SkipDir
		}
		for _, sub := range []string{"_manifests", "_layers", "_uploads"} {
			_, err := os.Stat(filepath.Join(path, sub))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			repo, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			return do(repo)
		}
		return nil
	})
}

// entry is a link and its age.
type entry struct {
	digest string
	used   time.Time
}

// revisions are the manifests of a repository.
func (s *Store) revisions(repo string) ([]entry, error) {
	return s.links(s.repositories(repo, "_manifests", "revisions"))
}

// links reads the links below a directory that are there as algorithm/hex/link.
func (s *Store) links(dir string) ([]entry, error) {
	var out []entry
	algorithms, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, a := range algorithms {
		hexes, err := os.ReadDir(filepath.Join(dir, a.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went with its repository meanwhile
		}
		if err != nil {
			return nil, err
		}
		for _, h := range hexes {
			info, err := os.Stat(filepath.Join(dir, a.Name(), h.Name(), "link"))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			out = append(out, entry{digest: a.Name() + ":" + h.Name(), used: info.ModTime()})
		}
	}
	return out, nil
}

// Referrers are the manifests of a repository whose subject is digest.
func (s *Store) Referrers(repo, digest string) ([]Descriptor, error) {
	revisions, err := s.revisions(repo)
	if err != nil {
		return nil, fmt.Errorf("listing manifests of %s: %w", repo, err)
	}
	out := []Descriptor{}
	for _, r := range revisions {
		m, n, err := s.Manifest(repo, r.digest)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("listing manifests of %s: %w", repo, err)
		}
		if err != nil || m.Subject == nil || m.Subject.Digest != digest {
			continue
		}
		out = append(out, Descriptor{MediaType: m.MediaType, Digest: r.digest, Size: n, ArtifactType: m.Kind(), Annotations: m.Annotations})
	}
	slices.SortFunc(out, func(a, b Descriptor) int { return strings.Compare(a.Digest, b.Digest) })
	return out, nil
}
