// Package datadir is the typed tree of every path Atoll uses on a host.
//
// It knows two roots: the data directory, which survives a reboot, and the run
// directory, which does not (sockets, pid files, containerd state). It says
// where things are and with which mode they are made; it never looks at what
// is inside them.
//
// Called by the command line and the roles. Domain packages take explicit
// paths in their Config instead of importing this package.
//
// What can go wrong: the data directory path is too long for a unix socket
// below the run directory (New refuses it), the directories cannot be made, or
// another process holds the lock (ErrLocked).
package datadir

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// DefaultRoot is the data directory used when the user names none.
const DefaultRoot = "/var/lib/atoll"

// defaultRun is the run directory that belongs to DefaultRoot.
const defaultRun = "/run/atoll"

// Tree is the set of paths that belong to one data directory. The zero value
// is not usable; make one with New.
type Tree struct {
	root string
	run  string
}

// New returns the tree below root, which must be an absolute path. It does no
// I/O: a root that is a symbolic link is used as given, so two names of one
// directory are two trees (the lock file still keeps them apart).
func New(root string) (Tree, error) {
	if root == "" {
		return Tree{}, errors.New("data directory: the path is empty")
	}
	if !filepath.IsAbs(root) {
		return Tree{}, fmt.Errorf("data directory %q: the path must be absolute", root)
	}
	root = filepath.Clean(root)
	if root == "/" {
		return Tree{}, errors.New("data directory: / cannot be a data directory")
	}
	return Tree{root: root, run: runDir(root)}, nil
}

// runDir derives the run directory from the data directory, so that a command
// needs to know only the latter.
func runDir(root string) string {
	if root == DefaultRoot {
		return defaultRun
	}
	sum := sha256.Sum256([]byte(root))
	return defaultRun + "-" + hex.EncodeToString(sum[:4])
}

// WithRun returns the same tree with another run directory. Only tests use it:
// commands find the run directory by the data directory alone.
func (t Tree) WithRun(dir string) Tree {
	t.run = dir
	return t
}

// Root is the data directory itself.
func (t Tree) Root() string { return t.root }

// Run is the directory of sockets and other state that ends with the boot.
func (t Tree) Run() string { return t.run }

// Instance is a short name of this data directory that is unique on the host:
// "atoll" for the default one, "atoll-<8 hex digits>" for others. It names the
// systemd unit and other host objects.
func (t Tree) Instance() string { return filepath.Base(t.run) }

// CgroupRoot is the control group that pods live under, in every hierarchy: ""
// for the default data directory, whose pods are below the root as everywhere,
// and one of its own for others, since a kubelet removes the groups of pods it
// does not know.
func (t Tree) CgroupRoot() string {
	if t.root == DefaultRoot {
		return ""
	}
	return "/" + t.Instance()
}

// CgroupRecord is where is noted which controllers were enabled for CgroupRoot.
// It goes with a reboot, as they do.
func (t Tree) CgroupRecord() string { return filepath.Join(t.run, "cgroup-controllers.json") }

// AdminKubeconfig is the administrator's kubeconfig, mode 0600.
func (t Tree) AdminKubeconfig() string { return t.data("admin.kubeconfig") }

// Lock is the file that `atoll up` holds a lock on while it runs. It contains
// the pid of the holder.
func (t Tree) Lock() string { return t.data("lock") }

// Settings is the file in which `atoll up` keeps the settings it was started
// with, so that a restart by the keeper or after a reboot uses the same ones.
func (t Tree) Settings() string { return t.data("settings.json") }

// AssetRecord is where the versions of the files written at start are noted.
func (t Tree) AssetRecord() string { return t.data("assets.json") }

// Bin holds the binaries written at start.
func (t Tree) Bin() string { return t.data("bin") }

// AtollPod is the multi-call binary of shims, guest init, CNI plugin and pool.
func (t Tree) AtollPod() string { return t.data("bin", "atoll-pod") }

// ShimAtoll is the containerd shim of micro-VM pods, a link to AtollPod.
func (t Tree) ShimAtoll() string { return t.data("bin", "containerd-shim-atoll-v1") }

// ShimMachine is the containerd shim of virtual machines, a link to AtollPod.
func (t Tree) ShimMachine() string { return t.data("bin", "containerd-shim-atoll-vm-v1") }

// ShimRunc is the containerd shim of runc pods, a link to AtollPod.
func (t Tree) ShimRunc() string { return t.data("bin", "containerd-shim-runc-v2") }

