package imageservice

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fake is containerd with the images busybox and app, which are the same bytes.
type fake struct {
	cri.UnimplementedImageServiceServer
	removed string
}

const id = "sha256:0123"

func (f *fake) ImageStatus(_ context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	switch r.GetImage().GetImage() {
	case "busybox", "registry.atoll.local/shop/app:1", id:
		return &cri.ImageStatusResponse{Image: &cri.Image{Id: id, Size: 7, Username: "nobody"}}, nil
	case "broken":
		return nil, status.Error(codes.Unavailable, "RegistryUnavailable: down")
	}
	return &cri.ImageStatusResponse{}, nil
}

func (f *fake) PullImage(context.Context, *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	return &cri.PullImageResponse{ImageRef: id}, nil
}

func (f *fake) RemoveImage(_ context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	f.removed = r.GetImage().GetImage()
	return &cri.RemoveImageResponse{}, nil
}

func (f *fake) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	return &cri.ListImagesResponse{Images: []*cri.Image{{Id: id}, {Id: "sha256:89ab"}}}, nil
}

func (f *fake) StreamImages(_ *cri.StreamImagesRequest, out grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	for range 3 {
		if err := out.Send(&cri.StreamImagesResponse{Images: []*cri.Image{{Id: id}}}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) ImageFsInfo(context.Context, *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return &cri.ImageFsInfoResponse{ImageFilesystems: []*cri.FilesystemUsage{{Timestamp: 3}}}, nil
}

// owned are images by name, all with the ID.
type owned map[string]string

func (o owned) Owned(_ context.Context, name, of string) (string, error) {
	ref, ok := o[name]
	if !ok || of != id {
		return "", errors.New("asked about " + name + " with ID " + of)
	}
	return ref, nil
}

func (o owned) OwnedIDs(context.Context) (map[string]bool, error) {
	return map[string]bool{id: true}, nil
}

func client(t *testing.T, f *fake, o owned) cri.ImageServiceClient {
	t.Helper()
	dir := t.TempDir()
	behind := filepath.Join(dir, "containerd.sock")
	listener, err := net.Listen("unix", behind)
	if err != nil {
		t.Fatal(err)
	}
	containerd := grpc.NewServer()
	cri.RegisterImageServiceServer(containerd, f)
	go func() { _ = containerd.Serve(listener) }()
	t.Cleanup(containerd.Stop)

	cfg := Config{Socket: filepath.Join(dir, "images.sock"), Containerd: behind, Owned: o}
	ctx, cancel := context.WithCancel(t.Context())
	own, err := Listen(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, cfg, own) }()
	conn, err := grpc.NewClient("unix://"+cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return cri.NewImageServiceClient(conn)
}

func TestNames(t *testing.T) {
	const ref = "docker.io/library/busybox@sha256:4567"
	c := client(t, &fake{}, owned{"busybox": ref, "registry.atoll.local/shop/app:1": "", id: ""})
	for name, want := range map[string]string{
		"busybox":                         ref,
		"registry.atoll.local/shop/app:1": id, // the same bytes
		id:                                id,
	} {
		r, err := c.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
		if err != nil || r.GetImage().GetId() != want || r.GetImage().GetSize() != 7 || r.GetImage().GetUsername() != "nobody" {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	if r, err := c.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "none"}}); err != nil || r.GetImage() != nil {
		t.Errorf("an image that is not there: %v, %v", r, err)
	}
	_, err := c.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "broken"}})
	if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "RegistryUnavailable: down" {
		t.Errorf("containerd's error: %v", err)
	}
}

func TestPassedOn(t *testing.T) {
	f := &fake{}
	c := client(t, f, nil)
	if r, err := c.PullImage(t.Context(), &cri.PullImageRequest{}); err != nil || r.GetImageRef() != id {
		t.Errorf("%v, %v", r, err)
	}
	if r, err := c.ListImages(t.Context(), &cri.ListImagesRequest{}); err != nil || len(r.GetImages()) != 2 || !r.GetImages()[0].GetPinned() || r.GetImages()[1].GetPinned() {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := c.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: id}}); err != nil || f.removed != id {
		t.Errorf("removed %q, %v", f.removed, err)
	}
	if r, err := c.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{}); err != nil || r.GetImageFilesystems()[0].GetTimestamp() != 3 {
		t.Errorf("%v, %v", r, err)
	}
	stream, err := c.StreamImages(t.Context(), &cri.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		part, err := stream.Recv()
		if err != nil {
			break
		}
		if n++; !part.GetImages()[0].GetPinned() {
			t.Errorf("%v", part)
		}
	}
	if n != 3 {
		t.Errorf("%d parts of a stream", n)
	}
}
