// Package image builds OCI images from recipes, without Docker and without a
// registry: files come from Debian packages, Go and C programs and the recipe's
// own directory, and the result is an OCI archive that containerd imports.
//
// A recipe is a directory with an image.yaml (type Recipe). Packages are
// resolved and verified by apt with a private state directory, so nothing is
// installed on the host and no root is needed; they are unpacked without their
// maintainer scripts. What those scripts would create from static data (the
// merged /usr, passwd and group, nsswitch.conf, the certificate bundle) the
// builder creates itself.
//
// The output is deterministic: same recipe, packages, sources and compiler give
// the same bytes. It is cached by a hash of these.
//
// It is not a runtime or a registry client, and it does not load images into a
// node. `atoll image build` and guestos/cmd/mkimage call it.
//
// What can go wrong: a recipe with an unknown or invalid field (the error names
// the file and the field), apt without a usable mirror, a program that does not
// compile, a full disk. A failed build leaves no archive behind.
package image
