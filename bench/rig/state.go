package rig

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// SampleTime is the time between two looks at the host.
	SampleTime = 5 * time.Second
	// ClearTime bounds the wait for what clears up by itself: the kubelet does within two minutes.
	ClearTime = 2 * time.Minute
	// restLimit bounds the wait for a host that does not change.
	restLimit = 10 * time.Minute
	// memory is what hostState calls the memory, which is reported, but says nothing about a leak.
	memory = "memory MiB"
)

// hostState counts what a leaking pod would leave behind. What runs in other PID namespaces and belongs to other data
// directories is not counted.
func hostState(h *Host) map[string]int {
	count := func(script string) int {
		out, _ := exec.Command("sh", "-c", script).Output()
		n, _ := strconv.Atoi(strings.TrimSpace(string(out)))
		return n
	}

	return map[string]int{
		"processes": count("ps -e --no-headers -o pidns,comm | grep $(readlink /proc/self/ns/pid | tr -dc 0-9) | grep -c -E 'qemu|atoll|runc' || true"),
		"links":     count("ip -o link | wc -l"),
		"loops":     count("cat /sys/block/loop*/loop/backing_file 2>/dev/null | grep -c -e " + h.Options.DataDir + " -e " + h.Options.RunDir + " || true"),
		"mounts":    count("grep -c -e " + h.Options.DataDir + " -e " + h.Options.RunDir + " /proc/self/mounts || true"),
		"netns":     count("find " + h.Options.RunDir + " -path '*netns/*' 2>/dev/null | sort -u | wc -l"),
		"cgroups":   count("find /sys/fs/cgroup/*" + h.Options.CgroupRoot + "/kubepods /sys/fs/cgroup" + h.Options.CgroupRoot + "/kubepods -type d 2>/dev/null | wc -l"),
		"files":     count("find " + h.Options.DataDir + " " + h.Options.RunDir + " -type f -not -path '*/logs/*' -not -path '*/etcd/*' 2>/dev/null | wc -l"),
		"nft rules": count("nft list ruleset 2>/dev/null | grep -c ' counter\\| dnat\\| masquerade' || true"),
		memory:      int(StatusField("/proc/meminfo", "MemAvailable:") / 1024),
	}
}

// StateAtRest waits until the pool is full and the host is as it was some time ago, so that what still goes away
// is not taken for what belongs there.
func (h *Host) StateAtRest(ctx context.Context, quiet time.Duration) (map[string]int, error) {
	if err := h.FullPool(ctx); err != nil {
		return nil, err
	}
	states := []map[string]int{hostState(h)}
	for begin := time.Now(); ; {
		if err := sleep(ctx, SampleTime); err != nil {
			return nil, err
		}
		now := hostState(h)
		states = append(states, now)
		if atRest(states, int(quiet/SampleTime)) {
			return now, nil
		}
		if time.Since(begin) > restLimit {
			return nil, fmt.Errorf("the host did not come to rest in %v, so a leak could not be told; between the last two looks: %s", restLimit, changes(states[len(states)-2], now))
		}
	}
}

// atRest tells whether the last state is that of so many looks before. What a look in between may have caught is
// of no matter.
func atRest(states []map[string]int, looks int) bool {
	i := len(states) - 1 - looks
	return i >= 0 && same(states[i], states[len(states)-1])
}

// StateCleared waits until the pool is full and nothing is left, or for as long as things may take to go away.
func (h *Host) StateCleared(ctx context.Context, before map[string]int) (map[string]int, error) {
	if err := h.FullPool(ctx); err != nil {
		return nil, err
	}
	for begin := time.Now(); ; {
		after := hostState(h)
		if left(before, after) == "" || time.Since(begin) > ClearTime {
			return after, nil
		}
		if err := sleep(ctx, SampleTime); err != nil {
			return nil, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// Verdict says in a row whether something was left on the host; what was is an error, too.
func Verdict(row Row, before, after map[string]int) (Row, error) {
	row.Note = "nothing left; " + changes(before, after)
	if what := left(before, after); what != "" {
		row.Note = "LEAK: " + changes(before, after)
		return row, errors.New("left on the host: " + what)
	}
	return row, nil
}

// left tells what a host has more than before, but for memory.
func left(before, after map[string]int) string {
	var more []string
	for _, what := range slices.Sorted(maps.Keys(after)) {
		if n := after[what] - before[what]; n > 0 && what != memory {
			more = append(more, fmt.Sprintf("%s %+d", what, n))
		}
	}
	return strings.Join(more, ", ")
}

// same tells whether a host has what it had before, but for memory.
func same(before, after map[string]int) bool {
	before, after = maps.Clone(before), maps.Clone(after)
	delete(before, memory)
	delete(after, memory)
	return maps.Equal(before, after)
}

// changes tells what a host has more or less than before.
func changes(before, after map[string]int) string {
	var note strings.Builder
	for _, what := range slices.Sorted(maps.Keys(after)) {
		n := after[what]
		if what == memory {
			fmt.Fprintf(&note, "available memory %+d MiB; ", n-before[what])
		} else if n != before[what] {
			fmt.Fprintf(&note, "%s %+d; ", what, n-before[what])
		}
	}
	return note.String()
}
