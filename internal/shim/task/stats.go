package task

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
)

// maxDevices bounds the block devices in statistics.
const maxDevices = 64

// statistics is what containerd is told of a container's usage.
type statistics struct {
	metrics *stats.Metrics
}

// Stats returns the usage of a container. After its end it is the last one: containerd wants to know
// whether memory ran out.
func (s *Service) Stats(ctx context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	st := c.lastStatistics()
	if pod, perr := s.running(); perr == nil && c.isPrepared() && !c.init.hasEnded() {
		ctx, cancel := call(ctx)
		defer cancel()
		if st, err = s.statistics(ctx, pod, c); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	value, err := st.any(c.oomKilled())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &api.StatsResponse{Stats: value}, nil
}

// statistics asks the guest.
func (s *Service) statistics(ctx context.Context, pod *Pod, c *container) (*statistics, error) {
	resp, err := pod.Guest.Stats(ctx, &guestv1.StatsRequest{ContainerId: c.id})
	if err != nil {
		return nil, fmt.Errorf("reading statistics: %w", err)
	}
	m, err := Metrics(resp)
	if err != nil {
		return nil, err
	}
	c.reportUsage(resp)
	pod.Volumes.Measure()
	pod.Sustain() // the kubelet asks every few seconds
	st := &statistics{metrics: m}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = st
	return st, nil
}

// reportUsage tells the snapshotter what the writable layer takes, and so the kubelet, which evicts pods
// over their ephemeral-storage limit. The numbers are the guest's word about its own scratch disk. The
// statistics are right without the report, so that it fails is logged.
func (c *container) reportUsage(resp *guestv1.StatsResponse) {
	u := handover.Usage{
		Bytes: handover.Limit(resp.GetRootfsUsedBytes()), Inodes: handover.Limit(resp.GetRootfsUsedInodes()),
	}
	if err := u.Write(c.usage); err != nil {
		slog.Warn("reporting what a container takes on disk", "container", c.id, "error", err)
	}
}

// Metrics takes from a guest's answer what containerd reads. The bytes are the guest's: what is passed
// on is decoded, bounded and encoded anew.
func Metrics(resp *guestv1.StatsResponse) (*stats.Metrics, error) {
	var m stats.Metrics
	if err := proto.Unmarshal(resp.GetCgroupMetrics(), &m); err != nil {
		return nil, fmt.Errorf("decoding statistics: %w", err)
	}
	out := &stats.Metrics{Pids: m.Pids, CPU: m.CPU, Memory: m.Memory, MemoryEvents: m.MemoryEvents}
	if usage := m.GetIo().GetUsage(); len(usage) > 0 {
		out.Io = &stats.IOStat{Usage: usage[:min(len(usage), maxDevices)]}
	}
	for _, part := range []proto.Message{out.Pids, out.CPU, out.Memory, out.MemoryEvents, out.Io} {
		if r := part.ProtoReflect(); r.IsValid() {
			r.SetUnknown(nil)
		}
	}
	if out.CPU == nil {
		out.CPU = &stats.CPUStat{}
	}
	if out.Memory == nil {
		out.Memory = &stats.MemoryStat{}
	}
	return out, nil
}

// Any wraps metrics as containerd wants them.
func Any(m *stats.Metrics) (*anypb.Any, error) {
	value, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encoding statistics: %w", err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value}, nil
}

// any wraps the statistics, with what else is known about memory.
func (st *statistics) any(oom bool) (*anypb.Any, error) {
	m := &stats.Metrics{CPU: &stats.CPUStat{}, Memory: &stats.MemoryStat{}}
	if st != nil {
		m = proto.Clone(st.metrics).(*stats.Metrics)
	}
	if oom {
		if m.MemoryEvents == nil {
			m.MemoryEvents = &stats.MemoryEvents{}
		}
		m.MemoryEvents.OomKill = max(m.MemoryEvents.OomKill, 1)
	}
	return Any(m)
}

func (c *container) lastStatistics() *statistics {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

func (c *container) noteOOM() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.oom = true
}

func (c *container) oomKilled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.oom
}
