package containerd

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/storage/layers"
)

// Names that pods, the kubelet and other packages refer to.
const (
	// RuntimeAtoll is the CRI runtime handler of micro-VM pods, the default.
	RuntimeAtoll = "atoll"
	// RuntimeRunc is the CRI runtime handler of pods in the host's kernel.
	RuntimeRunc = "runc"
	// RuntimeMachine is the CRI runtime handler of virtual machines.
	RuntimeMachine = machinev1.RuntimeClass
	// PauseImage is the image of the sandbox container of runc pods. It is
	// never pulled: it comes from Config.PauseArchive.
	PauseImage = "registry.k8s.io/pause:3.10.2"
	// Namespace is the containerd namespace of everything Kubernetes makes.
	Namespace = "k8s.io"

	shimAtoll = "containerd-shim-atoll-v1"
	shimVM    = "containerd-shim-atoll-vm-v1"
	shimRunc  = "containerd-shim-runc-v2"
)

// Config says where containerd keeps things and what it runs. All paths are
// absolute; directories are made if missing, except BinDir and CNIBinDir.
type Config struct {
	ConfigFile string // the generated config.toml
	Root       string // persistent data: content, snapshots, metadata
	State      string // data that does not survive a reboot: tasks, netns
	Address    string // gRPC socket; the ttrpc socket is beside it with ".ttrpc" added
	SocketDir  string // sockets of shims; at most 71 bytes, since socket paths are short

	BinDir      string // holds the shims
	RuncBinary  string // "" for the runc found in $PATH
	CNIBinDir   string // CNI plugins
	CNIConfDir  string // CNI configuration, read when it appears or changes
	RegistryDir string // <host>/hosts.toml, one directory per registry; see Docker's certs.d

	// PauseArchive is an OCI archive with PauseImage in it, imported at start
	// unless the image is there. "" leaves the image to others.
	PauseArchive string

	// RestrictOOMScore keeps containers from a lower OOM score than
	// containerd's own. Set it where CAP_SYS_RESOURCE is missing: there
	// lowering it fails and with it every container.
	RestrictOOMScore bool

	LogLevel string // trace, debug, info, warn or error; "" is info
}

func (c *Config) validate() error {
	paths := map[string]string{
		"ConfigFile": c.ConfigFile, "Root": c.Root, "State": c.State, "Address": c.Address, "SocketDir": c.SocketDir,
		"BinDir": c.BinDir, "CNIBinDir": c.CNIBinDir, "CNIConfDir": c.CNIConfDir, "RegistryDir": c.RegistryDir,
	}
	for name, p := range paths {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("containerd configuration: %s %q is not an absolute path", name, p)
		}
	}
	for name, p := range map[string]string{"PauseArchive": c.PauseArchive, "RuncBinary": c.RuncBinary} {
		if p != "" && !filepath.IsAbs(p) {
			return fmt.Errorf("containerd configuration: %s %q is not an absolute path", name, p)
		}
	}
	// sun_path has room for 107 bytes.
	if n := len(c.ttrpcAddress()); n > 107 {
		return fmt.Errorf("containerd configuration: socket path %q is %d bytes, at most 107 are possible", c.ttrpcAddress(), n)
	}
	if c.Root == c.State {
		return errors.New("containerd configuration: Root and State are the same directory")
	}
	return nil
}

func (c *Config) ttrpcAddress() string { return c.Address + ".ttrpc" }

// table is a TOML table. The encoder sorts keys, so the text is stable.
type table = map[string]any

// TOML returns the configuration file, in version 4 of containerd's schema.
func (c *Config) TOML() ([]byte, error) {
	level := c.LogLevel
	if level == "" {
		level = "info"
	}
	doc := table{
		"version": 4,
		"root":    c.Root,
		"state":   c.State,
		"imports": []string{},
		"debug":   table{"level": level},
		// Nobody scrapes these; they cost time on every call.
		"disabled_plugins": []string{"io.containerd.metrics.v1.grpc-otel", "io.containerd.metrics.v1.grpc-prometheus"},
		"required_plugins": []string{
			"io.containerd.grpc.v1.cri",
			"io.containerd.snapshotter.v1." + layers.Name,
			"io.containerd.snapshotter.v1.overlayfs",
		},
		"plugins": table{
			"io.containerd.server.v1.grpc":           table{"address": c.Address, "uid": 0, "gid": 0},
			"io.containerd.server.v1.ttrpc":          table{"address": c.ttrpcAddress(), "uid": 0, "gid": 0},
			"io.containerd.grpc.v1.cri":              streaming(),
			"io.containerd.cri.v1.images":            c.images(),
			"io.containerd.cri.v1.runtime":           c.runtime(),
			"io.containerd.transfer.v1.local":        c.transfer(),
			"io.containerd.service.v1.diff-service":  table{"default": []string{layers.Name, "walking"}},
			"io.containerd.shim.v1.manager":          table{"socket_dir": c.SocketDir},
			"io.containerd.snapshotter.v1.overlayfs": table{"sync_remove": false},
			"io.containerd.gc.v1.scheduler":          table{"startup_delay": "5s"},
			"io.containerd.metadata.v1.bolt":         table{"no_sync": true}, // see checkpoint
		},
	}
	var b bytes.Buffer
	b.WriteString("# Written by atoll at every start; changes are lost.\n")
	enc := toml.NewEncoder(&b)
	enc.SetIndentTables(true)
	if err := enc.Encode(doc); err != nil {
		return nil, fmt.Errorf("encoding containerd configuration: %w", err)
	}
	return b.Bytes(), nil
}

