package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LoadOptions are the choices of Load.
type LoadOptions struct {
	// Source names the archive in errors: a file name, or "standard input".
	Source string
	// Name is the name to give an image whose archive does not name it in
	// full. An archive that does keeps its own names.
	Name string
	// Progress, if set, is called after each step and, while the archive is
	// read, now and then.
	Progress func(Progress)
}

// Progress is how far a Load has come.
type Progress struct {
	Stage string // "reading", "unpacking", "merging" or "done"
	Image string // name of the image; empty while reading
	Bytes int64  // of the archive read so far
}

// Load imports the images of an OCI archive or a `docker save` archive, plain
// or compressed with gzip or zstd, unpacks them for micro-VMs and waits until
// the kubelet can see them. It returns the names that the images now have.
func (c *Client) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]string, error) {
	names, err := c.load(withNamespace(ctx), r, o)
	if err != nil {
		return nil, fmt.Errorf("loading images from %s: %w", o.Source, err)
	}
	return names, nil
}

func (c *Client) load(ctx context.Context, r io.Reader, o LoadOptions) ([]string, error) {
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	// A lease keeps the garbage collector away from what has no name yet.
	ctx, done, err := c.client.WithLease(ctx)
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd: %w", err)
	}
	defer done(context.WithoutCancel(ctx))

	counter := &countingReader{r: r, progress: o.Progress}
	plainTar, err := decompress(counter)
	if err != nil {
		return nil, err
	}
	defer plainTar.Close()
	index, err := c.readArchive(ctx, plainTar)
	if err != nil {
		return nil, err
	}
	var names []string
	var foreign []ocispec.Platform
	for _, m := range index.Manifests {
		if m.Platform != nil && !platforms.Default().Match(platforms.Normalize(*m.Platform)) {
			foreign = append(foreign, *m.Platform)
			continue
		}
		added, err := c.addImage(ctx, m, o)
		if err != nil {
			return names, err
		}
		names = append(names, added...)
	}
	if len(names) == 0 && len(foreign) > 0 {
		return nil, fmt.Errorf("the images in it are for %s, this host runs %s", formatAll(foreign), platforms.DefaultString())
	}
	if len(names) == 0 {
		return nil, errors.New("the archive holds no image")
	}
	for _, name := range names {
		if err := c.waitVisible(ctx, name); err != nil {
			return names, err
		}
	}
	o.Progress(Progress{Stage: "done", Bytes: counter.n})
	return slices.Compact(names), nil
}

// addImage checks one manifest of an archive, unpacks its image and gives it
// its names.
func (c *Client) addImage(ctx context.Context, m ocispec.Descriptor, o LoadOptions) ([]string, error) {
	tags, err := tagNames(m, o.Name)
	if err != nil {
		return nil, err
	}
	if err := c.checkPlatform(ctx, tags[0], m); err != nil {
		return nil, err
	}
	img := images.Image{Name: tags[0], Target: m}
	handler := images.SetChildrenLabels(c.client.ContentStore(), images.FilterPlatforms(images.ChildrenHandler(c.client.ContentStore()), platforms.Default()))
	if err := images.Walk(ctx, handler, m); err != nil {
		return nil, fmt.Errorf("image %s: %w", tags[0], err)
	}
	o.Progress(Progress{Stage: "unpacking", Image: tags[0]})
	if err := client.NewImage(c.client, img).Unpack(ctx, snapshotter); err != nil {
		return nil, fmt.Errorf("unpacking %s: %w", tags[0], err)
	}
	o.Progress(Progress{Stage: "merging", Image: tags[0]})
	if err := c.merge(ctx, img); err != nil {
		return nil, fmt.Errorf("merging the layers of %s: %w", tags[0], err)
	}
	names := withDigests(tags, m)
	for _, name := range names {
		if err := c.setName(ctx, images.Image{Name: name, Target: m}); err != nil {
			return nil, fmt.Errorf("naming image %s: %w", name, err)
		}
	}
	return names, c.own(ctx, m, names)
}

