package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// RecipeFile is the name of the recipe inside its directory.
const RecipeFile = "image.yaml"

// Recipe says what an image holds and which names it answers to. Paths inside
// the image are absolute. Sources are relative to the recipe's directory. A Recipe comes from Load or Parse.
type Recipe struct {
	// Names are full references, registry and tag included. Each becomes an
	// image of its own with the same layers, so that a pod's status shows the
	// name that the pod asked for.
	Names []string `yaml:"names"`
	// Debian lists packages, installed with their dependencies but without
	// recommended packages and without maintainer scripts.
	Debian []string `yaml:"debian"`
	// Keep switches off the removal of "docs" or "locales" of the packages.
	Keep []string `yaml:"keep"`

	Go          []GoProgram  `yaml:"go"`
	C           []CProgram   `yaml:"c"`
	Groups      []Group      `yaml:"groups"`
	Users       []User       `yaml:"users"`
	Directories []Directory  `yaml:"directories"`
	Files       []File       `yaml:"files"`
	Symlinks    []Symlink    `yaml:"symlinks"`
	Permissions []Permission `yaml:"permissions"`
	// Registry stores other recipes' images in the image, as the files of a
	// read-only registry.
	Registry []RegistryEntry `yaml:"registry"`
	// Remove lists paths and glob patterns that are dropped, with what is
	// below them, before anything but the packages is added.
	Remove []string `yaml:"remove"`
	Config Config   `yaml:"config"`

	dir string // directory of the recipe
	raw []byte // as written; part of the cache key
}

// GoProgram is a main package that is linked statically.
type GoProgram struct {
	Package string   `yaml:"package"` // import path, or ./path below the module
	Module  string   `yaml:"module"`  // directory whose go.mod is used; default: the recipe's
	Output  string   `yaml:"output"`
	Mode    Mode     `yaml:"mode"` // default 0755
	LDFlags []string `yaml:"ldflags"`
}

// CProgram is a C file that is compiled and linked statically.
type CProgram struct {
	Source string   `yaml:"source"`
	Output string   `yaml:"output"`
	Flags  []string `yaml:"flags"`
	Mode   Mode     `yaml:"mode"` // default 0755
}

// Group is a line of /etc/group.
type Group struct {
	Name    string   `yaml:"name"`
	GID     int      `yaml:"gid"`
	Members []string `yaml:"members"`
}

// User is a line of /etc/passwd.
type User struct {
	Name  string `yaml:"name"`
	UID   int    `yaml:"uid"`
	GID   int    `yaml:"gid"`
	Home  string `yaml:"home"`  // default /
	Shell string `yaml:"shell"` // default /bin/sh
}

// Directory is an empty directory.
type Directory struct {
	Path  string `yaml:"path"`
	Mode  Mode   `yaml:"mode"` // default 0755
	Owner Owner  `yaml:"owner"`
}

// File is a file with inline content, or a copy of a file or directory.
type File struct {
	Path    string  `yaml:"path"`
	Content *string `yaml:"content"`
	Source  string  `yaml:"source"`
	// Module makes Source relative to a module of the recipe's go.mod.
	Module string `yaml:"module"`
	Mode   Mode   `yaml:"mode"` // default 0644, or that of the source
	Owner  Owner  `yaml:"owner"`
}

// Symlink is one link at Path, or one for each of Names in the directory In.
type Symlink struct {
	Target string   `yaml:"target"`
	Path   string   `yaml:"path"`
	In     string   `yaml:"in"`
	Names  []string `yaml:"names"`
}

// Permission changes mode or owner of a path that is already there.
type Permission struct {
	Path  string `yaml:"path"`
	Mode  Mode   `yaml:"mode"`
	Owner *Owner `yaml:"owner"`
}

// RegistryEntry is an image in the storage layout that the e2e suite's fake
// registry serves: ROOT/REPOSITORY/{manifests,blobs}/sha256/ab/abc.../data, and
// a file with the digest of the manifest for the tag.
type RegistryEntry struct {
	Recipe     string `yaml:"recipe"` // directory
	Root       string `yaml:"root"`
	Repository string `yaml:"repository"`
	Tag        string `yaml:"tag"`
}

