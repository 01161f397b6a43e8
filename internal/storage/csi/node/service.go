// Package node is the node service of the CSI driver: it gives volumes to the pods of this host.
//
// A volume for a micro-VM pod is not opened here and mounted nowhere on the host. NodePublishVolume attaches
// it to the pod in the engine, leaves a record for the pod's shim (package handover) and makes the directory
// that the kubelet wants to see; the shim then asks how to open the volume (MethodOpen of package attach,
// answered by Run) and is asked for statistics, snapshots, growth and limits. A block volume has a loop device
// over an empty file in its place, since the kubelet and containerd insist on a device.
//
// A virtual machine has volumes besides those of its pod, which come and go while it runs. Its shim just asks; they
// are attached and recorded then, if the machine may have them, until the shim says that they are closed, or is gone.
//
// A pod of the host (runtime class "runc") gets the volume mounted on the host: a storage daemon of QEMU
// (package export) shows the volume as one file, which becomes a loop device that is mounted at the target.
//
// What is published is recorded before anything is done, in one file per target path, so that every call can
// be made again after a crash at any point, by another process, and undone from the record alone.
//
// internal/agent wires the service into the CSI driver (internal/storage/csi), for which it implements
// csi.NodeServer and Open. What can go wrong: errors of the engine; a shim that does not answer; the volume
// of a pod that is not quite gone (FailedPrecondition, the kubelet tries again); on the host what
// package export says.
package node

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/stores"
)

// Config of a Service.
type Config struct {
	// Node is the name of this host's Node.
	Node   string
	Stores *stores.Set
	// Kubelet is the kubelet's root directory, RunDir where shims leave their records and find the agent.
	Kubelet, RunDir string
	// MicroVM tells whether a pod runs in a micro-VM. Without it all pods do.
	MicroVM func(ctx context.Context, namespace, name, uid string) (bool, error)
	// MayUse tells why a virtual machine may not have a volume that is not published for its pod; nil if it may.
	// Without it no machine may.
	MayUse func(ctx context.Context, r attach.OpenRequest) error
	// Export makes volumes visible on the host; nil: pods of the host cannot have any.
	Export Exporter
	Logger *slog.Logger
}

// Service is the node service.
type Service struct {
	csispec.UnimplementedNodeServer
	cfg     Config
	records attach.Records
	targets targets

	mu    sync.Mutex             // guards the field below
	locks map[string]*sync.Mutex // by volume, held over each change of it
}

var (
	_ csispec.NodeServer = (*Service)(nil)
	_ csi.Open           = (*Service)(nil)
)

// New checks the configuration and touches nothing.
func New(cfg Config) (*Service, error) {
	if cfg.Node == "" || cfg.Stores == nil || !filepath.IsAbs(cfg.Kubelet) || !filepath.IsAbs(cfg.RunDir) {
		return nil, errors.New("csi node service: Node, Stores, Kubelet and RunDir must be set")
	}
	if cfg.MicroVM == nil {
		cfg.MicroVM = func(context.Context, string, string, string) (bool, error) { return true, nil }
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Service{
		cfg: cfg, records: attach.NewRecords(cfg.RunDir), locks: map[string]*sync.Mutex{},
		targets: newTargets(cfg.Kubelet),
	}, nil
}

// Run answers shims until ctx ends. Volumes on the host that were published before are taken over, and what an
// agent has left that died in the middle of publishing one is ended.
func (s *Service) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Logger.Warn("ending exports of volumes that nobody needs", "error", err)
		}
	})
	wg.Go(func() { s.sweepMachines(ctx) })
	l, err := attach.Listen(attach.AgentSocket(s.cfg.RunDir))
	if err != nil {
		return err
	}
	err = attach.Serve(ctx, l, map[string]attach.Handler{
		attach.MethodOpen: attach.Handle(s.open), attach.MethodClose: attach.Handle(s.close),
		attach.MethodSnapshots: attach.Handle(s.snapshots),
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// lock keeps others from a volume until the function it returns is called.
func (s *Service) lock(volume string) (unlock func()) {
	s.mu.Lock()
	l := s.locked(volume)
	s.mu.Unlock()
	l.Lock()
	return l.Unlock
}

// tryLock is lock, but false when somebody has it.
func (s *Service) tryLock(volume string) (unlock func(), ok bool) {
	s.mu.Lock()
	l := s.locked(volume)
	s.mu.Unlock()
	return l.Unlock, l.TryLock()
}

// locked finds the mutex of a volume. Callers hold mu.
func (s *Service) locked(volume string) *sync.Mutex {
	l := s.locks[volume]
	if l == nil {
		l = &sync.Mutex{}
		s.locks[volume] = l
	}
	return l
}

// NodeGetInfo implements csi.NodeServer.
func (s *Service) NodeGetInfo(context.Context, *csispec.NodeGetInfoRequest) (*csispec.NodeGetInfoResponse, error) {
	return &csispec.NodeGetInfoResponse{
		NodeId:             s.cfg.Node,
		AccessibleTopology: &csispec.Topology{Segments: map[string]string{csi.TopologyKey: s.cfg.Node}},
	}, nil
}

// NodeGetCapabilities implements csi.NodeServer. There is no staging: it would do nothing.
func (s *Service) NodeGetCapabilities(context.Context, *csispec.NodeGetCapabilitiesRequest) (*csispec.NodeGetCapabilitiesResponse, error) {
	var out []*csispec.NodeServiceCapability
	for _, t := range []csispec.NodeServiceCapability_RPC_Type{
		csispec.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csispec.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csispec.NodeServiceCapability_RPC_VOLUME_CONDITION,
		csispec.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
		csispec.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		out = append(out, &csispec.NodeServiceCapability{
			Type: &csispec.NodeServiceCapability_Rpc{Rpc: &csispec.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return &csispec.NodeGetCapabilitiesResponse{Capabilities: out}, nil
}
