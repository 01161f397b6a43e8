// Package guest is the init of a pod's micro-VM: process 1 of a machine that is booted once as a
// template, stopped at a barrier, and cloned for every pod.
//
// It boots (a table of steps, see boot.go), rehearses pod starts (see package rehearsal), announces itself
// on the virtio port and blocks; what comes after that read happens in a clone. Then it serves the guest protocol (api/guest/v1) over
// yamux until it is told to power off. cmd/atoll-pod calls Main; internal/shim is the peer.
//
// The host is trusted, the containers are not: ids and paths from the host are checked for form,
// everything that containers can write to is opened without following their links.
//
// Uniqueness. All clones share the template's memory, so everything random that was drawn before
// the barrier is the same in all of them. Setup therefore credits the host's entropy and reseeds
// the kernel's generator before anything else; every process started after that gets its own
// AT_RANDOM, stack layout and getrandom. What stays shared: the kernel's own layout (KASLR is off),
// and what the Go runtime of this process seeded at its start (map hashes, the generator behind
// math/rand), and the kernel's stack canary of the processes that wait for containers. Nothing here uses math/rand, crypto/rand reads the kernel, and this process holds no
// keys; a hash seed known to a neighbour lets nobody in. boot_id is drawn by the kernel when it is
// first read, so nothing may read it before Setup.
package guest

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
)

// Where things are in the guest.
const (
	helperPath  = "/exec"
	runDir      = "/run/atoll"
	imagesDir   = runDir + "/images"
	stageDir    = runDir + "/stage"
	rootfsDir   = runDir + "/rootfs"
	mountPoints = container.MountPoints(runDir + "/mountpoints")
	scratchDir  = runDir + "/scratch"
	layersDir   = scratchDir + "/containers"
	volumesDir  = scratchDir + "/volumes"
	cgroupDir   = "/sys/fs/cgroup"
	portsDir    = "/sys/class/virtio-ports"
	sysBlock    = "/sys/block"
)

// portDeadline bounds how long the port to the host may take to appear: a moment, or seconds on a host that has far too
// much to do.
const portDeadline = time.Minute

// Main is process 1 of a micro-VM. It does not return unless it is called as something else.
func Main() int {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: must be process 1 of a micro-VM")
		return 2
	}
	debug.SetGCPercent(gcPercent)
	log := slog.New(slog.NewTextHandler(console(4), &slog.HandlerOptions{Level: slog.LevelInfo}))
	err := run(log)
	// Reading the port failed or the boot did: there is nobody to talk to.
	// It must show on the console, which leaves out warnings.
	slog.New(slog.NewTextHandler(console(3), nil)).Error("init ended", "err", err)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	return 1
}

// console writes to the kernel log at that level. The host sees the serious levels on the serial console.
type console int

func (c console) Write(p []byte) (int, error) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return os.Stderr.Write(p)
	}
	defer f.Close()
	return f.Write(fmt.Appendf(nil, "<%d>init: %s", c, p))
}

func run(log *slog.Logger) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	started := time.Now()
	m := &machine{}
	if err := boot(m); err != nil {
		return err
	}
	// Signals and goroutines of the long-running parts start before the barrier as well.
	for name, f := range map[string]func(context.Context) error{"reaper": m.reaper.Run, "memory": m.watch.Run} {
		go func() { cancel(fmt.Errorf("%s ended: %w", name, f(ctx))) }()
	}
	log.Info("booted", "ms", time.Since(started).Milliseconds())
	s, err := newServer(ctx, log, m, cancel)
	if err != nil {
		return err
	}
	if err := s.rehearse(ctx); err != nil {
		return err
	}
	postponeCollection()
	if err := barrier(m.port); err != nil {
		return err
	}
	session, err := channel.Server(m.port)
	if err != nil {
		return err
	}
	go func() { cancel(fmt.Errorf("session ended: %w", s.serveStreams(session))) }()
	<-ctx.Done()
	return context.Cause(ctx)
}

// barrier announces the guest and blocks; the template is saved meanwhile.
func barrier(port io.ReadWriter) error {
	if _, err := io.WriteString(port, channel.Ready); err != nil {
		return fmt.Errorf("announcing readiness: %w", err)
	}
	line, err := channel.ReadLine(port, len(channel.Go))
	if err != nil {
		return fmt.Errorf("waiting at the barrier: %w", err)
	}
	if line+"\n" != channel.Go {
		return fmt.Errorf("waiting at the barrier: got %q", line)
	}
	return nil
}

// machine is what the boot leaves behind.
type machine struct {
	port   *os.File
	reaper *container.Reaper
	watch  *container.Watcher
	parts
}
