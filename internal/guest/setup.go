package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/program"
	"atoll.dev/atoll/internal/guest/rtnl"
	"atoll.dev/atoll/internal/guest/usage"
	"atoll.dev/atoll/internal/guest/volume"
)

const (
	minEntropy = 64
	maxEntropy = 4096
	defaultShm = 64 << 20
	shmFlags   = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// addEntropy credits bytes of the host to the kernel's generator and makes it reseed from them, so
// that clones of one template part ways. See random(4).
func addEntropy(data []byte) error {
	const (
		rndAddEntropy = 0x40085203
		rndReseedCRNG = 0x5207
	)
	if len(data) < minEntropy || len(data) > maxEntropy {
		return fmt.Errorf("%d bytes of entropy, want %d to %d: %w", len(data), minEntropy, maxEntropy, errInvalid)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("adding entropy: %w", err)
	}
	defer f.Close()
	pool := struct {
		bits, size int32
		data       [maxEntropy]byte
	}{bits: int32(8 * len(data)), size: int32(len(data))}
	copy(pool.data[:], data)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&pool))); errno != 0 {
		return fmt.Errorf("adding entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseeding: %w", errno)
	}
	return nil
}

// setIdentity sets host name and machine id.
func setIdentity(hostname, machineID string) error {
	if hostname != "" {
		if err := unix.Sethostname([]byte(hostname)); err != nil {
			return fmt.Errorf("setting hostname %q: %w", hostname, err)
		}
	}
	if machineID == "" {
		return nil
	}
	if len(machineID) != 32 || strings.Trim(machineID, "0123456789abcdef") != "" {
		return fmt.Errorf("machine id %q: %w", machineID, errInvalid)
	}
	if err := os.WriteFile("/etc/machine-id", []byte(machineID+"\n"), 0o444); err != nil {
		return fmt.Errorf("writing machine id: %w", err)
	}
	return nil
}

// network is a parsed Network message.
type network struct {
	mac       net.HardwareAddr
	mtu       uint32
	addresses []netip.Prefix
	routes    []route
}

type route struct {
	dst     netip.Prefix
	gateway netip.Addr
}

func parseNetwork(n *guestv1.Network) (*network, error) {
	if n.GetMac() == "" {
		return nil, nil //nolint:nilnil // a pod without network has none to set up
	}
	mac, err := net.ParseMAC(n.GetMac())
	if err != nil || len(mac) != 6 {
		return nil, fmt.Errorf("MAC address %q: %w", n.GetMac(), errInvalid)
	}
	out := &network{mac: mac, mtu: n.GetMtu()}
	for _, a := range n.GetAddresses() {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w: %w", a, errInvalid, err)
		}
		out.addresses = append(out.addresses, p)
	}
	for _, r := range n.GetRoutes() {
		p, err := netip.ParsePrefix(r.GetDestination())
		if err != nil {
			return nil, fmt.Errorf("route to %q: %w: %w", r.GetDestination(), errInvalid, err)
		}
		rt := route{dst: p}
		if g := r.GetGateway(); g != "" {
			if rt.gateway, err = netip.ParseAddr(g); err != nil {
				return nil, fmt.Errorf("gateway %q: %w: %w", g, errInvalid, err)
			}
		}
		out.routes = append(out.routes, rt)
	}
	return out, nil
}

// apply configures eth0.
func (n *network) apply() error {
	return onEth0(func(c *rtnl.Conn, eth0 int) error {
		// The MAC can be set in the same request that brings the link up.
		if err := c.SetLink(eth0, n.mac, n.mtu, true); err != nil {
			return err
		}
		for _, a := range n.addresses {
			if err := c.AddAddress(eth0, a); err != nil {
				return err
			}
		}
		for _, r := range n.routes {
			if err := c.AddRoute(eth0, r.dst, r.gateway); err != nil {
				return err
			}
		}
		return nil
	})
}

// remove takes the addresses off eth0 again and brings it down, which drops the routes.
func (n *network) remove() error {
	return onEth0(func(c *rtnl.Conn, eth0 int) error {
		for _, a := range n.addresses {
			if err := c.DeleteAddress(eth0, a); err != nil {
				return err
			}
		}
		return c.SetLink(eth0, nil, 0, false)
	})
}

// onEth0 calls f with the index of eth0.
func onEth0(f func(c *rtnl.Conn, eth0 int) error) error {
	c, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	eth0, err := c.Index("eth0")
	if err != nil {
		return err
	}
	return f(c, eth0)
}

