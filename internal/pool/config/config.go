// Package config is the configuration file of the warm pool: JSON, written by `atoll up`, read by
// `atoll-pod pool`.
//
// It holds data and checks it; nothing else. Unknown fields are errors.
package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
)

// Limits of the warm pool.
const (
	MaxWarm     = 64
	DefaultWarm = 4
)

// Defaults of Config.
const (
	DefaultMemoryMiB    = 512
	DefaultUIDBase      = 700000
	DefaultUIDCount     = 65536
	DefaultScratchBytes = 16 << 30
)

// Accelerators to choose from. Auto means KVM where it really runs the pod kernel, else TCG.
const (
	Auto = "auto"
	KVM  = "kvm"
	TCG  = "tcg"
)

// Config is the whole configuration. Paths are absolute.
type Config struct {
	RunDir     string `json:"runDir"`     // sockets and records of running shims
	DataDir    string `json:"dataDir"`    // scratch disks; needs O_TMPFILE
	Binary     string `json:"binary"`     // atoll-pod, for shim daemons and as guest init
	Kernel     string `json:"kernel"`     // pod kernel
	Modules    string `json:"modules"`    // directory of its modules, "" for a kernel without
	ExecHelper string `json:"execHelper"` // guest's exec helper
	Kubelet    string `json:"kubelet"`    // the kubelet's root directory
	Containerd string `json:"containerd"` // containerd's root directory

	QEMU         string `json:"qemu,omitempty"`         // default: the usual path
	Warm         *int   `json:"warm,omitempty"`         // clones kept ready
	MemoryMiB    int    `json:"memoryMiB,omitempty"`    // of a pod without larger limits
	MaxMemoryMiB int    `json:"maxMemoryMiB,omitempty"` // of the largest pod; default: the host's
	MaxCPUs      int    `json:"maxCPUs,omitempty"`      // of the largest pod; default: the host's
	UIDBase      uint32 `json:"uidBase,omitempty"`      // first of the users that QEMUs run as
	UIDCount     uint32 `json:"uidCount,omitempty"`
	ScratchBytes int64  `json:"scratchBytes,omitempty"` // of each pod's scratch disk, which is sparse
	Accelerator  string `json:"accelerator,omitempty"`  // Auto, KVM or TCG
}

// Load reads and checks a configuration file.
func Load(name string) (Config, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return Config{}, fmt.Errorf("reading pool configuration: %w", err)
	}
	c, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("reading pool configuration %s: %w", name, err)
	}
	return c, nil
}

// Parse decodes a configuration, fills in defaults and checks it.
func Parse(data []byte) (Config, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var c Config
	if err := dec.Decode(&c); err != nil {
		return Config{}, err
	}
	c.fill()
	return c, c.check()
}

func (c *Config) fill() {
	if c.Warm == nil {
		n := DefaultWarm
		c.Warm = &n
	}
	c.MemoryMiB = def(c.MemoryMiB, DefaultMemoryMiB)
	c.MaxMemoryMiB = max(def(c.MaxMemoryMiB, hostMemoryMiB()), c.MemoryMiB)
	c.MaxCPUs = def(c.MaxCPUs, runtime.NumCPU())
	c.UIDBase = def(c.UIDBase, DefaultUIDBase)
	c.UIDCount = def(c.UIDCount, DefaultUIDCount)
	c.ScratchBytes = def(c.ScratchBytes, DefaultScratchBytes)
	c.Accelerator = def(c.Accelerator, Auto)
}

func def[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// hostMemoryMiB is the host's memory in whole guest memory blocks of 128 MiB.
func hostMemoryMiB() int {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return DefaultMemoryMiB
	}
	var kib int
	if _, err := fmt.Sscanf(string(data), "MemTotal: %d kB", &kib); err != nil {
		return DefaultMemoryMiB
	}
	return kib >> 10 / 128 * 128
}

func (c *Config) check() error {
	for name, p := range map[string]string{
		"runDir": c.RunDir, "dataDir": c.DataDir, "binary": c.Binary, "kernel": c.Kernel,
		"execHelper": c.ExecHelper, "kubelet": c.Kubelet, "containerd": c.Containerd,
	} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("%s must be an absolute path, not %q", name, p)
		}
	}
	switch {
	case c.Modules != "" && !filepath.IsAbs(c.Modules):
		return fmt.Errorf("modules must be an absolute path, not %q", c.Modules)
	case *c.Warm < 0 || *c.Warm > MaxWarm:
		return fmt.Errorf("warm is %d, not 0 to %d", *c.Warm, MaxWarm)
	case c.MemoryMiB < 64 || c.MemoryMiB > 1<<20:
		return fmt.Errorf("memoryMiB is %d, not 64 to 1048576", c.MemoryMiB)
	case c.MaxCPUs < 1 || c.MaxCPUs > 255:
		return fmt.Errorf("maxCPUs is %d, not 1 to 255", c.MaxCPUs)
	case c.UIDBase < 1000 || c.UIDCount < 16 || c.UIDBase > 1<<31-c.UIDCount:
		return errors.New("uidBase and uidCount must be a range of at least 16 users from 1000 on")
	case c.ScratchBytes < 64<<20 || c.ScratchBytes%(1<<20) != 0:
		return fmt.Errorf("scratchBytes is %d, not a multiple of 1 MiB from 64 MiB on", c.ScratchBytes)
	case c.Accelerator != Auto && c.Accelerator != KVM && c.Accelerator != TCG:
		return fmt.Errorf("accelerator is %q, not auto, kvm or tcg", c.Accelerator)
	}
	return nil
}

// Socket is where the pool listens.
func (c *Config) Socket() string { return filepath.Join(c.RunDir, "pool.sock") }