// CNIBin is the directory of CNI plugins.
func (t Tree) CNIBin() string { return t.data("bin", "cni") }

// CNIPlugin is the CNI plugin "atoll", a link to AtollPod.
func (t Tree) CNIPlugin() string { return t.data("bin", "cni", "atoll") }

// Credentials is the directory of the kubelet's image credential providers.
func (t Tree) Credentials() string { return t.data("bin", "credentials") }

// CredentialProvider is the image credential provider for the cluster's registry, a link to AtollPod.
func (t Tree) CredentialProvider() string {
	return t.data("bin", "credentials", "atoll-registry-credentials")
}

// Registry holds the images of the cluster's registry, mode 0700.
func (t Tree) Registry() string { return t.data("registry") }

// CNIConf is the directory of the CNI network configuration.
func (t Tree) CNIConf() string { return t.data("cni", "conf") }

// CNIState is where the CNI plugin keeps leases and other per-pod records.
func (t Tree) CNIState() string { return t.data("cni", "state") }

// Guest holds what runs inside a micro-VM.
func (t Tree) Guest() string { return t.data("guest") }

// Kernel is the pod kernel, a PVH ELF image.
func (t Tree) Kernel() string { return t.data("guest", "vmlinux") }

// ExecHelper is the static C helper the guest init starts containers with.
func (t Tree) ExecHelper() string { return t.data("guest", "exec") }

// Images is where image archives that ship with the binary are written.
func (t Tree) Images() string { return t.data("images") }

// PauseImage is the OCI archive of the pause image used by runc pods.
func (t Tree) PauseImage() string { return t.data("images", "pause.tar") }

// Logs is the directory of service logs.
func (t Tree) Logs() string { return t.data("logs") }

// Log is the log file of one service.
func (t Tree) Log(service string) string { return t.data("logs", service+".log") }

// Datastores is the directory of datastores that nobody has given a path.
func (t Tree) Datastores() string { return t.data("datastores") }

// Datastore is the directory of the datastore called name.
func (t Tree) Datastore(name string) string { return t.data("datastores", name) }

// Content holds the images of virtual machines as they came, by library item.
func (t Tree) Content() string { return t.data("content") }

// PodLogs is where the kubelet keeps container logs.
func (t Tree) PodLogs() string { return t.data("logs", "pods") }

// Denied is where traffic that network policies deny is logged, a file for each namespace.
func (t Tree) Denied() string { return t.data("logs", "denied") }

// PolicyStatus says how network policies are enforced.
func (t Tree) PolicyStatus() string { return t.rundir("network-policy.json") }

// Audit is the directory of the API server's audit log.
func (t Tree) Audit() string { return t.data("logs", "audit") }

// PKI holds certificate authorities, certificates and keys, mode 0700.
func (t Tree) PKI() string { return t.data("pki") }

// Kubeconfigs holds the kubeconfig of each component, mode 0700.
func (t Tree) Kubeconfigs() string { return t.data("kubeconfig") }

// Etcd is the data directory of etcd, mode 0700.
func (t Tree) Etcd() string { return t.data("etcd") }

// Server holds other state of the server role.
func (t Tree) Server() string { return t.data("server") }

// Agent holds other state of the agent role.
func (t Tree) Agent() string { return t.data("agent") }

// Kubelet is the root directory of the kubelet.
func (t Tree) Kubelet() string { return t.data("kubelet") }

// Containerd is containerd's root directory.
func (t Tree) Containerd() string { return t.data("containerd") }

// ContainerdConfig is containerd's configuration file.
func (t Tree) ContainerdConfig() string { return t.data("containerd", "config.toml") }

// ContainerdState is containerd's state directory.
func (t Tree) ContainerdState() string { return t.rundir("containerd") }

// NetnsDirs are the directories that hold network namespaces of pods: that of
// containerd and that of the pool.
func (t Tree) NetnsDirs() []string {
	return []string{t.rundir("containerd", "io.containerd.grpc.v1.cri", "netns"), t.PoolNetns()}
}

// PoolNetns is the directory of the network namespaces of pooled micro-VMs.
func (t Tree) PoolNetns() string { return t.rundir("netns") }

// ContainerdSocket is containerd's gRPC socket, which also serves the CRI.
func (t Tree) ContainerdSocket() string { return t.rundir("containerd.sock") }

