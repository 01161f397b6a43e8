package disk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"go.yaml.in/yaml/v3"
)

// RecipeFile is the name of the recipe inside its directory.
const RecipeFile = "disk.yaml"

// Recipe says what is on the disk. It comes from Load.
type Recipe struct {
	// Kernel is a Debian package with a kernel, or the meta package of one.
	Kernel string `yaml:"kernel"`
	// Modules are loaded by init, in the order of dependencies; names without .ko.
	Modules []string `yaml:"modules"`
	Cmdline string   `yaml:"cmdline"`
	// Init is the Go program that is pid 1, Module the directory of its go.mod.
	Init struct {
		Package string `yaml:"package"`
		Module  string `yaml:"module"`
	} `yaml:"init"`
	// Busybox lists the applets that get a link in /bin.
	Busybox []string `yaml:"busybox"`
	// Links are more names of pid 1's program.
	Links []string        `yaml:"links"`
	Files map[string]File `yaml:"files"`
	Data  struct {
		Label string `yaml:"label"`
		MiB   int64  `yaml:"mib"`
	} `yaml:"data"`

	dir string
	raw []byte
}

// File is a file of the initramfs.
type File struct {
	Content    string `yaml:"content"`
	Executable bool   `yaml:"executable"`
}

var (
	labelPattern  = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,16}$`)
	modulePattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
)

// Load reads and checks the recipe in dir.
func Load(dir string) (Recipe, error) {
	path := filepath.Join(dir, RecipeFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return Recipe{}, fmt.Errorf("reading disk recipe: %w", err)
	}
	recipe := Recipe{dir: dir, raw: data}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&recipe); err != nil {
		return Recipe{}, fmt.Errorf("%s: %w", path, err)
	}
	if err := recipe.check(); err != nil {
		return Recipe{}, fmt.Errorf("%s: %w", path, err)
	}
	return recipe, nil
}

func (r *Recipe) check() error {
	switch {
	case r.Kernel == "":
		return errors.New("kernel: name a Debian package")
	case r.Init.Package == "":
		return errors.New("init.package: name a Go main package")
	case !labelPattern.MatchString(r.Data.Label):
		return fmt.Errorf("data.label: %q is not 1 to 16 letters, digits or _.-", r.Data.Label)
	case r.Data.MiB < 8 || r.Data.MiB > 1024:
		return fmt.Errorf("data.mib: %d is not from 8 to 1024", r.Data.MiB)
	}
	for i, name := range r.Modules {
		if !modulePattern.MatchString(name) {
			return fmt.Errorf("modules[%d]: %q is not the name of a module", i, name)
		}
	}
	for name := range r.Files {
		if !filepath.IsAbs(name) || filepath.Clean(name) != name {
			return fmt.Errorf("files: %q is not a clean absolute path", name)
		}
	}
	return nil
}
