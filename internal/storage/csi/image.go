package csi

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/images"
	"atoll.dev/atoll/internal/storage/library"
	"atoll.dev/atoll/internal/storage/stores"
)

// Image is the image that a claim wants a copy of.
type Image struct {
	images.Disk
	// Size of the disk in bytes.
	Size int64
}

// Images makes volumes that are copies of images.
type Images interface {
	// Claim returns the image that a claim names, or nil. datastore.ErrUnavailable: nobody can say now, and asking
	// again may help; any other error is for the person who made the claim.
	Claim(ctx context.Context, namespace, claim string) (*Image, error)
	// Ensure imports a disk into a datastore, unless it is there. images.Importer does.
	Ensure(ctx context.Context, s stores.Store, d images.Disk) (datastore.Volume, error)
	// Progress tells how far an import is.
	Progress(d images.Disk) (store string, percent int64, running bool)
}

// image finds out which image a volume is to be a copy of, and completes the plan. It is nil for none.
func (c *controller) image(ctx context.Context, p *plan) (*Image, error) {
	claim, namespace := p.policy.Labels[stores.LabelClaim], p.policy.Labels[stores.LabelNamespace]
	if c.cfg.Images == nil || claim == "" || namespace == "" {
		return nil, nil
	}
	image, err := c.cfg.Images.Claim(ctx, namespace, claim)
	switch {
	case errors.Is(err, datastore.ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		return nil, status.Error(codes.Unavailable, err.Error())
	case err != nil:
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	case image == nil:
		return nil, nil
	case p.source != "":
		return nil, invalid("claim %s/%s names both an image and a dataSource; remove one of them", namespace, claim)
	case p.fsType != "":
		return nil, invalid("claim %s/%s names an image, which is a whole disk; set spec.volumeMode to Block", namespace, claim)
	case p.shared:
		return nil, invalid("claim %s/%s names an image, and access mode ReadWriteMany, which copies cannot have; use ReadWriteOnce", namespace, claim)
	case p.spec.Size < image.Size:
		return nil, invalid("claim %s/%s asks for %d bytes, and image %s has %d (%s); set spec.resources.requests.storage to %s or more",
			namespace, claim, p.spec.Size, image.Name, image.Size, mebibytes(image.Size), mebibytes(image.Size))
	case p.spec.Limit > 0 && p.spec.Limit < image.Size:
		return nil, invalid("claim %s/%s has the limit %d, and image %s has %d bytes", namespace, claim, p.spec.Limit, image.Name, image.Size)
	}
	return image, nil
}

// mebibytes writes a size as a claim may ask for it.
func mebibytes(n int64) string {
	if n = (n + 1<<20 - 1) >> 20; n%1024 == 0 {
		return fmt.Sprintf("%dGi", n/1024)
	}
	return fmt.Sprintf("%dMi", n)
}

// importing imports the image of a volume into a datastore, and makes the volume one of its copies.
func (c *controller) importing(ctx context.Context, s stores.Store, image *Image, spec *datastore.Spec) error {
	v, err := c.cfg.Images.Ensure(ctx, s, image.Disk)
	switch {
	case errors.Is(err, library.ErrNotFound):
		return status.Errorf(codes.Unavailable, "image %s: its content is not on node %s: %v", image.Name, c.cfg.Node, err)
	case err != nil:
		return err
	}
	spec.Source = &datastore.Source{Volume: v.ID}
	return nil
}

// underway says more about an operation that goes on in the background, if it is an import.
func (c *controller) underway(ctx context.Context, p plan, err error) error {
	if status.Code(err) != codes.Aborted || c.cfg.Images == nil {
		return err
	}
	image, lookErr := c.image(context.WithoutCancel(ctx), &p)
	if lookErr != nil || image == nil {
		return err
	}
	if store, percent, running := c.cfg.Images.Progress(image.Disk); running {
		return status.Errorf(codes.Aborted, "importing image %s into datastore %q: %d %% done", image.Name, store, percent)
	}
	return err
}
