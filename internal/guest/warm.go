package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/rtnl"
	"atoll.dev/atoll/internal/guest/volume"
)

const (
	warmID    = "warm"
	maxRounds = 16
)

// Warm implements the protocol: it goes once through everything a pod start does, so that the
// emulator has translated the code, and leaves nothing behind but the mounted scratch disk.
func (s *server) Warm(ctx context.Context, req *guestv1.WarmRequest) (*guestv1.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isSetUp {
		return nil, status(fmt.Errorf("pod is set up: %w", container.ErrState))
	}
	return &guestv1.Empty{}, status(s.warm(ctx, req))
}

func (s *server) warm(ctx context.Context, req *guestv1.WarmRequest) error {
	if len(req.GetEntropy()) > 0 {
		if err := addEntropy(req.GetEntropy()); err != nil {
			return err
		}
	}
	if s.pod.Load() == nil {
		p, err := s.prepareScratch(ctx, req.GetScratchSerial())
		if err != nil {
			return err
		}
		s.pod.Store(p)
	}
	for range max(1, min(req.GetRounds(), maxRounds)) {
		if err := s.warmRound(ctx, req.GetSerial()); err != nil {
			return fmt.Errorf("warming up: %w", err)
		}
	}
	// What the rounds left on the heap is collected now and not during the pod's start.
	debug.FreeOSMemory()
	return nil
}

func (s *server) warmRound(ctx context.Context, serial string) error {
	p := s.pod.Load()
	if err := warmIdentity(); err != nil {
		return err
	}
	if err := warmNetwork(); err != nil {
		return err
	}
	if err := mountShm(0); err != nil {
		return err
	}
	if err := unix.Unmount(channel.ShmPath, 0); err != nil {
		return fmt.Errorf("unmounting shm: %w", err)
	}
	if err := warmFiles(p.volumes); err != nil {
		return err
	}
	if serial != "" {
		if err := s.warmContainer(ctx, p, serial); err != nil {
			return err
		}
	}
	return p.volumes.Remove(warmID)
}

// warmIdentity does what Setup does to the kernel's state, without changing it.
func warmIdentity() error {
	seed := make([]byte, minEntropy)
	if _, err := unix.Getrandom(seed, 0); err != nil {
		return fmt.Errorf("reading random bytes: %w", err)
	}
	if err := addEntropy(seed); err != nil {
		return err
	}
	if err := setClock(time.Now().UnixNano()); err != nil {
		return err
	}
	if err := setIdentity("localhost", ""); err != nil {
		return err
	}
	const sysctl = "net.ipv4.ip_unprivileged_port_start"
	old, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return fmt.Errorf("reading sysctl: %w", err)
	}
	return setSysctls(map[string]string{sysctl: strings.TrimSpace(string(old))})
}

// warmNetwork gives eth0 addresses and takes them away again. Nobody listens: the interface of a
// clone that has no pod yet is connected to nothing.
func warmNetwork() error {
	if _, err := os.Stat("/sys/class/net/eth0"); err != nil {
		return nil //nolint:nilerr // a template without network
	}
	n := &network{
		mac:       net.HardwareAddr{2, 0, 0, 0, 0, 1},
		mtu:       1500,
		addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/31"), netip.MustParsePrefix("2001:db8::1/127")},
		routes: []route{
			{dst: netip.MustParsePrefix("0.0.0.0/0"), gateway: netip.MustParseAddr("192.0.2.0")},
			{dst: netip.MustParsePrefix("::/0"), gateway: netip.MustParseAddr("2001:db8::")},
		},
	}
	if err := n.apply(); err != nil {
		return err
	}
	c, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	eth0, err := c.Index("eth0")
	if err != nil {
		return err
	}
	if err := c.DeleteAddress(eth0, n.addresses[0]); err != nil {
		return err
	}
	// Taking the link down drops the routes and every IPv6 address.
	return c.SetLink(eth0, nil, 0, false)
}

// warmFiles pushes a tree the way a ConfigMap comes, with the helper as the file.
func warmFiles(volumes *volume.Store) error {
	if err := volumes.Create(warmID, volume.Pushed, 0, 0, 0, 0); err != nil {
		return err
	}
	helper, err := os.ReadFile(helperPath)
	if err != nil {
		return fmt.Errorf("reading exec helper: %w", err)
	}
	return volumes.Put(warmID, []volume.File{
		{Path: "..v", Mode: unix.S_IFDIR | 0o755},
		{Path: "..v/exec", Mode: unix.S_IFREG | 0o755, Data: helper},
		{Path: "..data", Mode: unix.S_IFLNK | 0o777, Target: "..v"},
		{Path: "exec", Mode: unix.S_IFLNK | 0o777, Target: "..data/exec"},
		{Path: "hosts", Mode: unix.S_IFREG | 0o644},
	}, true, true)
}

func (s *server) warmContainer(ctx context.Context, p *pod, serial string) error {
	if err := s.m.disks.MountImage(ctx, warmID, serial, ""); err != nil {
		return err
	}
	spec, err := json.Marshal(warmSpec())
	if err != nil {
		return err
	}
	if err := p.containers.Create(container.Create{ID: warmID, Spec: spec, Lowers: []string{warmID}, Stdin: true, Seccomp: allowAll()}); err != nil {
		return err
	}
	c, err := p.containers.Get(warmID)
	if err != nil {
		return err
	}
	for fd := range 3 {
		if err := p.containers.Attach(warmID, "", fd, nowhere{}); err != nil {
			return err
		}
	}
	if _, err := c.Start(""); err != nil {
		return err
	}
	state, err := c.Wait(ctx, "")
	if err != nil {
		return err
	}
	if state.Status != 0 {
		return fmt.Errorf("warm-up container ended with status %d", state.Status)
	}
	if _, err := c.Delete(ctx, ""); err != nil {
		return err
	}
	return s.m.disks.UnmountImage(ctx, warmID)
}

// allowAll is a seccomp program of one instruction.
func allowAll() []byte {
	return []byte{unix.BPF_RET | unix.BPF_K, 0, 0, 0, 0, 0, 0xff, 0x7f} // SECCOMP_RET_ALLOW
}

// warmSpec is a spec with everything an ordinary container has.
func warmSpec() *specs.Spec {
	const volume = channel.VolumesDir + "/" + warmID
	shares, pids := uint64(2), int64(100)
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	safe := []string{"nosuid", "noexec", "nodev"}
	return &specs.Spec{
		Process: &specs.Process{
			Args: []string{"/warm/exec"}, Env: []string{"PATH=/bin"}, Cwd: "/",
			User:         specs.User{UID: 65534, GID: 65534, AdditionalGids: []uint32{1}},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps},
			OOMScoreAdj:  new(int), NoNewPrivileges: true,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: safe},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: safe},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: append([]string{"ro"}, safe...)},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: append([]string{"ro", "relatime"}, safe...)},
			{Destination: "/etc/hosts", Type: "bind", Source: volume + "/hosts", Options: []string{"rbind", "rprivate", "rw"}},
			{Destination: "/warm", Type: "bind", Source: volume, Options: []string{"rbind", "rprivate", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces:    []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
			Resources:     &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}, Pids: &specs.LinuxPids{Limit: &pids}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/sys"},
		},
	}
}

// nowhere is a stream at its end that takes everything.
type nowhere struct{}

func (nowhere) Read([]byte) (int, error)        { return 0, io.EOF }
func (nowhere) Write(p []byte) (int, error)     { return len(p), nil }
func (nowhere) Close() error                    { return nil }
func (nowhere) SetReadDeadline(time.Time) error { return nil }
