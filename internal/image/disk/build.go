package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/image"
)

// formatVersion is part of the cache key; it changes when the same recipe gives
// something else.
const formatVersion = "atoll-disk-1"

// Packages of the boot loaders and of the shell.
const (
	grubTools  = "grub-common"
	grubBIOS   = "grub-pc-bin"
	grubSigned = "grub-efi-amd64-signed"
	shimSigned = "shim-signed"
	busybox    = "busybox-static"
)

// Result is a finished disk.
type Result struct {
	Image  string // path of the qcow2 image, inside the cache
	Size   int64  // of the file, in bytes
	Cached bool
}

// builder holds what one Build has found so far.
type builder struct {
	recipe   Recipe
	opts     image.Options
	log      *slog.Logger
	packages map[string]image.Package
	init     string // path of pid 1's program
}

// Build makes the disk. The image is never changed after it is there.
func Build(ctx context.Context, recipe Recipe, opts image.Options) (Result, error) {
	if recipe.raw == nil {
		return Result{}, errors.New("building disk: the recipe does not come from Load")
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	b := &builder{recipe: recipe, opts: opts, log: opts.Log.With("disk", filepath.Base(recipe.dir))}
	result, err := b.build(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("building disk %s: %w", filepath.Join(recipe.dir, RecipeFile), err)
	}
	return result, nil
}

func (b *builder) build(ctx context.Context) (Result, error) {
	dir, err := filepath.Abs(filepath.Join(b.opts.CacheDir, "disks"))
	if err != nil {
		return Result{}, fmt.Errorf("locating cache: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Result{}, fmt.Errorf("creating cache: %w", err)
	}
	if err := b.gather(ctx); err != nil {
		return Result{}, err
	}
	key, err := b.key(ctx)
	if err != nil {
		return Result{}, err
	}
	result := Result{Image: filepath.Join(dir, key+".qcow2"), Cached: true}
	if info, err := os.Stat(result.Image); err == nil {
		result.Size = info.Size()
		return result, nil
	}
	result.Cached = false
	b.log.Info("assembling disk")
	if err := b.assemble(ctx, result.Image); err != nil {
		return Result{}, err
	}
	info, err := os.Stat(result.Image)
	if err != nil {
		return Result{}, err
	}
	result.Size = info.Size()
	return result, nil
}

// gather downloads and compiles, so that all inputs are known.
func (b *builder) gather(ctx context.Context) error {
	names := []string{b.recipe.Kernel, grubTools, grubBIOS, grubSigned, shimSigned, busybox}
	packages, err := image.Packages(ctx, names, b.opts)
	if err != nil {
		return err
	}
	b.packages = map[string]image.Package{}
	for i, name := range names {
		b.packages[name] = packages[i]
	}
	program := image.GoProgram{Package: b.recipe.Init.Package, Module: b.recipe.Init.Module}
	if b.init, err = image.BuildGo(ctx, b.recipe.dir, program, b.opts); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	return nil
}

// key hashes everything that decides the bytes of the disk.
func (b *builder) key(ctx context.Context) (string, error) {
	sum := sha256.New()
	fmt.Fprintf(sum, "%s\n%d\n%s", formatVersion, len(b.recipe.raw), b.recipe.raw)
	for _, name := range []string{b.recipe.Kernel, grubTools, grubBIOS, grubSigned, shimSigned, busybox} {
		fmt.Fprintf(sum, "deb %s\n", b.packages[name].SHA256)
	}
	for _, tool := range []string{"mkfs.ext4", "qemu-img"} {
		version, err := exec.CommandContext(ctx, tool, "-V").CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("running %s, which a disk needs: %w", tool, err)
		}
		fmt.Fprintf(sum, "%s %s\n", tool, version)
	}
	data, err := os.ReadFile(b.init)
	if err != nil {
		return "", err
	}
	_, _ = sum.Write(data)
	return hex.EncodeToString(sum.Sum(nil)[:16]), nil
}

// assemble writes the image at name, which appears only when it is complete.
func (b *builder) assemble(ctx context.Context, name string) error {
	work, err := os.MkdirTemp(filepath.Dir(name), "build-")
	if err != nil {
		return fmt.Errorf("creating work directory: %w", err)
	}
	defer func() { _ = os.RemoveAll(work) }()
	kernel, modules, err := b.kernelFiles(ctx)
	if err != nil {
		return err
	}
	ramfs, err := b.initramfs(ctx, modules)
	if err != nil {
		return err
	}
	boot, core, err := b.grubImages(ctx, work)
	if err != nil {
		return err
	}
	esp, err := b.systemPartition(ctx, kernel, ramfs)
	if err != nil {
		return err
	}
	data, err := b.dataPartition(ctx, filepath.Join(work, "data"))
	if err != nil {
		return err
	}
	raw := filepath.Join(work, "raw")
	if err := writeDisk(raw, boot, core, esp, data, b.recipe.Data.MiB<<20); err != nil {
		return err
	}
	packed := filepath.Join(work, "qcow2")
	if err := run(ctx, nil, "qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", "-c", "-m", "1", raw, packed); err != nil {
		return err
	}
	return os.Rename(packed, name)
}

// systemPartition is the FAT file system.
func (b *builder) systemPartition(ctx context.Context, kernel, ramfs []byte) (*fat, error) {
	shim, err := b.one(ctx, shimSigned, "usr/lib/shim/shimx64.efi.signed")
	if err != nil {
		return nil, err
	}
	grub, err := b.one(ctx, grubSigned, "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed")
	if err != nil {
		return nil, err
	}
	config := fmt.Appendf(nil, "linux /VMLINUZ %s\ninitrd /INITRD.IMG\nboot\n", b.recipe.Cmdline)
	return newFAT("TINYBOOT", map[string][]byte{
		"VMLINUZ":              kernel,
		"INITRD.IMG":           ramfs,
		"EFI/BOOT/BOOTX64.EFI": shim,
		"EFI/BOOT/GRUBX64.EFI": grub,
		"EFI/DEBIAN/GRUB.CFG":  config,
	})
}

// dataPartition makes the empty file system in a file and returns its path.
func (b *builder) dataPartition(ctx context.Context, file string) (string, error) {
	const id = "6a746f6c-6c00-4000-8000-74696e796474"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(file, b.recipe.Data.MiB<<20); err != nil {
		return "", err
	}
	env := []string{"E2FSPROGS_FAKE_TIME=1735689600"} // 2025-01-01
	err := run(ctx, env, "mkfs.ext4", "-q", "-F", "-L", b.recipe.Data.Label, "-U", id, "-m", "0",
		"-E", "hash_seed="+id+",lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", file)
	return file, err
}

// one reads one file of a package.
func (b *builder) one(ctx context.Context, pkg, path string) ([]byte, error) {
	var out []byte
	err := b.packages[pkg].Walk(ctx, func(name string, r io.Reader) error {
		if name != path {
			return nil
		}
		var err error
		out, err = io.ReadAll(r)
		return err
	})
	if err != nil {
		return nil, err
	}
	if out == nil {
		return nil, fmt.Errorf("package %s has no %s", pkg, path)
	}
	return out, nil
}

// run runs a program of the host; the error holds what it complained about.
func run(ctx context.Context, env []string, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), append([]string{"LC_ALL=C"}, env...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running %s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return nil
}
