package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Package is a Debian package in the cache.
type Package struct {
	File   string // path of the .deb
	SHA256 string
}

// Packages downloads packages without their dependencies, in the order of the
// names. A meta package of a kernel stands for the kernel it depends on. As with
// Build, apt verifies signatures and hashes, and nothing is installed.
func Packages(ctx context.Context, names []string, opts Options) ([]Package, error) {
	a, err := newAPT(opts)
	if err != nil {
		return nil, err
	}
	release, updateErr, err := a.ready(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	packages, err := a.only(ctx, names)
	if err != nil && updateErr == nil {
		// The lists may be older than the archive.
		updateErr = a.update(ctx, true)
		packages, err = a.only(ctx, names)
	}
	if err != nil {
		return nil, fmt.Errorf("debian: %w", errors.Join(err, updateErr))
	}
	return packages, nil
}

// Resolve returns the packages that apt would install for the names, with their
// dependencies, as lines of a file name and a hash. Nothing is downloaded.
func Resolve(ctx context.Context, names []string, opts Options) ([]string, error) {
	a, err := newAPT(opts)
	if err != nil {
		return nil, err
	}
	release, updateErr, err := a.ready(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	debs, err := a.resolve(ctx, names)
	if err != nil {
		return nil, fmt.Errorf("debian: %w", errors.Join(err, updateErr))
	}
	var out []string
	for _, d := range debs {
		out = append(out, d.file+" "+d.sha256)
	}
	slices.Sort(out)
	return out, nil
}

// newAPT is apt with the cache of the options.
func newAPT(opts Options) (*apt, error) {
	dir, err := filepath.Abs(filepath.Join(opts.CacheDir, "apt"))
	if err != nil {
		return nil, fmt.Errorf("locating cache: %w", err)
	}
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &apt{dir: dir, log: log}, nil
}

// only downloads just the named packages.
func (a *apt) only(ctx context.Context, names []string) ([]Package, error) {
	wanted := slices.Clone(names)
	for i, name := range wanted {
		kernel, err := a.kernelBehind(ctx, name)
		if err != nil {
			return nil, err
		}
		if kernel != "" {
			wanted[i] = kernel
		}
	}
	var out []Package
	for _, name := range wanted {
		lines, err := a.get(ctx, "download", "-qq", "--print-uris", name)
		if err != nil {
			return nil, fmt.Errorf("resolving %s: %w", name, err)
		}
		debs, err := parseURIs(lines)
		if err != nil {
			return nil, err
		}
		if len(debs) != 1 {
			return nil, fmt.Errorf("resolving %s: apt chose %d packages", name, len(debs))
		}
		// What download makes of a name differs from what install makes of it.
		debs[0].file = strings.ReplaceAll(debs[0].file, "%3a", ":")
		out = append(out, Package{File: filepath.Join(a.archives(), debs[0].file), SHA256: debs[0].sha256})
		if a.complete(debs) {
			continue
		}
		a.log.Info("downloading package", "package", name)
		if err := a.download(ctx, name, debs[0]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// download puts one package into the archive directory.
func (a *apt) download(ctx context.Context, name string, want deb) error {
	work, err := os.MkdirTemp(a.dir, "download-")
	if err != nil {
		return fmt.Errorf("downloading %s: %w", name, err)
	}
	defer func() { _ = os.RemoveAll(work) }()
	cmd := exec.CommandContext(ctx, "apt-get", "download", "-qq", name)
	cmd.Dir = work
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.config(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("downloading %s: %w", name, err)
	}
	files, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(files) != 1 {
		return fmt.Errorf("downloading %s: apt left %d packages", name, len(files))
	}
	sum, err := fileSHA256(files[0])
	if err != nil {
		return err
	}
	if sum != want.sha256 {
		return fmt.Errorf("downloading %s: sha256 is %s, not %s", name, sum, want.sha256)
	}
	return os.Rename(files[0], filepath.Join(a.archives(), want.file))
}

var kernelDependency = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-[0-9]\S*)`)

// kernelBehind returns the kernel that a meta package depends on, or "".
func (a *apt) kernelBehind(ctx context.Context, name string) (string, error) {
	if !strings.HasPrefix(name, "linux-image-") || regexp.MustCompile(`^linux-image-[0-9]`).MatchString(name) {
		return "", nil
	}
	cmd := exec.CommandContext(ctx, "apt-cache", "depends", name)
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.config(), "LC_ALL=C")
	out, err := output(cmd)
	if err != nil {
		return "", fmt.Errorf("resolving %s: %w", name, err)
	}
	match := kernelDependency.FindSubmatch(out)
	if match == nil {
		return "", fmt.Errorf("resolving %s: it depends on no kernel", name)
	}
	return string(match[1]), nil
}

// Walk calls visit for every regular file of the package, with its path below /.
// The reader is valid during the call.
func (p Package) Walk(ctx context.Context, visit func(path string, r io.Reader) error) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", p.File)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("unpacking %s: %w", filepath.Base(p.File), err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpacking %s: %w", filepath.Base(p.File), err)
	}
	walkErr := walkTar(tar.NewReader(stdout), visit)
	_, drainErr := io.Copy(io.Discard, stdout)
	if err := errors.Join(walkErr, drainErr, cmd.Wait()); err != nil {
		return fmt.Errorf("unpacking %s: %w%s", filepath.Base(p.File), err, tail(stderr.Bytes()))
	}
	return nil
}

func walkTar(reader *tar.Reader, visit func(path string, r io.Reader) error) error {
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		if err := visit(strings.TrimPrefix(header.Name, "./"), reader); err != nil {
			return err
		}
	}
}

// BuildGo links a Go program statically and returns the path of the binary,
// which stays in the cache. Dir is what a relative Module is relative to.
func BuildGo(ctx context.Context, dir string, program GoProgram, opts Options) (string, error) {
	bin, err := filepath.Abs(filepath.Join(opts.CacheDir, "bin"))
	if err != nil {
		return "", fmt.Errorf("locating cache: %w", err)
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", fmt.Errorf("creating cache: %w", err)
	}
	return compiler{dir: bin, recipe: dir}.buildGo(ctx, program)
}