// streaming is the server for exec, attach and port-forward, which only the
// kubelet on this host talks to.
func streaming() table {
	return table{
		"disable_tcp_service":   true,
		"stream_server_address": "127.0.0.1",
		"stream_server_port":    "0",
		"stream_idle_timeout":   "4h0m0s",
	}
}

func (c *Config) images() table {
	return table{
		"snapshotter":                  layers.Name,
		"disable_snapshot_annotations": true,
		"discard_unpacked_layers":      false, // runc pods unpack them again, for overlayfs
		"image_pull_progress_timeout":  "5m0s",
		"max_concurrent_downloads":     3,
		"stats_collect_period":         10,
		"pinned_images":                table{"sandbox": PauseImage, "vm": machinev1.Image},
		"registry":                     table{"config_path": c.RegistryDir},
		// Without it the CRI reports no file system for containers of runc pods,
		// and the kubelet then has no statistics of any pod.
		"runtime_platforms": table{RuntimeRunc: table{"snapshotter": "overlayfs"}},
	}
}

func (c *Config) runtime() table {
	return table{
		"max_container_log_line_size":  16 << 10,
		"restrict_oom_score_adj":       c.RestrictOOMScore,
		"netns_mounts_under_state_dir": true,
		"enable_cdi":                   false,
		"enable_criu":                  false,
		"enable_selinux":               false,
		"drain_exec_sync_io_timeout":   "30s", // of an exec that has ended: what nobody has read by then is lost, and what its children hold open is closed
		"stats_collect_period":         "10s",
		"containerd": table{
			"default_runtime_name": RuntimeAtoll,
			"runtimes": table{
				RuntimeAtoll: table{
					"runtime_type":    "io.containerd.atoll.v1",
					"runtime_path":    filepath.Join(c.BinDir, shimAtoll),
					"sandboxer":       "shim",
					"snapshotter":     layers.Name,
					"pod_annotations": []string{"atoll.dev/*"},
					// A privileged container gets the devices of its micro-VM. The shim
					// knows it by the second line.
					"privileged_without_host_devices":                     true,
					"privileged_without_host_devices_all_devices_allowed": true,
				},
				RuntimeMachine: table{
					"runtime_type":    "io.containerd.atoll-vm.v1",
					"runtime_path":    filepath.Join(c.BinDir, shimVM),
					"sandboxer":       "shim",
					"snapshotter":     layers.Name,
					"pod_annotations": []string{"atoll.dev/*"},
				},
				RuntimeRunc: table{
					"runtime_type": "io.containerd.runc.v2",
					"runtime_path": filepath.Join(c.BinDir, shimRunc),
					"sandboxer":    "podsandbox",
					"snapshotter":  "overlayfs",
					"options": table{
						"SystemdCgroup": false,
						"BinaryName":    c.RuncBinary,
						"Root":          filepath.Join(c.State, "runc"),
					},
				},
			},
		},
		"cni": table{
			"bin_dirs":              []string{c.CNIBinDir},
			"conf_dir":              c.CNIConfDir,
			"max_conf_num":          1,
			"use_internal_loopback": true,
		},
	}
}

// transfer is the service that pulls images. It unpacks for the snapshotter
// the CRI plugin names, which is ours unless a pod asks for another.
func (c *Config) transfer() table {
	return table{
		"config_path":              c.RegistryDir,
		"max_concurrent_downloads": 3,
		"max_concurrent_unpacks":   2,
		"unpack_config": []table{
			{"platform": "linux/amd64", "snapshotter": layers.Name, "differ": layers.Name},
			{"platform": "linux/amd64", "snapshotter": "overlayfs", "differ": "walking"},
		},
	}
}
