// Package images loads, lists and removes the images of a node through its
// containerd. It is the logic behind `atoll image`; the printing is the
// command's.
//
// Images go to the namespace Kubernetes uses, are unpacked for micro-VMs at
// once and are given every name under which the kubelet may look for them, so
// a pod with imagePullPolicy IfNotPresent or Never finds them.
//
// The CLI and package containerd (for the pause image) call it. What can go
// wrong: the daemon is not running, the file is not an image archive, the image
// is for another architecture, the disk is full; errors name the source.
package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ErrNotFound means that there is no such image on the node.
var ErrNotFound = errors.New("image not found")

const (
	namespace   = "k8s.io"
	snapshotter = "atoll"
)

// Config says which daemon to talk to.
type Config struct {
	Address string // path of containerd's gRPC socket
}

// A Client manages the images of one node.
type Client struct {
	client *client.Client
	cri    cri.ImageServiceClient
}

// New connects to containerd. Close the result after use.
func New(c Config) (*Client, error) {
	cl, err := client.New(c.Address, client.WithDefaultNamespace(namespace), client.WithDefaultPlatform(platforms.Default()))
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd at %s: %w", c.Address, err)
	}
	conn, ok := cl.Conn().(*grpc.ClientConn)
	if !ok {
		cl.Close()
		return nil, fmt.Errorf("connecting to containerd at %s: not a gRPC connection", c.Address)
	}
	return &Client{cl, cri.NewImageServiceClient(conn)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.client.Close() }

func withNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// An Image is one image of the node.
type Image struct {
	ID     string   // digest of the configuration
	Names  []string // with tag or digest, sorted; none for a dangling image
	Size   int64    // bytes as pulled, that is compressed
	Pinned bool     // not removed when the disk fills up
}

func fromCRI(i *cri.Image) Image {
	names := slices.Concat(i.GetRepoTags(), i.GetRepoDigests())
	slices.Sort(names)
	return Image{ID: i.GetId(), Names: names, Size: int64(i.GetSize()), Pinned: i.GetPinned()}
}

// Status returns the image of a name, digest reference or ID.
func (c *Client) Status(ctx context.Context, name string) (Image, error) {
	r, err := c.cri.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
	if err != nil {
		return Image{}, plain(err)
	}
	if r.GetImage() == nil {
		return Image{}, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	return fromCRI(r.GetImage()), nil
}

// List returns the images of the node, sorted by name.
func (c *Client) List(ctx context.Context) ([]Image, error) {
	r, err := c.cri.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("listing images: %w", plain(err))
	}
	out := make([]Image, 0, len(r.GetImages()))
	for _, i := range r.GetImages() {
		out = append(out, fromCRI(i))
	}
	slices.SortFunc(out, func(a, b Image) int {
		return strings.Compare(strings.Join(a.Names, " ")+a.ID, strings.Join(b.Names, " ")+b.ID)
	})
	return out, nil
}

// Remove removes an image with all its names. Containers that run it keep
// running.
func (c *Client) Remove(ctx context.Context, name string) error {
	i, err := c.Status(ctx, name)
	if err != nil {
		return err
	}
	if _, err := c.cri.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: i.ID}}); err != nil {
		return fmt.Errorf("removing %s: %w", name, plain(err))
	}
	return nil
}

// Auth is what a registry asks for. The zero value is anonymous.
type Auth struct {
	Username, Password string
}

// Pull fetches an image from its registry, as the kubelet would.
func (c *Client) Pull(ctx context.Context, name string, auth Auth) (Image, error) {
	full, err := Normalize(name)
	if err != nil {
		return Image{}, err
	}
	req := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: full}}
	if auth != (Auth{}) {
		req.Auth = &cri.AuthConfig{Username: auth.Username, Password: auth.Password}
	}
	r, err := c.cri.PullImage(ctx, req)
	if err != nil {
		return Image{}, fmt.Errorf("pulling %s: %w", full, plain(err))
	}
	ctx = withNamespace(ctx)
	img, err := c.client.ImageService().Get(ctx, full)
	if err == nil {
		err = c.own(ctx, img.Target, withDigests([]string{full}, img.Target))
	}
	if err != nil {
		return Image{}, fmt.Errorf("pulling %s: %w", full, err)
	}
	return c.Status(ctx, r.GetImageRef())
}

// Normalize returns the full form of an image name as users write it:
// "busybox" is "docker.io/library/busybox:latest".
func Normalize(name string) (string, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w", name, err)
	}
	return ref.String(), nil
}

// plain strips gRPC's framing from an error's text.
func plain(err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	if s.Code() == codes.NotFound {
		return fmt.Errorf("%s: %w", s.Message(), ErrNotFound)
	}
	return errors.New(s.Message())
}

// FormatSize returns a size the way people read it, for example "12.3 MB".
func FormatSize(n int64) string {
	units := []string{"kB", "MB", "GB", "TB"}
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n)
	for i, unit := range units {
		if f /= 1000; f < 999.95 || i == len(units)-1 {
			return fmt.Sprintf("%.1f %s", f, unit)
		}
	}
	return ""
}
