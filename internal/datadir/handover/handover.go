// Package handover is what the processes of a host leave for each other about pods: names of files and
// mount options, and the format of what is in them.
//
// The snapshotter (internal/storage/layers) names the image of a container in a mount option, the shim
// (internal/shim) reads it. The shim knows what containers and volumes take on the guest's scratch disk
// and writes it down; the snapshotter and the kubelet (internal/kube/kubelet), which would find empty
// directories, read it. The package holds no state and starts nothing.
//
// What can go wrong: a file is missing, since nothing was written yet or its pod is going away
// (fs.ErrNotExist), or is not what it should be. What is in it is a guest's word about itself.
package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// ImageOption starts the mount option that holds the absolute path of the EROFS image of a container's
	// root file system.
	ImageOption = "atoll.image="
	// UsageFile is the name of a file with a Usage.
	UsageFile = "usage.json"

	// maxUsageFile bounds what is read, maxUsage the numbers in it: sums of them must not overflow.
	maxUsageFile = 4096
	maxUsage     = 1 << 50
)

// ImagePath returns the image that is named among the options of a mount, or "".
func ImagePath(options []string) string {
	for _, o := range options {
		if p, ok := strings.CutPrefix(o, ImageOption); ok {
			return p
		}
	}
	return ""
}

// LayerUsage is the file for the use of a container's writable layer, beside the source of the mount
// that names its image.
func LayerUsage(source string) string { return filepath.Join(filepath.Dir(source), UsageFile) }

// EmptyDirUsage is the file for the use of an emptyDir, in the directory that the kubelet keeps beside
// the volume, out of the pod's sight, and removes with it.
//
//	<kubelet>/pods/<uid>/plugins/kubernetes.io~empty-dir/<volume>/usage.json
func EmptyDirUsage(podDir, volume string) string {
	return filepath.Join(podDir, "plugins", "kubernetes.io~empty-dir", volume, UsageFile)
}

// Usage is what a directory takes. Capacity and Available are of the file system it is on, in bytes; 0 if
// that is not known.
type Usage struct {
	Bytes     int64 `json:"bytes"`
	Inodes    int64 `json:"inodes"`
	Capacity  int64 `json:"capacity,omitempty"`
	Available int64 `json:"available,omitempty"`
}

// Limit makes a number that a guest said usable in a Usage.
func Limit(n uint64) int64 { return int64(min(n, maxUsage)) }

// Write replaces a usage file. A directory that is gone, with its pod, is no error.
func (u Usage) Write(file string) error {
	b, err := json.Marshal(u)
	if err != nil {
		return fmt.Errorf("encoding usage: %w", err)
	}
	next := file + ".next"
	err = os.WriteFile(next, b, 0o600)
	if err == nil {
		err = os.Rename(next, file)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reporting usage: %w", err)
	}
	return nil
}

// ReadUsage reads a usage file and tells when it was written.
func ReadUsage(file string) (Usage, time.Time, error) {
	f, err := os.Open(file)
	if err != nil {
		return Usage{}, time.Time{}, fmt.Errorf("reading usage: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return Usage{}, time.Time{}, fmt.Errorf("reading usage: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxUsageFile))
	if err != nil {
		return Usage{}, time.Time{}, fmt.Errorf("reading usage: %w", err)
	}
	var u Usage
	if err := json.Unmarshal(b, &u); err != nil {
		return Usage{}, time.Time{}, fmt.Errorf("reading %s: %w", file, err)
	}
	for _, n := range []*int64{&u.Bytes, &u.Inodes, &u.Capacity, &u.Available} {
		*n = min(max(*n, 0), maxUsage)
	}
	return u, st.ModTime(), nil
}
