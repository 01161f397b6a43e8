// Package imageservice is the CRI image service between the kubelet and containerd. It passes everything on, and keeps
// what one namespace pulls from changing what others may run.
//
// The kubelet gives a pod an image that is there without asking a registry only if it has not pulled that image itself
// with somebody's credentials (KubeletEnsureSecretPulledImages). It goes by the image's ID, so an image that the
// administrator has loaded, and that everybody runs, would be nobody's any more as soon as a namespace pushes the same
// bytes to its project and pulls them from there. Therefore images that were loaded are known to the kubelet by their
// repository and digest: ImageStatus has that in place of the ID, and containerd takes it wherever it takes an ID. The
// kubelet's collection of garbage compares IDs, and would not see that such an image is used as a volume; lists say of
// loaded images that they are pinned, which also keeps what there is nowhere to pull from.
//
// kubelet.Run calls it. What can go wrong: the socket cannot be made, which ends Serve; containerd does not answer, which
// the kubelet is told.
package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is what the kubelet takes, in bytes: a list of many images is long.
const maxMessage = 16 << 20

// stopWithin is how long calls that are under way may take at the end.
const stopWithin = 5 * time.Second

// retryMost is how long it may take until containerd is tried again.
const retryMost = 3 * time.Second

// Config of a service.
type Config struct {
	// Socket is the path of the unix socket to serve at, made with mode 0600.
	Socket string
	// Containerd is the path of containerd's socket.
	Containerd string
	Owned      Owned
}

// Owned knows which images an administrator has loaded or pulled.
type Owned interface {
	// Owned returns repository@digest of the image with an ID if an administrator has given it the name, and else "".
	Owned(ctx context.Context, name, id string) (string, error)
	// OwnedIDs are the IDs of all such images.
	OwnedIDs(ctx context.Context) (map[string]bool, error)
}

// Listen makes the socket. Calls to it wait for Serve.
func Listen(ctx context.Context, cfg Config) (net.Listener, error) {
	if err := os.Remove(cfg.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("image service: removing the old socket: %w", err)
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "unix", cfg.Socket)
	if err != nil {
		return nil, fmt.Errorf("image service: %w", err)
	}
	if err := os.Chmod(cfg.Socket, 0o600); err != nil {
		return nil, fmt.Errorf("image service: %w", errors.Join(err, listener.Close()))
	}
	return listener, nil
}

// Serve answers until ctx ends.
func Serve(ctx context.Context, cfg Config, listener net.Listener) error {
	again := backoff.DefaultConfig
	again.MaxDelay = retryMost
	conn, err := grpc.NewClient("unix://"+cfg.Containerd, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)), grpc.WithConnectParams(grpc.ConnectParams{Backoff: again}))
	if err != nil {
		return fmt.Errorf("image service: connecting to containerd: %w", err)
	}
	defer func() { _ = conn.Close() }()
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	cri.RegisterImageServiceServer(server, &service{next: cri.NewImageServiceClient(conn), owned: cfg.Owned})
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(stopWithin, server.Stop)
		server.GracefulStop()
		timer.Stop()
	})
	defer stop()
	if err := server.Serve(listener); err != nil && ctx.Err() == nil {
		return fmt.Errorf("image service: %w", err)
	}
	return nil
}

// service passes calls on. Errors go as they come: the kubelet reads their codes and words.
type service struct {
	cri.UnimplementedImageServiceServer

	next  cri.ImageServiceClient
	owned Owned
}

// ImageStatus implements cri.ImageServiceServer.
func (s *service) ImageStatus(ctx context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	resp, err := s.next.ImageStatus(ctx, r)
	if err != nil || resp.GetImage() == nil {
		return resp, err
	}
	ref, err := s.owned.Owned(ctx, r.GetImage().GetImage(), resp.GetImage().GetId())
	if err != nil {
		return nil, err
	}
	if ref != "" {
		resp.Image.Id = ref
	}
	return resp, nil
}

// ListImages implements cri.ImageServiceServer.
func (s *service) ListImages(ctx context.Context, r *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	ids, err := s.owned.OwnedIDs(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := s.next.ListImages(ctx, r)
	pin(resp.GetImages(), ids)
	return resp, err
}

// pin keeps images from the kubelet's collection of garbage.
func pin(list []*cri.Image, ids map[string]bool) {
	for _, i := range list {
		i.Pinned = i.GetPinned() || ids[i.GetId()]
	}
}

// StreamImages implements cri.ImageServiceServer.
func (s *service) StreamImages(r *cri.StreamImagesRequest, out grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	ids, err := s.owned.OwnedIDs(out.Context())
	if err != nil {
		return err
	}
	in, err := s.next.StreamImages(out.Context(), r)
	if err != nil {
		return err
	}
	for {
		part, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		pin(part.GetImages(), ids)
		if err := out.Send(part); err != nil {
			return err
		}
	}
}

// PullImage implements cri.ImageServiceServer.
func (s *service) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	return s.next.PullImage(ctx, r)
}

// RemoveImage implements cri.ImageServiceServer.
func (s *service) RemoveImage(ctx context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	return s.next.RemoveImage(ctx, r)
}

// ImageFsInfo implements cri.ImageServiceServer.
func (s *service) ImageFsInfo(ctx context.Context, r *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return s.next.ImageFsInfo(ctx, r)
}
