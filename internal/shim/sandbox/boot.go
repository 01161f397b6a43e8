package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/linux/wallclock"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/shim/clock"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/images"
	"atoll.dev/atoll/internal/shim/task"
	"atoll.dev/atoll/internal/shim/volumes"
)

const (
	// bootTimeout bounds the start from Create to a pod that runs, waiting for a clone included.
	bootTimeout = 100 * time.Second
	// setupTimeout bounds each call to the guest, which may starve among emulated ones.
	setupTimeout = 90 * time.Second
	// statsTimeout bounds how long the guest may take to say what it uses.
	statsTimeout = 30 * time.Second
	// plugTimeout bounds the wait for the guest to find plugged memory and CPUs.
	plugTimeout  = time.Minute
	plugPoll     = 10 * time.Millisecond
	plugPollMost = 500 * time.Millisecond
	// guestReserve is what the guest's kernel and init need besides the containers.
	guestReserve = 64 << 20
)

// boot makes the pod's sandbox out of a clone.
func (s *Service) boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	steps := s.cfg.Steps.Begin("sandbox")
	m, err := s.cfg.VM(ctx)
	if err != nil {
		return fmt.Errorf("waiting for a clone: %w", err)
	}
	steps.Done("clone ready")
	s.room.set(m.Memory, m.CPUs)
	s.mu.Lock()
	s.vm = m
	s.mu.Unlock()
	s.running.Go(func() { s.watch(m) })

	placed := make(chan error, 1) // the cgroup
	s.running.Go(func() { placed <- s.place(m) })
	guest, err := s.wake(ctx, m)
	if err != nil {
		return err
	}
	steps.Done("resume and network")
	req, err := s.identity(m, guest)
	if err != nil {
		return err
	}
	pod := s.makePod(m)
	ready := make(chan error, 1)
	pod.Ready = func(ctx context.Context) error {
		select {
		case err := <-ready:
			ready <- err // for the next one
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	finish := func(ctx context.Context) error {
		err := s.setup(ctx, m, pod, req)
		steps.Done("setup")
		ready <- err
		return err
	}
	if s.ordinary() {
		s.running.Go(func() { s.finish(m, finish) })
	} else if err := finish(ctx); err != nil {
		return err
	}
	if err := <-placed; err != nil {
		return err
	}
	s.mu.Lock()
	s.pod = pod
	s.mu.Unlock()
	s.cfg.Tasks.Attach(pod)
	return nil
}

// ordinary reports whether the pod asks for nothing that the guest could refuse: then containerd need not
// wait for the set-up and prepares the first container meanwhile. The errors of other pods belong to the
// start of the sandbox.
func (s *Service) ordinary() bool {
	return len(s.config.GetLinux().GetSysctls()) == 0 && !s.needs(podResources(s.config))
}

// finish sets the guest up while containerd goes on. Without that the micro-VM is of no use.
func (s *Service) finish(m *VM, setup func(context.Context) error) {
	ctx, cancel := context.WithTimeout(s.background, setupTimeout)
	defer cancel()
	if err := setup(ctx); err != nil && s.background.Err() == nil {
		slog.Error("setting up the guest", "sandbox", s.id, "error", err)
		_ = m.Machine.Kill() // its end is noticed by watch
	}
}

// place moves QEMU and this process into the pod's cgroup and makes them what the kubelet wants to be
// killed first or last.
func (s *Service) place(m *VM) error {
	s.protect(m)
	parent := s.config.GetLinux().GetCgroupParent()
	if parent == "" {
		return nil
	}
	if err := s.cfg.Cgroups.Join(parent, "vm-"+s.id[:min(len(s.id), 12)], m.Machine.PID(), os.Getpid()); err != nil {
		return err
	}
	return s.sustain(m)
}

// sustain keeps the pod's limits on the host from being too small for the micro-VM as it is now.
func (s *Service) sustain(m *VM) error {
	s.room.Lock()
	memory := s.room.memory + m.Kernel
	s.room.Unlock()
	return s.cfg.Cgroups.Sustain(memory)
}

// sustainOrWarn is sustain for callers that have no use for an error.
func (s *Service) sustainOrWarn(m *VM) {
	if err := s.sustain(m); err != nil {
		slog.Warn("micro-VM may stall or be killed", "sandbox", s.id, "error", err)
	}
}

const (
	limitsPoll   = 250 * time.Millisecond
	limitsSettle = 10 * time.Second // after that the next statistics are near
)

// followLimits sustains the micro-VM while the kubelet resizes the pod: it may lower the pod's limits after those
// of its containers.
func (s *Service) followLimits(m *VM) {
	ticker := time.NewTicker(limitsPoll)
	defer ticker.Stop()
	for end := time.Now().Add(limitsSettle); time.Now().Before(end); {
		s.sustainOrWarn(m)
		select {
		case <-ticker.C:
		case <-s.background.Done():
			return
		}
	}
}

// wake lets the clone run and joins it to the pod's network, both at once.
func (s *Service) wake(ctx context.Context, m *VM) (network.Guest, error) {
	var (
		wg             sync.WaitGroup
		guest          network.Guest
		joined, resume error
	)
	if s.netns != "" {
		wg.Go(func() { guest, joined = s.cfg.Network.JoinTap(s.netns, m.Tap) })
	}
	resume = m.Machine.Resume(ctx)
	wg.Wait()
	return guest, errors.Join(resume, joined)
}

// identity is what makes the clone this pod's.
func (s *Service) identity(m *VM, g network.Guest) (*guestv1.SetupRequest, error) {
	hostname, err := s.hostname()
	if err != nil {
		return nil, err
	}
	entropy := make([]byte, 256)
	_, _ = rand.Read(entropy) // never fails
	return &guestv1.SetupRequest{
		Entropy: entropy, Hostname: hostname, MachineId: machineID(s.id), Network: guestNetwork(g),
		Sysctls:       sysctls(s.config.GetLinux().GetSysctls()),
		SharedPid:     s.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == cripb.NamespaceMode_POD,
		ScratchSerial: m.Scratch,
	}, nil
}

// setup gives the guest what makes it this pod's: first what makes the clone unique.
func (s *Service) setup(ctx context.Context, m *VM, pod *task.Pod, req *guestv1.SetupRequest) error {
	grown, err := s.grow(ctx, m, podResources(s.config))
	if err != nil {
		return fmt.Errorf("setting up the guest: %w", err)
	}
	files, err := podFiles(s.config)
	if err != nil {
		return err
	}
	files["hostname"] = []byte(req.GetHostname() + "\n")
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	req.UnixNanos = time.Now().UnixNano()
	if _, err := m.Session.Setup(ctx, req); err != nil {
		return fmt.Errorf("setting up the guest: %w", err)
	}
	if grown {
		s.sustainOrWarn(m)
		if err := s.online(ctx, m); err != nil {
			return fmt.Errorf("setting up the guest: %w", err)
		}
	}
	pod.Volumes.Begin(s.background, files)
	s.serve(m, pod)
	meta := s.config.GetMetadata()
	s.cfg.Steps.Log("sandbox started", "sandbox", s.id, "pod", meta.GetNamespace()+"/"+meta.GetName(),
		"pid", pod.PID, "warm", m.Warm)
	return nil
}

func (s *Service) hostname() (string, error) {
	if h := s.config.GetHostname(); h != "" {
		return h, nil
	}
	h, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("reading host name: %w", err)
	}
	return h, nil
}

