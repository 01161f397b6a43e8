package preflight

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupRoot is where cgroups are mounted on every distribution.
const cgroupRoot = "/sys/fs/cgroup"

// checkCgroups looks which cgroup version the host has and whether the
// controllers that enforce pod limits are there.
func checkCgroups() Result {
	r := Result{Name: "cgroups", Level: OK}
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		r.Level, r.Detail = Fail, fmt.Sprintf("%s: %v", cgroupRoot, err)
		r.Fix = "mount -t cgroup2 cgroup2 " + cgroupRoot
		return r
	}
	var version string
	var have, need []string
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		b, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
		if err != nil {
			r.Level, r.Detail = Fail, err.Error()
			return r
		}
		version, have, need = "v2", strings.Fields(string(b)), []string{"cpu", "cpuset", "memory", "pids"}
	} else {
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			r.Level, r.Detail = Fail, err.Error()
			return r
		}
		var unified bool
		have, unified = v1Controllers(string(mounts))
		need = []string{"cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids"}
		version = "v1"
		if unified {
			version = "v1 with an empty v2 tree"
		}
	}
	var missing []string
	for _, c := range need {
		if !slices.Contains(have, c) {
			missing = append(missing, c)
		}
	}
	r.Detail = fmt.Sprintf("%s: %s", version, strings.Join(have, " "))
	if len(missing) > 0 {
		r.Level = Fail
		r.Detail = fmt.Sprintf("%s, without %s", version, strings.Join(missing, ", "))
		r.Fix = "start the kernel with these cgroup controllers enabled (for example cgroup_enable=memory), or boot with systemd.unified_cgroup_hierarchy=1"
	}
	return r
}

// v1Controllers reads from a mount table which cgroup v1 controllers are
// mounted below the cgroup root, and whether a v2 tree is there as well.
func v1Controllers(mounts string) (controllers []string, unified bool) {
	for line := range strings.Lines(mounts) {
		fields := strings.Fields(line)
		if len(fields) < 4 || !strings.HasPrefix(fields[1], cgroupRoot+"/") {
			continue
		}
		switch fields[2] {
		case "cgroup2":
			unified = true
		case "cgroup":
			for option := range strings.SplitSeq(fields[3], ",") {
				if slices.Contains([]string{"cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids", "blkio", "hugetlb"}, option) {
					controllers = append(controllers, option)
				}
			}
		}
	}
	slices.Sort(controllers)
	return controllers, unified
}
