package cgroup

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
)

// Stats is a reading of one group.
type Stats struct {
	// Metrics is what containerd wants, with zero for what the kernel does not count.
	Metrics *stats.Metrics
	// WorkingSet is usage less inactive file pages, the kubelet's definition.
	WorkingSet uint64
}

// Stats reads the group's counters.
func (g *Group) Stats() (Stats, error) {
	cpu, err := g.keyed("cpu.stat")
	if err != nil {
		return Stats{}, err
	}
	mem, err := g.keyed("memory.stat")
	if err != nil {
		return Stats{}, err
	}
	events, err := g.keyed("memory.events")
	if err != nil {
		return Stats{}, err
	}
	m := &stats.Metrics{
		Pids: &stats.PidsStat{Current: g.number("pids.current"), Limit: g.number("pids.max")},
		CPU: &stats.CPUStat{
			UsageUsec: cpu["usage_usec"], UserUsec: cpu["user_usec"], SystemUsec: cpu["system_usec"],
			NrPeriods: cpu["nr_periods"], NrThrottled: cpu["nr_throttled"], ThrottledUsec: cpu["throttled_usec"],
			NrBursts: cpu["nr_bursts"], BurstUsec: cpu["burst_usec"],
		},
		Memory: memoryStat(mem),
		MemoryEvents: &stats.MemoryEvents{
			Low: events["low"], High: events["high"], Max: events["max"], Oom: events["oom"],
			OomKill: events["oom_kill"], OomGroupKill: events["oom_group_kill"],
		},
		Io: &stats.IOStat{Usage: g.io()},
	}
	m.Memory.Usage = g.number("memory.current")
	m.Memory.UsageLimit = g.number("memory.max")
	m.Memory.MaxUsage = g.number("memory.peak")
	s := Stats{Metrics: m}
	if m.Memory.Usage > m.Memory.InactiveFile {
		s.WorkingSet = m.Memory.Usage - m.Memory.InactiveFile
	}
	return s, nil
}

func memoryStat(m map[string]uint64) *stats.MemoryStat {
	return &stats.MemoryStat{
		Anon: m["anon"], File: m["file"], KernelStack: m["kernel_stack"], Slab: m["slab"], Sock: m["sock"],
		Shmem: m["shmem"], FileMapped: m["file_mapped"], FileDirty: m["file_dirty"],
		FileWriteback: m["file_writeback"], AnonThp: m["anon_thp"], InactiveAnon: m["inactive_anon"],
		ActiveAnon: m["active_anon"], InactiveFile: m["inactive_file"], ActiveFile: m["active_file"],
		Unevictable: m["unevictable"], SlabReclaimable: m["slab_reclaimable"],
		SlabUnreclaimable: m["slab_unreclaimable"], Pgfault: m["pgfault"], Pgmajfault: m["pgmajfault"],
		WorkingsetRefault:  m["workingset_refault_anon"] + m["workingset_refault_file"],
		WorkingsetActivate: m["workingset_activate_anon"] + m["workingset_activate_file"],
		Pgrefill:           m["pgrefill"], Pgscan: m["pgscan"], Pgsteal: m["pgsteal"],
		Pgactivate: m["pgactivate"], Pgdeactivate: m["pgdeactivate"], Pglazyfree: m["pglazyfree"],
		Pglazyfreed: m["pglazyfreed"],
	}
}

// OOMKills is how many processes of the group and below were killed for memory.
func (g *Group) OOMKills() uint64 {
	events, err := g.keyed("memory.events")
	if err != nil {
		return 0
	}
	return events["oom_kill"]
}

// keyed reads a file of "key value" lines; a file the kernel does not have is empty.
func (g *Group) keyed(file string) (map[string]uint64, error) {
	data, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		if os.IsNotExist(err) {
			if _, gone := os.Stat(g.dir); gone == nil {
				return nil, nil
			}
		}
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return parseKeyed(string(data)), nil
}

func parseKeyed(data string) map[string]uint64 {
	m := make(map[string]uint64, 48)
	for line := range strings.Lines(data) {
		k, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			m[k] = n
		}
	}
	return m
}

// number reads a file with one number; "max" is math.MaxUint64, anything else 0.
func (g *Group) number(file string) uint64 {
	data, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return 0
	}
	s := strings.TrimSpace(string(data))
	if s == "max" {
		return math.MaxUint64
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (g *Group) io() []*stats.IOEntry {
	data, err := os.ReadFile(filepath.Join(g.dir, "io.stat"))
	if err != nil {
		return nil
	}
	return parseIO(string(data))
}

func parseIO(data string) []*stats.IOEntry {
	var list []*stats.IOEntry
	for line := range strings.Lines(data) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		maj, mnr, ok := strings.Cut(f[0], ":")
		if !ok {
			continue
		}
		e := &stats.IOEntry{Major: parse(maj), Minor: parse(mnr)}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "rbytes":
				e.Rbytes = parse(v)
			case "wbytes":
				e.Wbytes = parse(v)
			case "rios":
				e.Rios = parse(v)
			case "wios":
				e.Wios = parse(v)
			}
		}
		list = append(list, e)
	}
	return list
}

func parse(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// LocalOOMs is how often the group's own limit, not that of a group below, could not be kept.
func (g *Group) LocalOOMs() uint64 {
	events, err := g.keyed("memory.events.local")
	if err != nil {
		return 0
	}
	return events["oom"]
}