// machineID is derived from the sandbox's id, which is random: as unique, and the same when asked
// twice.
func machineID(id string) string {
	clean := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'f' {
			return r
		}
		return -1
	}, id)
	if len(clean) < 32 {
		return fmt.Sprintf("%032s", clean)
	}
	return clean[:32]
}

// sysctls adds what containerd sets for every pod with a network of its own.
func sysctls(asked map[string]string) map[string]string {
	out := map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "0",
		"net.ipv4.ping_group_range":           "0 2147483647",
	}
	maps.Copy(out, asked)
	return out
}

func guestNetwork(g network.Guest) *guestv1.Network {
	if len(g.MAC) == 0 {
		return nil
	}
	n := &guestv1.Network{Mac: g.MAC.String(), Mtu: uint32(g.MTU)}
	for _, a := range g.Addresses {
		n.Addresses = append(n.Addresses, a.String())
	}
	for _, r := range g.Routes {
		route := &guestv1.Route{Destination: r.Destination.String()}
		if r.Gateway.IsValid() {
			route.Gateway = r.Gateway.String()
		}
		n.Routes = append(n.Routes, route)
	}
	return n
}

// makePod collects what tasks need.
func (s *Service) makePod(m *VM) *task.Pod {
	persistent := disks.New(s.cfg.Disks, s.config.GetMetadata().GetUid(), m.Volumes, m.Session)
	s.mu.Lock()
	s.disks = persistent
	s.mu.Unlock()
	pod := &task.Pod{
		Guest: m.Session, Streams: m.Session, Images: images.New(m.Machine, m.Session),
		Volumes: volumes.New(m.Session, persistent, s.cfg.Roots), PID: uint32(m.Machine.PID()),
		Grow:    func(ctx context.Context, want task.Resources) error { return s.growRunning(ctx, m, want) },
		Protect: func(score int) { s.lowerScore(m, score) },
		Sustain: func() {
			s.sustainOrWarn(m)
		},
		Resized: func() { s.running.Go(func() { s.followLimits(m) }) },
	}
	for _, name := range []string{"hostname", "hosts", "resolv.conf"} {
		pod.Files = append(pod.Files, specs.Mount{
			Destination: "/etc/" + name, Source: filepath.Join(channel.VolumesDir, volumes.PodVolume, name),
		})
	}
	return pod
}

