package namespacebounds

import (
	"path"
	"strings"

	"github.com/distribution/reference"
)

// imageAllowed tells whether one of the patterns matches an image. A pattern with a tag or digest is held against the
// whole reference, another against the repository. Both the name as written and the full one count. An image that is no
// reference is never allowed, nor an ID: it names what a host happens to have, whoever may use that.
func imageAllowed(patterns []string, image string) bool {
	if isID(image) {
		return false
	}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return false
	}
	repositories := []string{named.Name(), reference.FamiliarName(named)}
	full := reference.TagNameOnly(named)
	references := []string{full.String(), reference.FamiliarString(full)}
	for _, p := range patterns {
		against := repositories
		if hasTag(p) {
			against = references
		}
		for _, name := range against {
			if match(strings.Split(p, "/"), strings.Split(name, "/")) {
				return true
			}
		}
	}
	return false
}

// isID tells whether containerd may take an image for an ID, whole or only its beginning, rather than for a reference.
// Bare hexadecimal numbers get a tag from the kubelet, or are no reference where they have all 64 digits.
func isID(image string) bool {
	algorithm, _, _ := strings.Cut(image, ":")
	switch strings.ToLower(algorithm) {
	case "sha256", "sha384", "sha512":
		return true
	}
	return false
}

// hasTag tells whether a pattern is about more than the repository: it has a digest, or a colon that is not that of a
// port.
func hasTag(pattern string) bool {
	last := pattern[strings.LastIndexByte(pattern, '/')+1:]
	return strings.ContainsAny(last, ":@")
}

// match is path.Match by segments, where the segment ** stands for any number of them. It takes time in proportion to
// the product of both lengths.
func match(pattern, name []string) bool {
	reach := make([]bool, len(name)+1) // which prefixes of name the pattern so far matches
	reach[0] = true
	for _, p := range pattern {
		next := make([]bool, len(name)+1)
		for i, ok := range reach {
			switch {
			case p == "**" && (ok || i > 0 && next[i-1]):
				next[i] = true
			case p != "**" && i > 0 && reach[i-1]:
				matched, err := path.Match(p, name[i-1])
				next[i] = err == nil && matched
			}
		}
		reach = next
	}
	return reach[len(name)]
}
