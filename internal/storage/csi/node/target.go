package node

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
)

// target is what is, or is about to be, published at one path.
type target struct {
	Path   string         `json:"path"`
	Volume string         `json:"volume"` // handle
	Pod    string         `json:"pod"`    // uid, "" if the caller is no kubelet
	Name   string         `json:"name"`   // of the PersistentVolume
	Holder string         `json:"holder"` // in the engine
	Mode   datastore.Mode `json:"mode"`
	// MicroVM: the pod's shim opens the volume; else it is mounted here.
	MicroVM bool     `json:"microVM,omitempty"`
	Block   bool     `json:"block,omitempty"`
	Request string   `json:"request"`           // digest of what was asked for
	FSType  string   `json:"fsType,omitempty"`  // of a mounted volume
	Options []string `json:"options,omitempty"` // of its mount
	Group   *uint32  `json:"group,omitempty"`
	// Machine: the volume is not published; the pod's virtual machine has asked for it. Without MicroVM it is for
	// memory, and a file on this host.
	Machine bool `json:"machine,omitempty"`
	// Alone: no other target may have the volume (ReadWriteOncePod).
	Alone bool `json:"alone,omitempty"`
	// Loop is the device that stands for the volume, or is it, on this host; Backing its file, which is noted
	// before there is a device.
	Loop    string `json:"loop,omitempty"`
	Backing string `json:"backing,omitempty"`
}

// targets are the records of targets.
type targets struct{ dir string }

func newTargets(kubelet string) targets {
	return targets{dir: filepath.Join(kubelet, "plugins", handover.Driver, "targets")}
}

func (t targets) file(path string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(path)))
	return filepath.Join(t.dir, hex.EncodeToString(sum[:])+".json")
}

// put writes a record so that it survives a crash.
func (t targets) put(r target) error {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return fmt.Errorf("recording published volume: %w", err)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("recording published volume: %w", err)
	}
	if err := atomicfile.Write(t.file(r.Path), data, 0o600); err != nil {
		return fmt.Errorf("recording published volume: %w", err)
	}
	return nil
}

// get reads the record of a path; false if there is none.
func (t targets) get(path string) (target, bool, error) {
	r, err := readTarget(t.file(path))
	if errors.Is(err, fs.ErrNotExist) {
		return target{}, false, nil
	}
	return r, err == nil, err
}

func readTarget(file string) (target, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return target{}, fmt.Errorf("reading published volume: %w", err)
	}
	var r target
	if err := json.Unmarshal(data, &r); err != nil {
		return target{}, fmt.Errorf("reading published volume from %s: %w", file, err)
	}
	return r, nil
}

// remove forgets a path.
func (t targets) remove(path string) error {
	if err := os.Remove(t.file(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forgetting published volume: %w", err)
	}
	return nil
}

// of returns all targets of a volume, or with "" of all volumes.
func (t targets) of(volume string) ([]target, error) {
	entries, err := os.ReadDir(t.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing published volumes: %w", err)
	}
	var out []target
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		r, err := readTarget(filepath.Join(t.dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if volume == "" || r.Volume == volume {
			out = append(out, r)
		}
	}
	return out, nil
}