// podFiles are the files of every container's /etc that containerd leaves to the sandbox.
func podFiles(config *cripb.PodSandboxConfig) (map[string][]byte, error) {
	files := map[string][]byte{
		"hosts": []byte("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
	}
	dns := config.GetDnsConfig()
	if dns == nil {
		data, err := os.ReadFile("/etc/resolv.conf")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("reading the host's resolv.conf: %w", err)
		}
		files["resolv.conf"] = data
		return files, nil
	}
	var b strings.Builder
	if len(dns.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(dns.Searches, " "))
	}
	for _, server := range dns.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if len(dns.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(dns.Options, " "))
	}
	files["resolv.conf"] = []byte(b.String())
	return files, nil
}

// serve starts what goes on as long as the micro-VM runs.
func (s *Service) serve(m *VM, pod *task.Pod) {
	background := func(doing string, run func(context.Context) error) {
		s.running.Go(func() {
			if err := run(s.background); err != nil && !gone(err) {
				slog.Error(doing, "sandbox", s.id, "error", err)
			}
		})
	}
	background("updating volumes", pod.Volumes.Run)
	background("reading events of the guest", func(ctx context.Context) error { return s.events(ctx, m) })
	background("following the host's clock", func(ctx context.Context) error {
		timer, err := wallclock.New()
		if err != nil {
			return err
		}
		follower := clock.New(clock.Config{Guest: m.Session, Timer: timer})
		if m.Volumes != nil { // which alone can make it stand still
			m.Volumes.OnGoingOn(follower.Soon)
		}
		return follower.Run(ctx)
	})
	if s.netns != "" {
		background("forwarding ports", func(ctx context.Context) error {
			return s.cfg.Network.ServePortForward(ctx, s.netns, m.Session.Dial)
		})
	}
	background("giving back memory", func(context.Context) error {
		release()
		return nil
	})
}