// Config is the part of the OCI image configuration that a recipe sets.
type Config struct {
	Entrypoint   []string          `yaml:"entrypoint"`
	Cmd          []string          `yaml:"cmd"`
	Env          []string          `yaml:"env"`
	User         string            `yaml:"user"`
	WorkDir      string            `yaml:"workdir"`
	ExposedPorts []string          `yaml:"exposedPorts"`
	Volumes      []string          `yaml:"volumes"`
	StopSignal   string            `yaml:"stopSignal"`
	Labels       map[string]string `yaml:"labels"`
}

// Mode is a file mode written in octal, such as 0755 or "4755". The zero value
// means that the recipe does not say.
type Mode struct {
	bits int64
	set  bool
}

// UnmarshalYAML reads the number as it is written, always in octal.
func (m *Mode) UnmarshalYAML(node *yaml.Node) error {
	text := strings.TrimPrefix(node.Value, "0o")
	bits, err := strconv.ParseUint(text, 8, 12)
	if node.Kind != yaml.ScalarNode || err != nil {
		return fmt.Errorf("line %d: mode %q is not an octal number up to 7777", node.Line, node.Value)
	}
	*m = Mode{bits: int64(bits), set: true}
	return nil
}

// or returns the mode, or the default where the recipe does not say.
func (m Mode) or(def int64) int64 {
	if m.set {
		return m.bits
	}
	return def
}

// Owner is written "uid" or "uid:gid", in numbers.
type Owner struct {
	UID, GID int
}

var ownerPattern = regexp.MustCompile(`^([0-9]{1,9})(?::([0-9]{1,9}))?$`)

// UnmarshalYAML reads "uid" (the group is then the same number) or "uid:gid".
func (o *Owner) UnmarshalYAML(node *yaml.Node) error {
	match := ownerPattern.FindStringSubmatch(node.Value)
	if node.Kind != yaml.ScalarNode || match == nil {
		return fmt.Errorf("line %d: owner %q is not a number or a pair uid:gid of numbers", node.Line, node.Value)
	}
	o.UID, _ = strconv.Atoi(match[1])
	o.GID = o.UID
	if match[2] != "" {
		o.GID, _ = strconv.Atoi(match[2])
	}
	return nil
}

// Load reads and checks the recipe in dir.
func Load(dir string) (Recipe, error) {
	path := filepath.Join(dir, RecipeFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return Recipe{}, fmt.Errorf("reading image recipe: %w", err)
	}
	recipe, err := Parse(data)
	if err != nil {
		return Recipe{}, fmt.Errorf("%s: %w", path, err)
	}
	recipe.dir = dir
	return recipe, nil
}

// Parse reads and checks a recipe. Fields that Recipe does not have are errors.
// Sources of the result are relative to the working directory.
func Parse(data []byte) (Recipe, error) {
	var recipe Recipe
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&recipe); err != nil {
		if errors.Is(err, io.EOF) {
			return Recipe{}, errors.New("the recipe is empty")
		}
		return Recipe{}, plainYAMLError(err)
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return Recipe{}, errors.New("more than one YAML document")
	}
	recipe.dir, recipe.raw = ".", bytes.Clone(data)
	return recipe, recipe.check()
}

var unknownField = regexp.MustCompile(`field (\S+) not found in type image\.(\S+)`)

// plainYAMLError says "unknown field" where the library speaks of Go types.
func plainYAMLError(err error) error {
	var typeErr *yaml.TypeError
	if !errors.As(err, &typeErr) {
		return err
	}
	lines := make([]string, len(typeErr.Errors))
	for i, line := range typeErr.Errors {
		lines[i] = unknownField.ReplaceAllString(line, `unknown field "$1" in $2`)
	}
	return errors.New(strings.Join(lines, "; "))
}
