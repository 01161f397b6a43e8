package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	switch {
	case filepath.Base(os.Args[0]) == "cloud-init":
		os.Exit(cloudInitCommand(os.Args[1:]))
	case filepath.Base(os.Args[0]) == "vmware-rpctool":
		os.Exit(rpcToolCommand(os.Args[1:]))
	case len(os.Args) > 1 && os.Args[1] == "serve":
		newSystem().run()
	case os.Getpid() == 1:
		reap()
	default:
		fmt.Fprintln(os.Stderr, "tinyvm: this is pid 1 of the tiny VM image; it does nothing elsewhere")
		os.Exit(1)
	}
}

// reap is pid 1: it starts the rest, again if that ends, and waits for everything.
func reap() {
	mountAll()
	go obeySignals()
	for {
		cmd := exec.Command("/proc/self/exe", "serve")
		cmd.Args[0] = "tinyvm"
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), "PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/root", "TERM=linux")
		if err := cmd.Start(); err != nil {
			fmt.Println("tinyvm:", err)
			powerOff(unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, 0, nil)
			if err == syscall.EINTR {
				continue
			}
			if pid == cmd.Process.Pid || err != nil {
				fmt.Println("tinyvm: ended with status", status.ExitStatus(), "and is started again")
				<-time.After(time.Second)
				break
			}
		}
	}
}

// obeySignals does what BusyBox's poweroff, reboot and halt ask of pid 1.
func obeySignals() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT)
	for got := range signals {
		switch got {
		case syscall.SIGUSR1:
			powerOff(unix.LINUX_REBOOT_CMD_HALT)
		case syscall.SIGUSR2:
			powerOff(unix.LINUX_REBOOT_CMD_POWER_OFF)
		default:
			powerOff(unix.LINUX_REBOOT_CMD_RESTART)
		}
	}
}

// mountAll mounts what every program takes for granted.
func mountAll() {
	for _, m := range []struct{ source, target, kind, options string }{
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", "mode=0755"},
		{"devpts", "/dev/pts", "devpts", "gid=5,mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", "mode=1777"},
		{"tmpfs", "/run", "tmpfs", "mode=0755"},
		{"tmpfs", "/tmp", "tmpfs", "mode=1777"},
		{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", ""},
	} {
		// There are no EFI variables on a machine with a BIOS.
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			continue
		}
		if err := unix.Mount(m.source, m.target, m.kind, 0, m.options); err != nil && m.kind != "efivarfs" {
			fmt.Println("tinyvm: mounting", m.target, err)
		}
	}
}

// powerOff ends the machine. File systems are written first; a frozen one is
// left alone, it is consistent.
func powerOff(command int) {
	if unix.Access("/run/frozen", unix.F_OK) != nil {
		unix.Sync()
		_ = unix.Mount("", "/data", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	if err := unix.Reboot(command); err != nil {
		fmt.Println("tinyvm: reboot:", err)
	}
}
