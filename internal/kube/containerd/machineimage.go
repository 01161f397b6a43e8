package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/kube/containerd/images"
)

// importMachine makes the image of the pods of virtual machines, if it is missing or not known as the administrator's.
// There is nothing in it: what runs is on the disks.
func (d *Daemon) importMachine(ctx context.Context, client *images.Client) error {
	i, err := client.Status(ctx, machinev1.Image)
	if err == nil {
		if ref, err := client.Owned(ctx, machinev1.Image, i.ID); err != nil || ref != "" {
			return err
		}
	} else if !errors.Is(err, images.ErrNotFound) {
		return err
	}
	archive, err := machineImage()
	if err != nil {
		return err
	}
	_, err = client.Load(ctx, bytes.NewReader(archive), images.LoadOptions{Source: machinev1.Image})
	return err
}

// machineImage is an OCI archive with an image of one empty layer, the same blobs each time.
func machineImage() ([]byte, error) {
	var layer bytes.Buffer
	if err := tar.NewWriter(&layer).Close(); err != nil {
		return nil, err
	}
	made := time.Unix(0, 0).UTC()
	platform := ocispec.Platform{Architecture: "amd64", OS: "linux"}
	blobs := map[digest.Digest][]byte{}
	put := func(mediaType string, data []byte) ocispec.Descriptor {
		id := digest.FromBytes(data)
		blobs[id] = data
		return ocispec.Descriptor{MediaType: mediaType, Digest: id, Size: int64(len(data))}
	}
	content := put(ocispec.MediaTypeImageLayer, layer.Bytes())
	config, err := json.Marshal(ocispec.Image{
		Created: &made, Platform: platform,
		// It is never executed, but a container must have a command.
		Config:  ocispec.ImageConfig{Entrypoint: []string{"/vm"}},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{content.Digest}},
		History: []ocispec.History{{Created: &made, CreatedBy: "atoll"}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: put(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{content},
	})
	if err != nil {
		return nil, err
	}
	image := put(ocispec.MediaTypeImageManifest, manifest)
	image.Platform, image.Annotations = &platform, map[string]string{"io.containerd.image.name": machinev1.Image}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{image},
	})
	if err != nil {
		return nil, err
	}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{ocispec.ImageIndexFile: index, ocispec.ImageLayoutFile: layout}
	for id, data := range blobs {
		files[ocispec.ImageBlobsDir+"/"+string(id.Algorithm())+"/"+id.Encoded()] = data
	}
	return archiveOf(files)
}

// archiveOf writes files as a tar file.
func archiveOf(files map[string][]byte) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, data := range files {
		const mode = 0o644
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
