package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// system is the running guest.
type system struct {
	console io.Writer

	mu     sync.Mutex
	cloud  cloudStatus
	static map[string]bool // interfaces that have their configuration
	boots  int             // of this disk
}

func newSystem() *system {
	return &system{console: os.Stdout, static: map[string]bool{}}
}

func (s *system) say(format string, args ...any) {
	fmt.Fprintf(s.console, "tinyvm: "+format+"\r\n", args...)
}

// run does the boot in the order below and then serves for ever.
func (s *system) run() {
	if console, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
		s.console = console
	}
	s.changeCloud(func(*cloudStatus) {})
	loaded := s.loadModules()
	go s.watchEvents()
	s.onlineAll()
	s.mountData()
	go s.watchPowerButton()
	s.setHostname("tiny")
	s.up("lo")
	seed := s.findSeed()
	s.applyNetwork(seed)
	s.applyIdentity(seed)
	go s.serveAgent() // whoever hears of the guest finds its name and its network
	go s.serveHTTP()
	go s.serveTFTP()
	s.say("ready in %s: %d modules, %s", uptime(), loaded, s.describe(seed))
	go s.applyUserData(seed)
	go s.serveShell("/dev/tty1")
	s.serveShell("/dev/ttyS0")
}

// loadModules loads the kernel modules of the initramfs, which are in an order
// in which they can be.
func (s *system) loadModules() int {
	list, err := os.ReadFile("/lib/modules/list")
	if err != nil {
		s.say("reading the list of modules: %v", err)
		return 0
	}
	loaded := 0
	for name := range strings.FieldsSeq(string(list)) {
		file, err := os.Open(filepath.Join("/lib/modules", name))
		if err == nil {
			err = unix.FinitModule(int(file.Fd()), "", 0)
			_ = file.Close()
		}
		// ENODEV: the hardware is not there.
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			s.say("loading %s: %v", name, err)
			continue
		}
		loaded++
	}
	return loaded
}

// mountData mounts the data partition; without one the data are in memory.
func (s *system) mountData() {
	device, ok := s.waitForBlock("ext4", "tinydata", 1500)
	if err := os.MkdirAll("/data", 0o755); err != nil {
		s.say("creating /data: %v", err)
	}
	if ok {
		if err := unix.Mount(device, "/data", "ext4", 0, ""); err != nil {
			s.say("mounting %s: %v", device, err)
			ok = false
		}
	}
	if !ok {
		s.say("no data partition: /data is in memory")
		_ = unix.Mount("tmpfs", "/data", "tmpfs", 0, "mode=0755")
	}
	_ = os.MkdirAll("/data/files", 0o755)
	var boots int
	if text, err := os.ReadFile("/data/boots"); err == nil {
		_, _ = fmt.Sscan(string(text), &boots)
	}
	s.mu.Lock()
	s.boots = boots + 1
	s.mu.Unlock()
	if err := writeFileSync("/data/boots", fmt.Appendf(nil, "%d\n", boots+1)); err != nil {
		s.say("counting boots: %v", err)
	}
}

// waitForBlock looks for a block device with such a file system, fifty times a second. Who stood still has not looked.
func (s *system) waitForBlock(kind, label string, looks int) (string, bool) {
	for range looks {
		if device, ok := findBlock(kind, label); ok {
			return device, true
		}
		<-time.After(20 * time.Millisecond)
	}
	return "", false
}

// serveShell keeps a shell on a terminal, as after an automatic login.
func (s *system) serveShell(terminal string) {
	for {
		started := time.Now()
		if err := runShell(terminal); err != nil && terminal == "/dev/tty1" {
			return // there need not be a screen
		} else if err != nil {
			s.say("shell on %s: %v", terminal, err)
		}
		if time.Since(started) < time.Second {
			<-time.After(time.Second)
		}
	}
}

func runShell(terminal string) error {
	tty, err := os.OpenFile(terminal, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = tty.Close() }()
	name, _ := os.Hostname()
	fmt.Fprintf(tty, "\r\nTiny VM for tests, %s\r\n\r\n%s login: root (automatic login)\r\n\r\n", filepath.Base(terminal), name)
	cmd := exec.Command("/bin/sh", "-l")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.Dir = "/root"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Run()
	if ended := (*exec.ExitError)(nil); errors.As(err, &ended) {
		return nil
	}
	return err
}

// uptime is the time since the kernel started.
func uptime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0
	}
	return time.Duration(now.Nano()).Round(10 * time.Millisecond)
}

// writeFileSync replaces a file in one step and returns when it is on the disk.
func writeFileSync(name string, data []byte) error {
	temporary := name + ".new"
	file, err := os.OpenFile(temporary, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(temporary, name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return dir.Sync()
}
