package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// formatVersion is part of the cache key; it changes when the builder makes
// something else of the same recipe.
const formatVersion = "atoll-image-1"

// Options say where the builder works.
type Options struct {
	// CacheDir keeps downloaded packages, binaries and finished archives.
	CacheDir string
	// Log receives the steps that take long. Default: discarded.
	Log *slog.Logger
}

// Result is a finished image.
type Result struct {
	Archive string   // path of the OCI archive, inside the cache
	Names   []string // of the images in the archive
	Size    int64    // of the archive, in bytes
	Cached  bool     // whether nothing had to be built
}

// Build makes the image and returns its archive. The archive is never changed
// after it is there; it may be copied or linked, and the cache may be deleted
// at any time when no build runs.
func Build(ctx context.Context, recipe Recipe, opts Options) (Result, error) {
	if recipe.raw == nil {
		return Result{}, errors.New("building image: the recipe does not come from Load or Parse")
	}
	if opts.CacheDir == "" {
		return Result{}, errors.New("building image: no cache directory")
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	b := &builder{recipe: recipe, log: opts.Log.With("image", recipe.Names[0]), cache: opts.CacheDir}
	result, err := b.build(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("building image %s: %w", filepath.Join(recipe.dir, RecipeFile), err)
	}
	return result, nil
}

// builder holds what one Build has found so far.
type builder struct {
	recipe   Recipe
	log      *slog.Logger
	cache    string
	apt      *apt
	debs     []deb
	programs []builtFile
	files    []builtFile
	nested   []nested
}

// builtFile is a file of the host that goes into the image as it is.
type builtFile struct {
	path  string // in the image
	host  string
	mode  Mode
	owner Owner
}

func (b *builder) build(ctx context.Context) (Result, error) {
	var err error
	if b.cache, err = filepath.Abs(b.cache); err != nil {
		return Result{}, fmt.Errorf("locating cache: %w", err)
	}
	for _, dir := range []string{"images", "bin", "apt"} {
		if err := os.MkdirAll(filepath.Join(b.cache, dir), 0o755); err != nil {
			return Result{}, fmt.Errorf("creating cache: %w", err)
		}
	}
	if err := b.gather(ctx); err != nil {
		return Result{}, err
	}
	key, err := b.key()
	if err != nil {
		return Result{}, err
	}
	result := Result{Archive: filepath.Join(b.cache, "images", key+".tar"), Names: b.recipe.Names, Cached: true}
	if info, err := os.Stat(result.Archive); err == nil {
		result.Size = info.Size()
		return result, nil
	}
	result.Cached = false
	b.log.Info("assembling image")
	if err := b.assemble(ctx, result.Archive); err != nil {
		return Result{}, err
	}
	info, err := os.Stat(result.Archive)
	if err != nil {
		return Result{}, err
	}
	result.Size = info.Size()
	return result, nil
}

// gather downloads and compiles, so that all inputs are known.
func (b *builder) gather(ctx context.Context) error {
	if len(b.recipe.Debian) > 0 {
		b.apt = &apt{dir: filepath.Join(b.cache, "apt"), log: b.log}
		debs, err := b.apt.fetch(ctx, b.recipe.Debian)
		if err != nil {
			return fmt.Errorf("debian: %w", err)
		}
		b.debs = debs
	}
	c := compiler{dir: filepath.Join(b.cache, "bin"), recipe: b.recipe.dir}
	for i, program := range b.recipe.Go {
		b.log.Info("building go program", "package", program.Package)
		binary, err := c.buildGo(ctx, program)
		if err != nil {
			return fmt.Errorf("go[%d]: %w", i, err)
		}
		b.programs = append(b.programs, builtFile{path: program.Output, host: binary, mode: Mode{program.Mode.or(0o755), true}})
	}
	for i, program := range b.recipe.C {
		binary, err := c.buildC(ctx, program)
		if err != nil {
			return fmt.Errorf("c[%d]: %w", i, err)
		}
		b.programs = append(b.programs, builtFile{path: program.Output, host: binary, mode: Mode{program.Mode.or(0o755), true}})
	}
	for i, file := range b.recipe.Files {
		if file.Source == "" {
			continue
		}
		if err := b.gatherFile(ctx, c, file); err != nil {
			return fmt.Errorf("files[%d].source: %w", i, err)
		}
	}
	return b.gatherRegistry(ctx)
}

// gatherFile finds what a source names: a file, or all files of a directory.
func (b *builder) gatherFile(ctx context.Context, c compiler, file File) error {
	dir := b.recipe.dir
	if file.Module != "" {
		var err error
		if dir, err = c.moduleDir(ctx, file.Module); err != nil {
			return err
		}
	}
	root := filepath.Join(dir, file.Source)
	return filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if !entry.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file", name)
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		b.files = append(b.files, builtFile{
			path: path.Join(file.Path, filepath.ToSlash(rel)), host: name, mode: file.Mode, owner: file.Owner,
		})
		return nil
	})
}

// key hashes everything that decides the bytes of the archive.
func (b *builder) key() (string, error) {
	sum := sha256.New()
	fmt.Fprintf(sum, "%s\n%d\n%s", formatVersion, len(b.recipe.raw), b.recipe.raw)
	for _, d := range b.debs {
		fmt.Fprintf(sum, "deb %s\n", d.sha256)
	}
	for _, file := range slices.Concat(b.programs, b.files) {
		content, err := fileSHA256(file.host)
		if err != nil {
			return "", err
		}
		mode, err := file.modeBits()
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "file %q %o %s\n", file.path, mode, content)
	}
	for _, n := range b.nested {
		// The name of a cached archive is the hash of what it was made from.
		fmt.Fprintf(sum, "image %s\n", filepath.Base(n.archive))
	}
	return hex.EncodeToString(sum.Sum(nil)[:16]), nil
}