// tagNames returns the names an archive gives an image.
func tagNames(m ocispec.Descriptor, override string) ([]string, error) {
	name := m.Annotations[images.AnnotationImageName]
	if name == "" {
		name = m.Annotations[ocispec.AnnotationRefName]
		// "The reference name" is often a mere tag.
		if ref, err := reference.ParseNormalizedNamed(name); err != nil || reference.IsNameOnly(ref) && !strings.Contains(name, "/") {
			name = ""
		}
	}
	if name == "" {
		name = override
	}
	if name == "" {
		return nil, fmt.Errorf("image %s in it has no name (reference name %q); give one", m.Digest, m.Annotations[ocispec.AnnotationRefName])
	}
	full, err := Normalize(name)
	if err != nil {
		return nil, err
	}
	return []string{full}, nil
}

// withDigests adds the names by digest that a pull would have made.
func withDigests(tags []string, m ocispec.Descriptor) []string {
	names := slices.Clone(tags)
	for _, t := range tags {
		ref, err := reference.ParseNormalizedNamed(t)
		if err != nil {
			continue
		}
		if d, err := reference.WithDigest(reference.TrimNamed(ref), m.Digest); err == nil && !slices.Contains(names, d.String()) {
			names = append(names, d.String())
		}
	}
	return names
}

// checkPlatform refuses images this host cannot run.
func (c *Client) checkPlatform(ctx context.Context, name string, m ocispec.Descriptor) error {
	store, want := c.client.ContentStore(), platforms.Default()
	config, err := images.Config(ctx, store, m, want)
	if errdefs.IsNotFound(err) {
		if have, err := images.Platforms(ctx, store, m); err == nil && len(have) > 0 {
			return fmt.Errorf("image %s is for %s, this host runs %s", name, formatAll(have), platforms.DefaultString())
		}
	}
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	b, err := content.ReadBlob(ctx, store, config)
	if err != nil {
		return fmt.Errorf("image %s: reading its configuration: %w", name, err)
	}
	var p ocispec.Platform
	if err := json.Unmarshal(b, &p); err != nil {
		return fmt.Errorf("image %s: reading its configuration: %w", name, err)
	}
	if p.OS != "" && !want.Match(platforms.Normalize(p)) {
		return fmt.Errorf("image %s is for %s, this host runs %s", name, platforms.Format(p), platforms.DefaultString())
	}
	return nil
}

func formatAll(ps []ocispec.Platform) string {
	var out []string
	for _, p := range ps {
		out = append(out, platforms.Format(p))
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), ", ")
}

// merge has the snapshotter make the image file now rather than when the first
// pod starts: that is what preparing a snapshot of the chain does.
func (c *Client) merge(ctx context.Context, img images.Image) error {
	diffIDs, err := img.RootFS(ctx, c.client.ContentStore(), platforms.Default())
	if err != nil || len(diffIDs) == 0 {
		return err
	}
	sn := c.client.SnapshotService(snapshotter)
	key := path.Join("load", img.Target.Digest.String(), fmt.Sprint(time.Now().UnixNano()))
	if _, err := sn.View(ctx, key, identity.ChainID(diffIDs).String(), snapshots.WithLabels(nil)); err != nil {
		return err
	}
	return sn.Remove(context.WithoutCancel(ctx), key)
}

func (c *Client) setName(ctx context.Context, img images.Image) error {
	_, err := c.client.ImageService().Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = c.client.ImageService().Update(ctx, img, "target")
	}
	return err
}

// waitVisible waits until the CRI plugin, which learns of new names through
// events, knows name.
func (c *Client) waitVisible(ctx context.Context, name string) error {
	return wait(ctx, name, func() (bool, error) {
		_, err := c.Status(ctx, name)
		if errors.Is(err, ErrNotFound) {
			return false, nil
		}
		return err == nil, err
	})
}

// countingReader reports how much of the archive has been read.
type countingReader struct {
	r        io.Reader
	n, told  int64
	progress func(Progress)
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 1<<20 || err == io.EOF {
		c.told = c.n
		c.progress(Progress{Stage: "reading", Bytes: c.n})
	}
	return n, err
}
