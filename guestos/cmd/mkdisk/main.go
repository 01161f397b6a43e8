// Command mkdisk builds disks of virtual machines:
//
//	mkdisk [-cache DIR] -o OUT.qcow2 RECIPE-DIR   a small one, from a recipe
//	mkdisk -o OUT.qcow2 -system DIR               from the parts of an installed system
//	mkdisk [-cache DIR] -resolve A,B              prints what apt would install for A and B
//
// The Makefile and guestos/vm/debian/build.sh call it. A disk from a recipe is
// cached by what it is made of. It fails with the recipe's file and field when
// the recipe is wrong.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/image"
	"atoll.dev/atoll/internal/image/disk"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mkdisk:", err)
		os.Exit(1)
	}
}

func run() error {
	out := flag.String("o", "", "`file` to write the qcow2 image to")
	cache := flag.String("cache", "", "cache `directory` (default $ATOLL_CACHE, else ~/.cache/atoll)")
	system := flag.String("system", "", "`directory` with the parts of an installed system")
	resolve := flag.String("resolve", "", "`packages` to resolve, separated by commas")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if *system != "" && *out != "" && flag.NArg() == 0 {
		return disk.System(ctx, *system, *out)
	}
	opts := image.Options{CacheDir: *cache, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if opts.CacheDir == "" {
		opts.CacheDir = os.Getenv("ATOLL_CACHE")
	}
	if opts.CacheDir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return fmt.Errorf("finding the cache: %w", err)
		}
		opts.CacheDir = filepath.Join(home, ".cache", "atoll")
	}
	if *resolve != "" && flag.NArg() == 0 {
		lines, err := image.Resolve(ctx, strings.Split(*resolve, ","), opts)
		if err != nil {
			return err
		}
		fmt.Println(strings.Join(lines, "\n"))
		return nil
	}
	if *out == "" || flag.NArg() != 1 {
		return errors.New("usage: mkdisk [-cache DIR] -o OUT.qcow2 RECIPE-DIR | -o OUT.qcow2 -system DIR | -resolve PACKAGES")
	}
	return build(ctx, flag.Arg(0), *out, opts)
}

// build builds a recipe's disk and puts it at out.
func build(ctx context.Context, dir, out string, opts image.Options) error {
	recipe, err := disk.Load(dir)
	if err != nil {
		return err
	}
	result, err := disk.Build(ctx, recipe, opts)
	if err != nil {
		return err
	}
	if err := publish(result.Image, out); err != nil {
		return err
	}
	opts.Log.Info("disk ready", "file", out, "bytes", result.Size, "cached", result.Cached)
	return nil
}

// publish copies the image to out, which appears in one step. It is no link: a
// program that opens the copy for writing must not change the cache.
func publish(image, out string) (err error) {
	in, err := os.Open(image)
	if err != nil {
		return fmt.Errorf("opening the image: %w", err)
	}
	defer func() { _ = in.Close() }()
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	temporary := fmt.Sprintf("%s.tmp.%d", out, os.Getpid())
	file, err := os.Create(temporary)
	if err != nil {
		return fmt.Errorf("creating %s: %w", temporary, err)
	}
	_, err = io.Copy(file, in)
	if err := errors.Join(err, file.Close()); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	if err := os.Rename(temporary, out); err != nil {
		return fmt.Errorf("publishing the image: %w", err)
	}
	return nil
}
