package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// Driver is the name of the CSI driver, under which the kubelet keeps its directory.
const Driver = "csi.atoll.dev"

// maxVolumeFile bounds what is read of a record.
const maxVolumeFile = 64 << 10

// Volume is a persistent volume that was published for a micro-VM pod: how the guest is to use it. The CSI
// node service writes it, the shim reads it. How the volume's disk is opened is not in it, since layers may be
// added at any time: the shim asks the agent (package attach).
type Volume struct {
	// ID is the CSI volume handle.
	ID string `json:"id"`
	// FSType is "ext4" or "xfs".
	FSType string `json:"fsType,omitempty"`
	// MountOptions as for mount(8).
	MountOptions []string `json:"mountOptions,omitempty"`
	ReadOnly     bool     `json:"readOnly,omitempty"`
	// FSGroup is the group that the volume is to belong to, if any.
	FSGroup *uint32 `json:"fsGroup,omitempty"`
	// Block is set for a volume without a file system: the device that the kubelet was given in its place,
	// by which the shim knows it again in the spec of a container.
	Block *Device `json:"block,omitempty"`
}

// Device is a device number.
type Device struct {
	Major int64 `json:"major"`
	Minor int64 `json:"minor"`
}

// PublishedVolumes is the directory with the records of a pod's volumes, 0700.
func PublishedVolumes(kubelet, pod string) string {
	return filepath.Join(kubelet, "plugins", Driver, "published", pod)
}

// PublishedVolume is the file with a Volume. name is that of the PersistentVolume.
func PublishedVolume(kubelet, pod, name string) string {
	return filepath.Join(PublishedVolumes(kubelet, pod), name+".json")
}

// Write writes the record so that it survives a crash.
func (v Volume) Write(file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("recording volume: %w", err)
	}
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("recording volume: %w", err)
	}
	if err := atomicfile.Write(file, data, 0o600); err != nil {
		return fmt.Errorf("recording volume: %w", err)
	}
	return nil
}

// ReadVolume reads a record.
func ReadVolume(file string) (Volume, error) {
	f, err := os.Open(file)
	if err != nil {
		return Volume{}, fmt.Errorf("reading volume record: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxVolumeFile))
	if err != nil {
		return Volume{}, fmt.Errorf("reading volume record: %w", err)
	}
	var v Volume
	if err := json.Unmarshal(data, &v); err != nil {
		return Volume{}, fmt.Errorf("reading volume record %s: %w", file, err)
	}
	if v.ID == "" {
		return Volume{}, fmt.Errorf("reading volume record %s: no volume is named", file)
	}
	return v, nil
}

// ReadVolumes reads the records of a pod, by the names of their volumes.
func ReadVolumes(kubelet, pod string) (map[string]Volume, error) {
	dir := PublishedVolumes(kubelet, pod)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading volume records: %w", err)
	}
	out := map[string]Volume{}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		v, err := ReadVolume(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[name] = v
	}
	return out, nil
}