// ContainerdTTRPC is containerd's ttrpc socket, used by shims.
func (t Tree) ContainerdTTRPC() string { return t.rundir("containerd.sock.ttrpc") }

// ShimSockets is the directory of the sockets of shims. Its path is kept short:
// containerd adds 36 bytes to it.
func (t Tree) ShimSockets() string { return t.rundir("shims") }

// Registries holds one directory per image registry with its hosts.toml, for
// the administrator to edit.
func (t Tree) Registries() string { return t.data("registries") }

// Pool holds the micro-VM templates and the per-VM scratch disks.
func (t Tree) Pool() string { return t.data("pool") }

// Machines holds what virtual machines keep on this host for as long as they exist, in one directory each: the
// variables of their firmware, the state of their TPMs.
func (t Tree) Machines() string { return t.data("machines") }

// PoolConfig is the configuration file of the warm pool.
func (t Tree) PoolConfig() string { return t.data("pool", "config.json") }

// PoolSocket is the socket on which shims ask for a warm micro-VM, mode 0600.
func (t Tree) PoolSocket() string { return t.rundir("pool.sock") }

// Exports is where volumes are visible on the host, for pods outside of micro-VMs.
func (t Tree) Exports() string { return t.rundir("exports") }

// Control is the socket on which a running `atoll up` answers status and stop
// requests, mode 0600.
func (t Tree) Control() string { return t.rundir("up.sock") }

// ReadyMark is the file a service makes when it is ready.
func (t Tree) ReadyMark(service string) string { return t.rundir(service + ".ready") }

// Keep is the file that exists while `atoll up` is to be kept running.
func (t Tree) Keep() string { return t.rundir("keep") }

// Atoll is the copy of the atoll binary that a detached supervisor runs from.
func (t Tree) Atoll() string { return t.data("bin", "atoll") }

// KeeperLock is the lock file of the keeper process that restarts `atoll up`
// where there is no systemd.
func (t Tree) KeeperLock() string { return t.rundir("keeper.lock") }

// data joins elem below the data directory.
func (t Tree) data(elem ...string) string {
	return filepath.Join(append([]string{t.root}, elem...)...)
}

// rundir joins elem below the run directory.
func (t Tree) rundir(elem ...string) string {
	return filepath.Join(append([]string{t.run}, elem...)...)
}

// dirMode is a directory and the mode it must have.
type dirMode struct {
	path string
	mode os.FileMode
}

// dirs lists the directories Create makes, parents first. The data and run
// directories can be searched by everybody because unprivileged QEMU processes
// and containers reach files below them by path; what is secret is closed
// individually.
func (t Tree) dirs() []dirMode {
	return []dirMode{
		{t.root, 0o711},
		{t.run, 0o711},
		{t.Bin(), 0o755},
		{t.CNIBin(), 0o755},
		{t.Credentials(), 0o755},
		{t.data("cni"), 0o700},
		{t.CNIConf(), 0o700},
		{t.CNIState(), 0o700},
		{t.Guest(), 0o755},
		{t.Images(), 0o700},
		{t.Datastores(), 0o700},
		{t.Content(), 0o700},
		{t.Registry(), 0o700},
		{t.Logs(), 0o755},
		{t.PodLogs(), 0o755},
		{t.Audit(), 0o700},
		{t.Denied(), 0o700},
		{t.PKI(), 0o700},
		{t.Kubeconfigs(), 0o700},
		{t.Etcd(), 0o700},
		{t.Server(), 0o700},
		{t.Agent(), 0o700},
		{t.Kubelet(), 0o711},
		{t.Containerd(), 0o711},
		{t.ContainerdState(), 0o711},
		{t.Pool(), 0o711},
		{t.Machines(), 0o711},
	}
}

// Names lists what Create and Acquire make directly below the data directory.
func (t Tree) Names() []string {
	names := []string{filepath.Base(t.Lock())}
	for _, d := range t.dirs() {
		if filepath.Dir(d.path) == t.root {
			names = append(names, filepath.Base(d.path))
		}
	}
	return names
}

// Create makes all directories of the tree and gives them their modes. It
// never widens what it does not own: only the directories of the tree are
// touched, not what is in them.
func (t Tree) Create() error {
	for _, d := range t.dirs() {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return fmt.Errorf("making %s: %w", d.path, err)
		}
		if err := os.Chmod(d.path, d.mode); err != nil {
			return fmt.Errorf("setting the mode of %s: %w", d.path, err)
		}
	}
	return nil
}
