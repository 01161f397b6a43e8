package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// Name is the driver's name in StorageClasses and PersistentVolumes.
const Name = "csi.atoll.dev"

// TopologyKey is the node label that says which host a volume is on; its value is the node's name.
const TopologyKey = "topology.csi.atoll.dev/node"

// Open reaches the volumes that something on this host has open. The node service implements it.
type Open interface {
	// Live changes a volume that is open for writing. It is nil when the volume is not.
	Live(handle string) datastore.Live
	// Limit makes limits hold for a volume that is open. A volume that is not open is no error: the limits
	// are read again when it is opened.
	Limit(ctx context.Context, handle string, limits Limits) error
	// Users names what has a volume open.
	Users(handle string) []string
	// InMachine tells whether a virtual machine has a volume, whose guest grows its file systems itself.
	InMachine(handle string) bool
}

// Config of a driver.
type Config struct {
	// Version is Atoll's version.
	Version string
	// Node is the name of this host's Node, which is its CSI node id as well.
	Node string
	// Stores are the datastores of this host.
	Stores *stores.Set
	// Open may be nil: nothing is ever open.
	Open Open
	// NodeService may be nil: there is none.
	NodeService csi.NodeServer
	// Encryption, if set, returns the class of encryption of a claim's volume, or "". fallback is what the
	// StorageClass says. It is not called for a volume that is there. datastore.ErrUnavailable: nobody can say
	// now, and asking again may help.
	Encryption func(ctx context.Context, namespace, claim, fallback string) (string, error)
	// Images may be nil: no claim names an image.
	Images Images
	// Socket is the absolute path of the unix socket to serve at.
	Socket string
	Logger *slog.Logger
	// OnChange, if set, is called after each call that has changed volumes or snapshots.
	OnChange func()
	// OnReady, if set, is called when the socket accepts calls.
	OnReady func()
}

// Driver is the CSI driver of one host.
type Driver struct {
	cfg   Config
	calls calls
}

// New checks the configuration and touches nothing.
func New(cfg Config) (*Driver, error) {
	switch {
	case cfg.Node == "" || cfg.Stores == nil:
		return nil, errors.New("csi driver: Node and Stores must be set")
	case !strings.HasPrefix(cfg.Socket, "/"):
		return nil, fmt.Errorf("csi driver: Socket must be an absolute path, got %q", cfg.Socket)
	}
	if cfg.Open == nil {
		cfg.Open = nothingOpen{}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Driver{cfg: cfg}, nil
}

// stopWithin is how long calls that are under way may take when the driver stops.
const stopWithin = 5 * time.Second

// Run serves until ctx ends, then waits a little for calls that are under way. It fails when the socket
// cannot be made.
func (d *Driver) Run(ctx context.Context) error {
	if err := os.Remove(d.cfg.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("csi driver: removing the old socket: %w", err)
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "unix", d.cfg.Socket)
	if err != nil {
		return fmt.Errorf("csi driver: %w", err)
	}
	if err := os.Chmod(d.cfg.Socket, 0o600); err != nil {
		return fmt.Errorf("csi driver: %w", errors.Join(err, listener.Close()))
	}
	server := d.server()
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(stopWithin, server.Stop)
		server.GracefulStop()
		timer.Stop()
	})
	defer stop()
	if d.cfg.OnReady != nil {
		d.cfg.OnReady()
	}
	err = server.Serve(listener)
	d.calls.stop()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("csi driver: %w", err)
}

// server has all services registered.
func (d *Driver) server() *grpc.Server {
	s := grpc.NewServer(grpc.UnaryInterceptor(d.intercept))
	csi.RegisterIdentityServer(s, &identity{cfg: d.cfg})
	csi.RegisterControllerServer(s, &controller{cfg: d.cfg, calls: &d.calls})
	if d.cfg.NodeService != nil {
		csi.RegisterNodeServer(s, d.cfg.NodeService)
	}
	return s
}

// intercept translates errors and logs what failed. Requests may hold secrets and are never logged.
func (d *Driver) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	begin := time.Now()
	answer, err := handler(ctx, req)
	err = Status(err)
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	if err == nil && d.cfg.OnChange != nil && changes(method) {
		d.cfg.OnChange()
	}
	switch took := time.Since(begin).Round(time.Millisecond); {
	case err != nil:
		d.cfg.Logger.Warn("storage call failed", "method", method, "took", took, "error", err)
	case took > time.Second:
		d.cfg.Logger.Info("storage call was slow", "method", method, "took", took)
	default:
		d.cfg.Logger.Debug("storage call", "method", method, "took", took)
	}
	return answer, err
}

// changes tells whether a method changes what a datastore holds.
func changes(method string) bool {
	switch method {
	case "CreateVolume", "DeleteVolume", "ControllerExpandVolume", "CreateSnapshot", "DeleteSnapshot", "NodePublishVolume", "NodeUnpublishVolume":
		return true
	}
	return false
}

// Holder names one use of a volume on a node: the text that the engine keeps as the holder.
func Holder(node, use string) string { return node + "/" + use }

// heldBy returns the attachments of a node.
func heldBy(v datastore.Volume, node string) []datastore.Attachment {
	var out []datastore.Attachment
	for _, a := range v.Attachments {
		if strings.HasPrefix(a.Holder, node+"/") {
			out = append(out, a)
		}
	}
	return out
}

// nothingOpen is an Open of nothing.
type nothingOpen struct{}

func (nothingOpen) Live(string) datastore.Live                  { return nil }
func (nothingOpen) Limit(context.Context, string, Limits) error { return nil }
func (nothingOpen) Users(string) []string                       { return nil }
func (nothingOpen) InMachine(string) bool                       { return false }
