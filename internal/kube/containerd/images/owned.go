package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ownedLabel is on containerd's record of an image's ID when an administrator has loaded or pulled that image. Beside it is
// one label for each name that the administrator has given it, with the digest of the manifest. Names themselves have no
// such label: a pull of the same name would remove it.
const ownedLabel = "atoll.dev/loaded"

// ownedName is the label for a name in its full form. Labels are short, so it has a hash of the name.
func ownedName(full string) string {
	sum := sha256.Sum256([]byte(full))
	return ownedLabel + "." + hex.EncodeToString(sum[:16])
}

// own notes that an administrator has given an image its names.
func (c *Client) own(ctx context.Context, m ocispec.Descriptor, names []string) error {
	config, err := images.Config(ctx, c.client.ContentStore(), m, platforms.Default())
	if err != nil {
		return fmt.Errorf("image %s: %w", names[0], err)
	}
	id := config.Digest.String()
	if err := c.waitRecord(ctx, id); err != nil {
		return fmt.Errorf("image %s: %w", names[0], err)
	}
	labels, paths := map[string]string{ownedLabel: "true"}, []string{"labels." + ownedLabel}
	for _, name := range names {
		labels[ownedName(name)] = m.Digest.String()
		paths = append(paths, "labels."+ownedName(name))
	}
	if _, err := c.client.ImageService().Update(ctx, images.Image{Name: id, Labels: labels}, paths...); err != nil {
		return fmt.Errorf("image %s: noting where it is from: %w", names[0], err)
	}
	return nil
}

// waitRecord waits until the CRI plugin, which learns of new names through events, has made the record of an ID.
func (c *Client) waitRecord(ctx context.Context, id string) error {
	return wait(ctx, "image "+id, func() (bool, error) {
		_, err := c.client.ImageService().Get(ctx, id)
		if errdefs.IsNotFound(err) {
			return false, nil
		}
		return err == nil, err
	})
}

// wait looks until something is there.
func wait(ctx context.Context, what string, look func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		there, err := look()
		if err != nil {
			return fmt.Errorf("looking for %s: %w", what, err)
		}
		if there {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for containerd's CRI service to see %s: %w", what, ctx.Err())
		}
	}
}

// Owned returns what an image is known by that an administrator has loaded or pulled under a name: its repository with the
// digest of its manifest. It is "" for an image with another ID, for what the kubelet alone has pulled, and for what is no
// name. Who else has pulled the image, under whatever name, makes no difference.
func (c *Client) Owned(ctx context.Context, name, id string) (string, error) {
	full, err := Normalize(name)
	if err != nil {
		return "", nil //nolint:nilerr // an ID
	}
	record, err := c.client.ImageService().Get(withNamespace(ctx), id)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("looking for image %s: %w", id, err)
	}
	manifest := record.Labels[ownedName(full)]
	if manifest == "" {
		return "", nil
	}
	ref, err := reference.ParseNormalizedNamed(full)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", full, err)
	}
	return reference.TrimNamed(ref).Name() + "@" + manifest, nil
}

// OwnedIDs are the IDs of the images that an administrator has loaded or pulled.
func (c *Client) OwnedIDs(ctx context.Context) (map[string]bool, error) {
	list, err := c.client.ImageService().List(withNamespace(ctx), fmt.Sprintf("labels.%q", ownedLabel))
	if err != nil {
		return nil, fmt.Errorf("listing images: %w", err)
	}
	out := make(map[string]bool, len(list))
	for i := range list {
		out[list[i].Name] = true
	}
	return out, nil
}