// setSysctls writes the pod's sysctls.
func setSysctls(values map[string]string) error {
	for name, value := range values {
		file, err := program.SysctlPath(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
			return fmt.Errorf("setting sysctl %s to %q: %w", name, value, err)
		}
	}
	return nil
}

// mountShm makes the pod's /dev/shm, of the usual size.
func mountShm(*machine) error {
	return unix.Mount("shm", channel.ShmPath, "tmpfs", shmFlags, "mode=1777,size="+strconv.Itoa(defaultShm))
}

// resizeShm gives it another size, 0 for the usual one.
func resizeShm(size uint64) error {
	if size == 0 {
		return nil
	}
	if err := unix.Mount("", channel.ShmPath, "", unix.MS_REMOUNT|shmFlags, "size="+strconv.FormatUint(size, 10)); err != nil {
		return fmt.Errorf("resizing %s: %w", channel.ShmPath, err)
	}
	return nil
}

// prepareScratch mounts the scratch disk and makes what depends on it.
func (s *server) prepareScratch(ctx context.Context, serial string) (*pod, error) {
	if err := s.m.disks.MountScratch(ctx, serial, scratchDir); err != nil {
		return nil, err
	}
	for _, d := range []string{layersDir, volumesDir} {
		if err := os.Mkdir(d, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("preparing scratch: %w", err)
		}
	}
	meter, err := usage.New(scratchDir)
	if err != nil {
		return nil, err
	}
	volumes := volume.New(volume.Config{Dir: channel.VolumesDir, Stage: stageDir, Scratch: volumesDir}, meter)
	p := &pod{
		volumes: volumes,
		containers: container.New(container.Config{
			Helper: helperPath, Rootfs: rootfsDir, Scratch: layersDir, Shm: channel.ShmPath, MountPoints: mountPoints,
			Reaper: s.m.reaper, Tree: s.m.tree, Disks: s.m.disks, Volumes: volumes, Meter: meter,
			Filter: s.m.filter, Watch: s.m.watch,
		}),
	}
	go func() { s.stop(fmt.Errorf("containers ended: %w", p.containers.Run(s.ctx))) }()
	return p, nil
}

// Setup implements the protocol.
func (s *server) Setup(ctx context.Context, req *guestv1.SetupRequest) (*guestv1.SetupResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isSetUp {
		return nil, status(fmt.Errorf("pod is set up: %w", container.ErrState))
	}
	if err := s.setup(ctx, req); err != nil {
		return nil, status(err)
	}
	if s.rehearsing.Load() {
		if err := undoSetup(req); err != nil {
			return nil, status(err)
		}
	} else {
		s.isSetUp = true
	}
	memory, err := totalMemory()
	if err != nil {
		return nil, status(err)
	}
	return &guestv1.SetupResponse{Kernel: kernelRelease(), MemoryBytes: memory, Cpus: uint32(onlineCPUs())}, nil
}

func (s *server) setup(ctx context.Context, req *guestv1.SetupRequest) (err error) {
	if err := addEntropy(req.GetEntropy()); err != nil {
		return err
	}
	if err := setClock(req.GetUnixNanos()); err != nil {
		return err
	}
	if err := setIdentity(req.GetHostname(), req.GetMachineId()); err != nil {
		return err
	}
	n, err := parseNetwork(req.GetNetwork())
	if err != nil {
		return err
	}
	if n != nil {
		if err := n.apply(); err != nil {
			return fmt.Errorf("setting up network: %w", err)
		}
	}
	if err := setSysctls(req.GetSysctls()); err != nil {
		return err
	}
	if err := resizeShm(req.GetShmBytes()); err != nil {
		return err
	}
	if s.pod.Load() == nil {
		p, err := s.prepareScratch(ctx, req.GetScratchSerial())
		if err != nil {
			return err
		}
		s.pod.Store(p)
	}
	if req.GetSharedPid() {
		return s.pod.Load().containers.SharePID()
	}
	return nil
}

// undoSetup takes back what the next setup would stumble over.
func undoSetup(req *guestv1.SetupRequest) error {
	n, err := parseNetwork(req.GetNetwork())
	if n == nil || err != nil {
		return err
	}
	return n.remove()
}

// kernelRelease is uname -r.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// waitFor polls a condition that the kernel brings about within moments.
func waitFor(ctx context.Context, limit time.Duration, ok func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	return true
}
