// Command mkimage builds an image recipe before the big binary exists:
//
//	mkimage [-cache DIR] -o OUT.tar RECIPE-DIR
//
// The Makefile calls it for guestos/images. Users have `atoll image build`.
// It fails with the recipe's file and field when the recipe is wrong.
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

	"atoll.dev/atoll/internal/image"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run() error {
	out := flag.String("o", "", "`file` to write the OCI archive to")
	cache := flag.String("cache", "", "cache `directory` (default $ATOLL_CACHE, else ~/.cache/atoll)")
	flag.Parse()
	if *out == "" || flag.NArg() != 1 {
		return errors.New("usage: mkimage [-cache DIR] -o OUT.tar RECIPE-DIR")
	}
	if *cache == "" {
		*cache = os.Getenv("ATOLL_CACHE")
	}
	if *cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return fmt.Errorf("finding the cache: %w", err)
		}
		*cache = filepath.Join(home, ".cache", "atoll")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	recipe, err := image.Load(flag.Arg(0))
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	result, err := image.Build(ctx, recipe, image.Options{CacheDir: *cache, Log: log})
	if err != nil {
		return err
	}
	if err := publish(result.Archive, *out); err != nil {
		return err
	}
	log.Info("image ready", "file", *out, "bytes", result.Size, "cached", result.Cached, "names", result.Names)
	return nil
}

// publish makes the archive appear at out in one step: a hard link where the
// file system allows it, else a copy.
func publish(archive, out string) error {
	temporary := fmt.Sprintf("%s.tmp.%d", out, os.Getpid())
	if err := os.Link(archive, temporary); err != nil {
		if err := copyFile(archive, temporary); err != nil {
			return errors.Join(err, os.Remove(temporary))
		}
	}
	if err := os.Rename(temporary, out); err != nil {
		return fmt.Errorf("publishing the archive: %w", err)
	}
	// Renaming one link of a file onto another leaves both names.
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("publishing the archive: %w", err)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("opening the archive: %w", err)
	}
	defer func() { _ = in.Close() }()
	file, err := os.Create(to)
	if err != nil {
		return fmt.Errorf("creating %s: %w", to, err)
	}
	_, err = io.Copy(file, in)
	return errors.Join(err, file.Close())
}
