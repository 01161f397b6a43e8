package store

import (
	"path/filepath"
	"strings"
)

// prefix is where distribution keeps everything below the root of its driver.
const prefix = "/docker/registry/v2"

// kind is what a path of the driver is.
type kind int

const (
	other    kind = iota
	blobData      // blobs/sha256/ab/<hex>/data
	layer         // repositories/<name>/_layers/sha256/<hex>/link
	revision      // repositories/<name>/_manifests/revisions/sha256/<hex>/link
	tag           // anything below repositories/<name>/_manifests/tags/<tag>
	upload        // anything below repositories/<name>/_uploads/<id>
)

// place is a path taken apart.
type place struct {
	kind    kind
	repo    string
	project string
	digest  string // algorithm:hex, of blobData, layer and revision
	tag     string
	upload  string // <name>/<id>
	data    bool   // of an upload: the file with its bytes
	whole   bool   // of an upload or a tag: all of it
}

// parse takes a path of the driver apart.
func parse(path string) place {
	parts := strings.Split(strings.TrimPrefix(path, prefix+"/"), "/")
	if !strings.HasPrefix(path, prefix+"/") || len(parts) < 3 {
		return place{}
	}
	switch parts[0] {
	case "blobs":
		if len(parts) == 5 && parts[4] == "data" {
			return place{kind: blobData, digest: parts[1] + ":" + parts[3]}
		}
		return place{}
	case "repositories":
		return parseRepository(parts[1:])
	}
	return place{}
}

func parseRepository(parts []string) place {
	n := 0
	for n < len(parts) && !strings.HasPrefix(parts[n], "_") {
		n++
	}
	if n == 0 || n == len(parts) {
		return place{}
	}
	p := place{repo: strings.Join(parts[:n], "/"), project: parts[0]}
	switch rest := parts[n:]; {
	case rest[0] == "_layers" && len(rest) == 4 && rest[3] == "link":
		p.kind, p.digest = layer, rest[1]+":"+rest[2]
	case rest[0] == "_manifests" && len(rest) == 5 && rest[1] == "revisions" && rest[4] == "link":
		p.kind, p.digest = revision, rest[2]+":"+rest[3]
	case rest[0] == "_manifests" && len(rest) >= 3 && rest[1] == "tags":
		p.kind, p.tag, p.whole = tag, rest[2], len(rest) == 3
	case rest[0] == "_uploads" && len(rest) >= 2:
		p.kind, p.upload = upload, p.repo+"/"+rest[1]
		p.whole, p.data = len(rest) == 2, len(rest) == 3 && rest[2] == "data"
	}
	return p
}

// Paths on disk.
func (s *Store) base(elem ...string) string {
	return filepath.Join(append([]string{s.cfg.Dir, prefix}, elem...)...)
}

func (s *Store) repositories(name ...string) string {
	return s.base(append([]string{"repositories"}, name...)...)
}

func (s *Store) blobPath(digest string) string {
	algorithm, hex, _ := strings.Cut(digest, ":")
	if len(hex) < 2 {
		return s.base("blobs", "none")
	}
	return s.base("blobs", algorithm, hex[:2], hex, "data")
}

func (s *Store) layerLink(repo, digest string) string {
	algorithm, hex, _ := strings.Cut(digest, ":")
	return s.repositories(repo, "_layers", algorithm, hex, "link")
}

func (s *Store) revisionLink(repo, digest string) string {
	algorithm, hex, _ := strings.Cut(digest, ":")
	return s.repositories(repo, "_manifests", "revisions", algorithm, hex, "link")
}
