package preflight

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Limit is a kernel setting that must be at least Min for the number of pods a
// node may run.
type Limit struct {
	Key string // as in sysctl, with slashes
	Min int64
	Use string
}

// Limits lists the kernel settings `atoll up` raises when they are low.
func Limits() []Limit {
	return []Limit{
		{"fs/inotify/max_user_instances", 8192, "every shim watches the volumes of its pod"},
		{"fs/inotify/max_user_watches", 524288, "every shim watches the volumes of its pod"},
		{"kernel/pid_max", 131072, "a micro-VM pod has about 30 threads"},
		{"vm/max_map_count", 262144, "the control plane maps many files"},
		{"net/ipv4/neigh/default/gc_thresh3", 4096, "every pod is a neighbour"},
		{"net/ipv4/neigh/default/gc_thresh2", 2048, "every pod is a neighbour"},
	}
}

// Read returns the present value.
func (l Limit) Read() (int64, error) {
	b, err := os.ReadFile(filepath.Join("/proc/sys", l.Key))
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", l.Key, err)
	}
	v, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", l.Key, err)
	}
	return v, nil
}

// Raise sets the value to Min when it is lower and tells whether it did.
func (l Limit) Raise() (bool, error) {
	v, err := l.Read()
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // nothing limits
	}
	if err != nil || v >= l.Min {
		return false, err
	}
	if err := os.WriteFile(filepath.Join("/proc/sys", l.Key), []byte(strconv.FormatInt(l.Min, 10)), 0); err != nil {
		return false, fmt.Errorf("raising %s: %w", l.Key, err)
	}
	return true, nil
}

// checkLimits reports the settings that `atoll up` will raise.
func checkLimits() []Result {
	var out []Result
	for _, l := range Limits() {
		r := Result{Name: filepath.Base(l.Key), Level: OK}
		v, err := l.Read()
		switch {
		case errors.Is(err, os.ErrNotExist):
			r.Detail = "this kernel or namespace has no such limit"
		case err != nil:
			r.Level, r.Detail = Warn, "cannot tell: "+reason(err).Error()
		case v < l.Min:
			r.Level = Info
			r.Detail = fmt.Sprintf("%d is low (%s); `atoll up` raises it to %d", v, l.Use, l.Min)
		default:
			r.Detail = strconv.FormatInt(v, 10)
		}
		out = append(out, r)
	}
	return out
}
