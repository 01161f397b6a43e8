package kubelet

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	libcgroups "github.com/opencontainers/cgroups"

	"atoll.dev/atoll/internal/linux/cgroup"
)

// makeCgroupRoot makes the group pods live under in every hierarchy. The kubelet
// wants it to exist. What that changes of the groups above is noted in record.
func makeCgroupRoot(path, record string) error {
	roots, err := cgroup.Roots()
	if err != nil {
		return fmt.Errorf("making cgroup %s: %w", path, err)
	}
	// Beside hierarchies of version 1 nothing is asked of that of version 2, which has only what they left over.
	unified := !slices.ContainsFunc(roots, func(root string) bool { return !cgroup.IsUnified(root) })
	for _, root := range roots {
		if err := makeGroup(root, path, unified, record); err != nil {
			return fmt.Errorf("making cgroup %s below %s: %w", path, root, err)
		}
	}
	return nil
}

// makeGroup makes one group, whose members can use everything their parent can.
func makeGroup(root, path string, unified bool, record string) error {
	parent := root
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if unified {
			if err := cgroup.Delegate(parent, record); err != nil {
				return err
			}
		}
		group := filepath.Join(parent, name)
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		// In version 1 a new cpuset is empty and takes no processes.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if err := inherit(parent, group, file); err != nil {
				return err
			}
		}
		if err := weigh(group, runtime.NumCPU()); err != nil {
			return err
		}
		parent = group
	}
	return nil
}

// weigh gives a group as much weight as the kubelet gives that of all pods below it: its share of the processors would be
// that of a single one beside the host's other processes otherwise.
func weigh(group string, processors int) error {
	const perProcessor = 1024
	shares := uint64(processors) * perProcessor
	for file, value := range map[string]uint64{"cpu.shares": shares, "cpu.weight": libcgroups.ConvertCPUSharesToCgroupV2Value(shares)} {
		path := filepath.Join(group, file)
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.WriteFile(path, strconv.AppendUint(nil, value, 10), 0o644); err != nil {
			return fmt.Errorf("weighing pods: %w", err)
		}
	}
	return nil
}

// inherit copies a setting of the parent into a group that has none.
func inherit(parent, group, file string) error {
	own, err := os.ReadFile(filepath.Join(group, file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || len(bytes.TrimSpace(own)) > 0 {
		return err
	}
	value, err := os.ReadFile(filepath.Join(parent, file))
	if err != nil || len(bytes.TrimSpace(value)) == 0 {
		return err
	}
	return os.WriteFile(filepath.Join(group, file), value, 0o644)
}
