package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// nested is an image of another recipe that goes into this one.
type nested struct {
	entry   RegistryEntry
	archive string
}

// gatherRegistry builds the recipes that the registry entries name.
func (b *builder) gatherRegistry(ctx context.Context) error {
	for i, entry := range b.recipe.Registry {
		recipe, err := Load(filepath.Join(b.recipe.dir, entry.Recipe))
		if err != nil {
			return fmt.Errorf("registry[%d].recipe: %w", i, err)
		}
		if len(recipe.Registry) > 0 {
			return fmt.Errorf("registry[%d].recipe: %s has registry entries itself", i, entry.Recipe)
		}
		result, err := Build(ctx, recipe, Options{CacheDir: b.cache, Log: b.log})
		if err != nil {
			return fmt.Errorf("registry[%d].recipe: %w", i, err)
		}
		b.nested = append(b.nested, nested{entry: entry, archive: result.Archive})
	}
	return nil
}

// addTo stores the first image of the archive in the tree.
func (n nested) addTo(t *tree) error {
	blobs, err := readBlobs(n.archive)
	if err != nil {
		return fmt.Errorf("reading %s: %w", n.archive, err)
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(blobs["index.json"], &index); err != nil || len(index.Manifests) == 0 {
		return errors.Join(fmt.Errorf("%s: no index of images", n.archive), err)
	}
	digest := index.Manifests[0].Digest
	data := blobs[blobName(digest)]
	var manifest v1.Manifest
	if err := json.Unmarshal(data, &manifest); err != nil {
		return fmt.Errorf("%s: reading manifest: %w", n.archive, err)
	}
	root := path.Join(n.entry.Root, n.entry.Repository)
	store := func(kind string, hash v1.Hash, content []byte) error {
		return t.putBytes(path.Join(root, kind, hash.Algorithm, hash.Hex[:2], hash.Hex, "data"), content, 0o644)
	}
	err = errors.Join(
		t.putBytes(path.Join(root, "manifests", n.entry.Tag), []byte(digest.String()+"\n"), 0o644),
		store("manifests", digest, data),
		store("blobs", manifest.Config.Digest, blobs[blobName(manifest.Config.Digest)]),
	)
	for _, layer := range manifest.Layers {
		err = errors.Join(err, store("blobs", layer.Digest, blobs[blobName(layer.Digest)]))
	}
	return err
}

func blobName(hash v1.Hash) string {
	return "blobs/" + hash.Algorithm + "/" + hash.Hex
}

// readBlobs reads the files of an archive into memory: registry entries are
// meant for small images.
func readBlobs(archive string) (map[string][]byte, error) {
	file, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	blobs := map[string][]byte{}
	tr := tar.NewReader(file)
	for {
		header, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return blobs, nil
		}
		if err != nil {
			return nil, err
		}
		if blobs[header.Name], err = io.ReadAll(tr); err != nil {
			return nil, err
		}
	}
}
