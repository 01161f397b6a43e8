package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registration is the service at which the kubelet asks what plugin this is.
type registration struct {
	registerapi.UnsafeRegistrationServer
	cfg Config
}

// GetInfo implements registerapi.RegistrationServer.
func (r registration) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{Type: registerapi.CSIPlugin, Name: r.cfg.Driver, Endpoint: r.cfg.Socket, SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus implements registerapi.RegistrationServer. The kubelet asks again after an error.
func (r registration) NotifyRegistrationStatus(_ context.Context, s *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	if !s.GetPluginRegistered() {
		r.cfg.Logger.Error("the kubelet did not register the storage driver", "error", s.GetError())
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}

// register serves the registration socket until ctx ends. The kubelet watches the directory, and takes a
// socket that goes away for a plugin that does.
func (s *sidecars) register(ctx context.Context) error {
	if err := os.MkdirAll(s.cfg.RegistryDir, 0o750); err != nil {
		return fmt.Errorf("registering with the kubelet: %w", err)
	}
	path := filepath.Join(s.cfg.RegistryDir, s.cfg.Driver+"-reg.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("registering with the kubelet: %w", err)
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("registering with the kubelet: %w", err)
	}
	server := grpc.NewServer()
	registerapi.RegisterRegistrationServer(server, registration{cfg: s.cfg})
	defer context.AfterFunc(ctx, server.Stop)()
	if err := server.Serve(listener); err != nil && ctx.Err() == nil {
		return fmt.Errorf("registering with the kubelet: %w", err)
	}
	return nil
}
