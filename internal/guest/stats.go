package guest

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/cgroup"
	"atoll.dev/atoll/internal/guest/usage"
)

// noLimit is above any memory size: such values mean "max".
const noLimit = 1 << 62

// Stats implements the protocol.
func (s *server) Stats(_ context.Context, req *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	if id := req.GetContainerId(); id != "" {
		c, err := s.theContainer(id)
		if err != nil {
			return nil, err
		}
		st, layer, err := c.Stats()
		if err != nil {
			return nil, status(err)
		}
		return fillStats(st, layer)
	}
	st, err := s.m.tree.Pod().Stats()
	if err != nil {
		return nil, status(err)
	}
	var layers usage.Usage
	for _, c := range p.containers.List() {
		if _, u, err := c.Stats(); err == nil {
			layers.Bytes += u.Bytes
			layers.Inodes += u.Inodes
		}
	}
	resp, err := fillStats(st, layers)
	if err != nil {
		return nil, err
	}
	for _, v := range p.volumes.List() {
		u, err := v.Usage()
		if err != nil {
			return nil, status(err)
		}
		resp.Volumes = append(resp.Volumes, &guestv1.VolumeUsage{Id: v.ID, UsedBytes: u.Bytes, UsedInodes: u.Inodes})
	}
	if _, resp.ScratchCapacityBytes, resp.ScratchAvailableBytes, err = usage.FileSystem(scratchDir); err != nil {
		return nil, status(err)
	}
	resp.Networks = networkUsage("eth0")
	return resp, nil
}

func fillStats(st cgroup.Stats, layer usage.Usage) (*guestv1.StatsResponse, error) {
	m := st.Metrics
	raw, err := proto.Marshal(m)
	if err != nil {
		return nil, status(err)
	}
	const micro = 1000
	resp := &guestv1.StatsResponse{
		CpuUsageNanos: m.GetCPU().GetUsageUsec() * micro, CpuUserNanos: m.GetCPU().GetUserUsec() * micro,
		CpuSystemNanos: m.GetCPU().GetSystemUsec() * micro, ThrottledPeriods: m.GetCPU().GetNrThrottled(),
		MemoryUsageBytes: m.GetMemory().GetUsage(), MemoryWorkingSetBytes: st.WorkingSet,
		MemoryRssBytes: m.GetMemory().GetAnon(), MemoryPageFaults: m.GetMemory().GetPgfault(),
		MemoryMajorPageFaults: m.GetMemory().GetPgmajfault(), InactiveFileBytes: m.GetMemory().GetInactiveFile(),
		OomKills: m.GetMemoryEvents().GetOomKill(), Pids: m.GetPids().GetCurrent(),
		RootfsUsedBytes: layer.Bytes, RootfsUsedInodes: layer.Inodes, CgroupMetrics: raw,
	}
	if limit := m.GetMemory().GetUsageLimit(); limit < noLimit {
		resp.MemoryLimitBytes = limit
	}
	return resp, nil
}

// networkUsage reads the counters of an interface from /proc/net/dev.
func networkUsage(name string) []*guestv1.NetworkUsage {
	data, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		return nil
	}
	for line := range bytes.Lines(data) {
		iface, rest, ok := strings.Cut(strings.TrimSpace(string(line)), ":")
		f := strings.Fields(rest)
		if !ok || iface != name || len(f) < 11 {
			continue
		}
		n := func(i int) uint64 {
			v, err := strconv.ParseUint(f[i], 10, 64)
			if err != nil {
				return 0
			}
			return v
		}
		return []*guestv1.NetworkUsage{{Name: name, RxBytes: n(0), RxErrors: n(2), TxBytes: n(8), TxErrors: n(10)}}
	}
	return nil
}