// modeBits returns the recipe's mode, or 0755 for an executable host file and
// 0644 for another: the host's umask has no say.
func (f builtFile) modeBits() (int64, error) {
	info, err := os.Stat(f.host)
	if err != nil {
		return 0, err
	}
	if info.Mode()&0o111 != 0 {
		return f.mode.or(0o755), nil
	}
	return f.mode.or(0o644), nil
}

// assemble writes the archive at name, which appears only when it is complete.
func (b *builder) assemble(ctx context.Context, name string) error {
	work, err := os.MkdirTemp(filepath.Dir(name), "build-")
	if err != nil {
		return fmt.Errorf("creating work directory: %w", err)
	}
	defer func() { _ = os.RemoveAll(work) }()
	t, err := newTree(work)
	if err != nil {
		return err
	}
	defer func() { _ = t.close() }()
	if err := b.fill(ctx, t); err != nil {
		return err
	}
	a := archive{blobs: map[v1.Hash]blob{}}
	layer, err := a.addLayer(t, filepath.Join(work, "layer"))
	if err != nil {
		return err
	}
	var images []v1.Descriptor
	for _, imageName := range b.recipe.Names {
		descriptor, err := a.addImage(b.recipe, imageName, layer)
		if err != nil {
			return err
		}
		images = append(images, descriptor)
	}
	out, err := os.Create(filepath.Join(work, "archive"))
	if err != nil {
		return fmt.Errorf("creating archive: %w", err)
	}
	if err := errors.Join(a.write(out, images), out.Close()); err != nil {
		return fmt.Errorf("writing archive: %w", err)
	}
	return os.Rename(out.Name(), name)
}

// fill puts everything into the tree. The order is part of the recipe's meaning.
func (b *builder) fill(ctx context.Context, t *tree) error {
	if len(b.debs) > 0 {
		if err := t.mergeUsr(); err != nil {
			return err
		}
		for _, d := range b.debs {
			if err := b.apt.unpack(ctx, d, t); err != nil {
				return err
			}
		}
		t.prune(b.recipe.Keep)
		if err := t.finishDebian(); err != nil {
			return err
		}
	}
	for i, pattern := range b.recipe.Remove {
		if t.remove(pattern) == 0 {
			return fmt.Errorf("remove[%d]: %s matches nothing", i, pattern)
		}
	}
	if err := t.writeAccounts(b.recipe.Users, b.recipe.Groups); err != nil {
		return err
	}
	if err := b.fillFiles(t); err != nil {
		return err
	}
	for i, n := range b.nested {
		if err := n.addTo(t); err != nil {
			return fmt.Errorf("registry[%d]: %w", i, err)
		}
	}
	return b.fillLinks(t)
}

func (b *builder) fillFiles(t *tree) error {
	for i, dir := range b.recipe.Directories {
		n := node{kind: tar.TypeDir, mode: dir.Mode.or(0o755), uid: dir.Owner.UID, gid: dir.Owner.GID, modTime: fixedTime}
		if err := t.put(dir.Path, &n); err != nil {
			return fmt.Errorf("directories[%d]: %w", i, err)
		}
	}
	for i, file := range b.recipe.Files {
		if file.Content == nil {
			continue
		}
		if err := t.putBytes(file.Path, []byte(*file.Content), file.Mode.or(0o644)); err != nil {
			return fmt.Errorf("files[%d]: %w", i, err)
		}
		n, err := t.lookup(file.Path)
		if err != nil {
			return err
		}
		n.uid, n.gid = file.Owner.UID, file.Owner.GID
	}
	for _, file := range slices.Concat(b.files, b.programs) {
		if err := file.copyTo(t); err != nil {
			return err
		}
	}
	return nil
}

func (f builtFile) copyTo(t *tree) error {
	mode, err := f.modeBits()
	if err != nil {
		return err
	}
	in, err := os.Open(f.host)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	n := node{mode: mode, uid: f.owner.UID, gid: f.owner.GID, modTime: fixedTime}
	return t.putFile(f.path, io.Reader(in), n)
}

func (b *builder) fillLinks(t *tree) error {
	for i, link := range b.recipe.Symlinks {
		paths := []string{link.Path}
		if link.Path == "" {
			paths = nil
			for _, name := range link.Names {
				paths = append(paths, path.Join(link.In, name))
			}
		}
		for _, name := range paths {
			n := node{kind: tar.TypeSymlink, mode: 0o777, target: link.Target, modTime: fixedTime}
			if err := t.put(name, &n); err != nil {
				return fmt.Errorf("symlinks[%d]: %w", i, err)
			}
		}
	}
	for i, permission := range b.recipe.Permissions {
		n, err := t.lookup(permission.Path)
		if err != nil {
			return fmt.Errorf("permissions[%d]: %w", i, err)
		}
		n.mode = permission.Mode.or(n.mode)
		if permission.Owner != nil {
			n.uid, n.gid = permission.Owner.UID, permission.Owner.GID
		}
	}
	return nil
}
