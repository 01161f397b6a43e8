package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/distribution/reference"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	annotationRefName   = "org.opencontainers.image.ref.name"
	annotationImageName = "io.containerd.image.name"
)

// blob is content of the archive, either in memory or in a file.
type blob struct {
	data []byte
	file string
	size int64
}

// archive collects the blobs of an OCI image layout.
type archive struct {
	blobs map[v1.Hash]blob
}

func (a *archive) addJSON(value any) (v1.Hash, int64, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return v1.Hash{}, 0, fmt.Errorf("encoding image: %w", err)
	}
	sum := sha256.Sum256(data)
	hash := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
	a.blobs[hash] = blob{data: data, size: int64(len(data))}
	return hash, int64(len(data)), nil
}

// addLayer writes the tree to file as an uncompressed layer.
func (a *archive) addLayer(t *tree, file string) (v1.Descriptor, error) {
	out, err := os.Create(file)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("creating layer: %w", err)
	}
	defer func() { _ = out.Close() }()
	sum := sha256.New()
	if err := t.writeTar(io.MultiWriter(out, sum)); err != nil {
		return v1.Descriptor{}, err
	}
	size, err := out.Seek(0, io.SeekCurrent)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("sizing layer: %w", err)
	}
	hash := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	a.blobs[hash] = blob{file: file, size: size}
	return v1.Descriptor{MediaType: types.OCIUncompressedLayer, Digest: hash, Size: size}, nil
}

// addImage adds configuration and manifest of one name of the recipe.
func (a *archive) addImage(recipe Recipe, name string, layer v1.Descriptor) (v1.Descriptor, error) {
	config := v1.ConfigFile{
		Architecture: "amd64",
		OS:           "linux",
		Created:      v1.Time{Time: fixedTime},
		Config:       recipe.Config.oci(),
		RootFS:       v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{layer.Digest}},
		History:      []v1.History{{Created: v1.Time{Time: fixedTime}, CreatedBy: "atoll image build"}},
	}
	// The label makes the image IDs of a recipe's names differ; see Recipe.Names.
	config.Config.Labels[annotationRefName] = name
	configHash, configSize, err := a.addJSON(config)
	if err != nil {
		return v1.Descriptor{}, err
	}
	manifestHash, manifestSize, err := a.addJSON(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: configHash, Size: configSize},
		Layers:        []v1.Descriptor{layer},
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("parsing name %q: %w", name, err)
	}
	annotations := map[string]string{annotationImageName: name}
	if tagged, ok := named.(reference.Tagged); ok {
		annotations[annotationRefName] = tagged.Tag()
	}
	return v1.Descriptor{
		MediaType:   types.OCIManifestSchema1,
		Digest:      manifestHash,
		Size:        manifestSize,
		Annotations: annotations,
		Platform:    &v1.Platform{Architecture: "amd64", OS: "linux"},
	}, nil
}

// write writes the archive: layout file, index, blobs in the order of their hash.
func (a *archive) write(w io.Writer, images []v1.Descriptor) error {
	index, err := json.Marshal(v1.IndexManifest{
		SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: images,
	})
	if err != nil {
		return fmt.Errorf("encoding index: %w", err)
	}
	tw := tar.NewWriter(w)
	layout := []byte(`{"imageLayoutVersion":"1.0.0"}`)
	if err := writeBlob(tw, "oci-layout", blob{data: layout, size: int64(len(layout))}); err != nil {
		return err
	}
	if err := writeBlob(tw, "index.json", blob{data: index, size: int64(len(index))}); err != nil {
		return err
	}
	hashes := slices.SortedFunc(maps.Keys(a.blobs), func(x, y v1.Hash) int { return bytes.Compare([]byte(x.Hex), []byte(y.Hex)) })
	for _, hash := range hashes {
		if err := writeBlob(tw, "blobs/"+hash.Algorithm+"/"+hash.Hex, a.blobs[hash]); err != nil {
			return err
		}
	}
	return tw.Close()
}

func writeBlob(tw *tar.Writer, name string, b blob) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: b.size, ModTime: fixedTime}
	if err := tw.WriteHeader(header); err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	if b.file == "" {
		_, err := tw.Write(b.data)
		return err
	}
	file, err := os.Open(b.file)
	if err != nil {
		return fmt.Errorf("opening %s: %w", filepath.Base(b.file), err)
	}
	defer func() { _ = file.Close() }()
	if _, err := io.Copy(tw, file); err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	return nil
}

// oci converts the recipe's configuration. Labels is never nil.
func (c Config) oci() v1.Config {
	config := v1.Config{
		Entrypoint: c.Entrypoint,
		Cmd:        c.Cmd,
		Env:        c.Env,
		User:       c.User,
		WorkingDir: c.WorkDir,
		StopSignal: c.StopSignal,
		Labels:     map[string]string{},
	}
	maps.Copy(config.Labels, c.Labels)
	if !slices.ContainsFunc(c.Env, func(env string) bool { return len(env) > 5 && env[:5] == "PATH=" }) {
		config.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, c.Env...)
	}
	for _, port := range c.ExposedPorts {
		if config.ExposedPorts == nil {
			config.ExposedPorts = map[string]struct{}{}
		}
		config.ExposedPorts[port] = struct{}{}
	}
	for _, volume := range c.Volumes {
		if config.Volumes == nil {
			config.Volumes = map[string]struct{}{}
		}
		config.Volumes[volume] = struct{}{}
	}
	return config
}