// events reports what the guest says about memory.
func (s *Service) events(ctx context.Context, m *VM) error {
	for {
		e, err := m.Session.NextEvent(ctx, &guestv1.Empty{})
		if err != nil {
			return err
		}
		switch e.GetKind() {
		case guestv1.Event_OOM:
			s.cfg.Tasks.OOM(e.GetContainerId())
		case guestv1.Event_LOW_MEMORY:
			slog.Warn("micro-VM is short of memory", "sandbox", s.id)
		case guestv1.Event_NONE:
		}
		// A guest cannot keep the shim busy with events.
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// room is what a micro-VM has.
type room struct {
	sync.Mutex // held over a change; guards the fields below

	memory int64
	cpus   int
}

func (r *room) set(memory int64, cpus int) {
	r.Lock()
	defer r.Unlock()
	r.memory, r.cpus = memory, cpus
}

// podResources are the limits that the kubelet gives for the whole pod, where all containers have some.
func podResources(config *cripb.PodSandboxConfig) task.Resources {
	r := config.GetLinux().GetResources()
	var out task.Resources
	if r.GetMemoryLimitInBytes() > 0 {
		out.Memory = uint64(r.GetMemoryLimitInBytes())
	}
	if r.GetCpuQuota() > 0 && r.GetCpuPeriod() > 0 {
		out.CPUs = float64(r.GetCpuQuota()) / float64(r.GetCpuPeriod())
	}
	return out
}

// needs reports whether the micro-VM is too small for the limits.
func (s *Service) needs(want task.Resources) bool {
	s.room.Lock()
	defer s.room.Unlock()
	return want.Memory > 0 && (want.Memory > math.MaxInt64-guestReserve || int64(want.Memory)+guestReserve > s.room.memory) ||
		int(math.Ceil(want.CPUs)) > s.room.cpus
}

// grow plugs memory and CPUs so that the limits fit, and reports whether it had to.
func (s *Service) grow(ctx context.Context, m *VM, want task.Resources) (bool, error) {
	s.room.Lock()
	defer s.room.Unlock()
	grown := false
	if want.Memory > math.MaxInt64-guestReserve {
		return false, fmt.Errorf("memory limit of %d bytes makes no sense", want.Memory)
	}
	if need := int64(want.Memory) + guestReserve - s.room.memory; want.Memory > 0 && need > 0 {
		added, err := m.Machine.AddMemory(ctx, need)
		if err != nil {
			return grown, fmt.Errorf("the micro-VM needs %d MiB more: %w", need>>20, err)
		}
		s.room.memory += added
		grown = true
	}
	if n := int(math.Ceil(want.CPUs)); n > s.room.cpus {
		if err := m.Machine.SetCPUs(ctx, n); err != nil {
			return grown, fmt.Errorf("the micro-VM needs %d CPUs: %w", n, err)
		}
		s.room.cpus = n
		grown = true
	}
	return grown, nil
}

// growRunning grows a micro-VM whose guest is set up.
func (s *Service) growRunning(ctx context.Context, m *VM, want task.Resources) error {
	grown, err := s.grow(ctx, m, want)
	if err != nil || !grown {
		return err
	}
	s.sustainOrWarn(m)
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	return s.online(ctx, m)
}

// online makes the guest use what was plugged. The guest finds new devices by and by.
func (s *Service) online(ctx context.Context, m *VM) error {
	s.room.Lock()
	memory, cpus := s.room.memory, s.room.cpus
	s.room.Unlock()
	deadline := time.Now().Add(plugTimeout)
	for wait := plugPoll; ; wait = min(2*wait, plugPollMost) {
		// A block of memory that is just being added cannot be brought into use yet.
		got, err := m.Session.OnlineResources(ctx, &guestv1.Empty{})
		late := time.Now().After(deadline)
		switch {
		case err != nil && (late || gone(err)):
			return fmt.Errorf("bringing memory and CPUs into use: %w", err)
		case err == nil && got.GetCpus() >= uint32(cpus) && got.GetMemoryBytes() >= uint64(memory-guestReserve):
			return nil
		case late:
			slog.Warn("micro-VM does not use all it was given", "sandbox", s.id,
				"memory", got.GetMemoryBytes(), "memoryGiven", memory, "cpus", got.GetCpus(), "cpusGiven", cpus)
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
