package csi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/images"
	"atoll.dev/atoll/internal/storage/library"
	"atoll.dev/atoll/internal/storage/stores"
)

// pictures is one image.
type pictures struct {
	image   *Image
	err     error
	percent int64
}

func (p pictures) Claim(context.Context, string, string) (*Image, error) { return p.image, p.err }

func (p pictures) Ensure(context.Context, stores.Store, images.Disk) (datastore.Volume, error) {
	return datastore.Volume{ID: "image-x-0"}, p.err
}

func (p pictures) Progress(images.Disk) (string, int64, bool) {
	return "fast", p.percent, p.percent > 0
}

func claimed(size int64) plan {
	return plan{spec: datastore.Spec{ID: "v", Size: size}, policy: Policy{Labels: map[string]string{stores.LabelClaim: "boot", stores.LabelNamespace: "team"}}}
}

// TestImageOfClaim: what does not fit is refused with what to do about it.
func TestImageOfClaim(t *testing.T) {
	image := &Image{Disk: images.Disk{Item: "x", Name: "VirtualMachineImage/vmi-1"}, Size: 10 << 30}
	with := func(change func(*plan)) plan {
		p := claimed(10 << 30)
		change(&p)
		return p
	}
	for name, c := range map[string]struct {
		plan   plan
		images pictures
		code   codes.Code
		text   string
	}{
		"fits":       {claimed(10 << 30), pictures{image: image}, codes.OK, ""},
		"none":       {claimed(1 << 30), pictures{}, codes.OK, ""},
		"small":      {claimed(5 << 30), pictures{image: image}, codes.InvalidArgument, "asks for 5368709120 bytes, and image VirtualMachineImage/vmi-1 has 10737418240 (10Gi); set spec.resources.requests.storage to 10Gi"},
		"limit":      {with(func(p *plan) { p.spec.Limit = 5 << 30 }), pictures{image: image}, codes.InvalidArgument, "limit"},
		"filesystem": {with(func(p *plan) { p.fsType = "ext4" }), pictures{image: image}, codes.InvalidArgument, "volumeMode to Block"},
		"source":     {with(func(p *plan) { p.source = "a/b" }), pictures{image: image}, codes.InvalidArgument, "dataSource"},
		"many":       {with(func(p *plan) { p.shared = true }), pictures{image: image}, codes.InvalidArgument, "ReadWriteMany"},
		"not ready":  {claimed(1 << 30), pictures{err: errors.New("image is not ready")}, codes.FailedPrecondition, "not ready"},
		"no answer":  {claimed(1 << 30), pictures{err: fmt.Errorf("%w: api", datastore.ErrUnavailable)}, codes.Unavailable, "api"},
	} {
		ctl := &controller{cfg: Config{Images: c.images}}
		got, err := ctl.image(t.Context(), &c.plan)
		if status.Code(err) != c.code || err != nil && !strings.Contains(err.Error(), c.text) || err == nil && got != c.images.image {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// TestImporting: an import that takes long says how far it is, and content that is elsewhere is waited for.
func TestImporting(t *testing.T) {
	image := &Image{Disk: images.Disk{Item: "x", Name: "i"}, Size: 1 << 30}
	ctl := &controller{cfg: Config{Node: "n1", Images: pictures{image: image, percent: 37}}}
	err := ctl.underway(t.Context(), claimed(1<<30), status.Error(codes.Aborted, "goes on"))
	if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), `importing image i into datastore "fast": 37 % done`) {
		t.Error(err)
	}
	if err := ctl.underway(t.Context(), claimed(1<<30), status.Error(codes.Internal, "other")); status.Code(err) != codes.Internal {
		t.Error(err)
	}
	var spec datastore.Spec
	if err := ctl.importing(t.Context(), stores.Store{}, image, &spec); err != nil || spec.Source.Volume != "image-x-0" {
		t.Errorf("%+v, %v", spec, err)
	}
	ctl.cfg.Images = pictures{err: library.ErrNotFound}
	if err := ctl.importing(t.Context(), stores.Store{}, image, &spec); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "n1") {
		t.Error(err)
	}
}
