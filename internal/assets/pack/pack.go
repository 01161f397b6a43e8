// Command pack compresses the files that package assets embeds and writes their
// manifest. The build runs it; it is not shipped.
//
//	pack <output directory> <name>=<file>...
//
// A file whose content has not changed since the last run is not compressed
// again. Files of earlier runs that are not named any more are removed.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"

	"atoll.dev/atoll/internal/assets"
	"atoll.dev/atoll/internal/datadir/atomicfile"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: pack <output directory> <name>=<file>...")
		os.Exit(2)
	}
	if err := pack(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func pack(dir string, inputs []string) error {
	old := map[string]assets.Entry{}
	if b, err := os.ReadFile(filepath.Join(dir, assets.ManifestFile)); err == nil {
		if err := json.Unmarshal(b, &old); err != nil {
			return fmt.Errorf("reading the old manifest: %w", err)
		}
	}
	manifest := map[string]assets.Entry{}
	for _, input := range inputs {
		name, file, ok := strings.Cut(input, "=")
		if !ok || name == "" || name != filepath.Base(name) {
			return fmt.Errorf("%q is not <name>=<file>", input)
		}
		entry, err := packFile(dir, name, file, old[name])
		if err != nil {
			return fmt.Errorf("packing %s: %w", name, err)
		}
		manifest[name] = entry
	}
	for name := range old {
		if _, keep := manifest[name]; !keep {
			if err := os.Remove(packed(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("removing %s: %w", name, err)
			}
		}
	}
	b, err := json.MarshalIndent(manifest, "", "\t")
	if err != nil {
		return fmt.Errorf("encoding the manifest: %w", err)
	}
	_, err = atomicfile.WriteIfChanged(filepath.Join(dir, assets.ManifestFile), append(b, '\n'), 0o644)
	return err
}

func packFile(dir, name, file string, old assets.Entry) (assets.Entry, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return assets.Entry{}, err
	}
	sum := sha256.Sum256(content)
	entry := assets.Entry{Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])}
	if _, err := os.Stat(packed(dir, name)); err == nil && entry == old {
		return entry, nil
	}
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		return assets.Entry{}, err
	}
	if _, err := z.Write(content); err != nil {
		return assets.Entry{}, err
	}
	if err := z.Close(); err != nil {
		return assets.Entry{}, err
	}
	return entry, atomicfile.Write(packed(dir, name), out.Bytes(), 0o644)
}

func packed(dir, name string) string { return filepath.Join(dir, name+".zst") }
