// Package config is the configuration file of the shims of virtual machines: JSON, written by `atoll up` into the run
// directory, read by each shim when it starts.
//
// It holds data and checks it; nothing else. Unknown fields are errors. What can go wrong: the file is missing, since
// `atoll up` has not come as far; the shim says so.
package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Defaults of Config. The users begin above those of the pool.
const (
	DefaultUIDBase  = 770000
	DefaultUIDCount = 16384
)

// Config is the whole configuration. Paths are absolute.
type Config struct {
	RunDir  string `json:"runDir"`  // sockets and records of running shims
	DataDir string `json:"dataDir"` // what machines keep: firmware variables, the state of TPMs
	Binary  string `json:"binary"`  // atoll-pod
	Kubelet string `json:"kubelet"` // the kubelet's root directory

	QEMU     string `json:"qemu,omitempty"` // default: the usual path
	Firmware string `json:"firmware,omitempty"`
	UIDBase  uint32 `json:"uidBase,omitempty"` // first of the users that QEMUs run as
	UIDCount uint32 `json:"uidCount,omitempty"`
	// Accelerator is "kvm" or "tcg"; "" or "auto": what the pool has found out.
	Accelerator string `json:"accelerator,omitempty"`
}

// File is where the configuration is in a run directory.
func File(runDir string) string { return filepath.Join(runDir, "machines.json") }

// Load reads and checks the configuration of a run directory.
func Load(runDir string) (Config, error) {
	data, err := os.ReadFile(File(runDir))
	if err != nil {
		return Config{}, fmt.Errorf("reading configuration of virtual machines: %w", err)
	}
	c, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("reading configuration of virtual machines: %w", err)
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
	if c.UIDBase == 0 {
		c.UIDBase = DefaultUIDBase
	}
	if c.UIDCount == 0 {
		c.UIDCount = DefaultUIDCount
	}
	return c, c.check()
}

func (c Config) check() error {
	for name, p := range map[string]string{"runDir": c.RunDir, "dataDir": c.DataDir, "binary": c.Binary, "kubelet": c.Kubelet} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("%s must be an absolute path, not %q", name, p)
		}
	}
	const least = 1000
	switch {
	case c.UIDBase < least || c.UIDBase > 1<<31-c.UIDCount:
		return errors.New("uidBase and uidCount must be a range of users from 1000 on")
	case c.Accelerator != "" && c.Accelerator != "auto" && c.Accelerator != "kvm" && c.Accelerator != "tcg":
		return fmt.Errorf("accelerator is %q, not auto, kvm or tcg", c.Accelerator)
	}
	return nil
}

// Order is what the short-lived "shim start" tells the daemon that it has started, over a socket they share.
type Order struct {
	Member    string `json:"member"` // id
	UID       uint32 `json:"uid"`
	Sandbox   string `json:"sandbox"`
	Namespace string `json:"namespace"` // containerd's
	TTRPC     string `json:"ttrpc"`     // address of containerd's events service
	Bundle    string `json:"bundle"`
	Debug     bool   `json:"debug,omitempty"`
	Config    Config `json:"config"`
}

// Started is the daemon's answer.
type Started struct {
	Address string `json:"address,omitempty"` // of its ttrpc socket
	Error   string `json:"error,omitempty"`
}

// Names of the daemon's role and of the descriptor that it inherits.
const (
	Role      = "machine" // after registry.Role and the member
	FDControl = 3
)
