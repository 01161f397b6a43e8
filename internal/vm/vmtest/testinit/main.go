// Testinit is the init of the micro-VMs that the tests of package vm run. It keeps the barrier
// handshake on the control port and then answers one line per line it reads:
//
//	echo TEXT              the same
//	slot SERIAL OFF N      hex of N bytes at OFF of the virtio disk with that serial
//	lun N OFF LEN          the same of the SCSI disk 0:0:0:N
//	write N OFF HEX        writes to that SCSI disk and flushes it
//	scratch OFF HEX        writes to the scratch disk and flushes it
//	erofs SERIAL PATH      mounts the disk, answers the content of PATH, unmounts it
//	kept TEXT              replaces the file that was written before the barrier, answers what was in it
//	ext4 SERIAL            mounts the disk writable with project quota, writes a file, unmounts it
//	random                 hex of 16 random bytes
//	memory                 bytes of memory in use by the kernel, after onlining what was added
//	cpus                   number of CPUs online, after onlining what was added
//	cmdline, dmesg, clocksource
//	poweroff, panic
//
// An error is answered as "error: TEXT". It is no part of the product.
package main

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/initramfs/modules"
)

func main() {
	fmt.Fprintln(os.Stderr, "testinit:", run())
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// run serves the port until it fails.
func run() error {
	for _, m := range [][3]string{{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"tmpfs", "/mnt", "tmpfs"}} {
		_ = os.Mkdir(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	port, err := openPort("atoll.ctl")
	if err != nil {
		return err
	}
	if os.Getenv("KEEP") != "" { // from the kernel's command line
		if err := keep(); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(port, "ATOLLRDY"); err != nil {
		return err
	}
	in := bufio.NewReader(port)
	line, err := in.ReadString('\n')
	if err != nil || line != "ATOLLGO\n" {
		return fmt.Errorf("host said %q, %w", line, err)
	}
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		answer, err := handle(strings.Fields(line))
		if err != nil {
			answer = "error: " + strings.ReplaceAll(err.Error(), "\n", " ")
		}
		if _, err := io.WriteString(port, answer+"\n"); err != nil {
			return err
		}
	}
}

// keptFile is on the scratch disk, which stays mounted at the barrier.
const keptFile = "/mnt/kept/file"

// keep mounts the scratch disk and leaves there what the first image slot begins with, unwritten as yet.
func keep() error {
	begin, err := func() (string, error) {
		dev, err := bySerial("img0")
		if err != nil {
			return "", err
		}
		return read(dev, "0", "4")
	}()
	if err != nil {
		return err
	}
	dev, err := bySerial("scratch")
	if err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Dir(keptFile), 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dev, filepath.Dir(keptFile), "ext4", 0, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", dev, err)
	}
	return os.WriteFile(keptFile, []byte(begin), 0o600)
}

// loadModules loads what package modules put in place, if anything, in its order.
func loadModules() error {
	names, _ := filepath.Glob(modules.Dir + "/*.ko") // sorted
	for _, n := range names {
		f, err := os.Open(n)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("loading %s: %w", n, err)
		}
	}
	return nil
}

// openPort finds a virtio-serial port by name.
func openPort(name string) (*os.File, error) {
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, p := range names {
			if data, _ := os.ReadFile(p); strings.TrimSpace(string(data)) == name {
				fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(p)), unix.O_RDWR|unix.O_CLOEXEC, 0)
				if err != nil {
					return nil, err
				}
				return os.NewFile(uintptr(fd), name), nil
			}
		}
		if time.Now().After(end) {
			return nil, errors.New("no port " + name)
		}
	}
}

func handle(w []string) (string, error) {
	if len(w) == 0 {
		return "", nil
	}
	arg := func(i int) string {
		if i < len(w) {
			return w[i]
		}
		return ""
	}
	switch w[0] {
	case "echo":
		return strings.Join(w[1:], " "), nil
	case "slot":
		dev, err := bySerial(arg(1))
		if err != nil {
			return "", err
		}
		return read(dev, arg(2), arg(3))
	case "lun":
		dev, err := byLUN(arg(1))
		if err != nil {
			return "", err
		}
		return read(dev, arg(2), arg(3))
	case "write":
		dev, err := byLUN(arg(1))
		if err != nil {
			return "", err
		}
		return "ok", write(dev, arg(2), arg(3))
	case "scratch":
		dev, err := bySerial("scratch")
		if err != nil {
			return "", err
		}
		return "ok", write(dev, arg(1), arg(2))
	case "erofs":
		return erofs(arg(1), arg(2))
	case "kept":
		old, err := os.ReadFile(keptFile)
		if err != nil {
			return "", err
		}
		return string(old), os.WriteFile(keptFile, []byte(arg(1)), 0o600)
	case "ext4":
		return "ok", ext4(arg(1))
	case "random":
		var b [16]byte
		_, err := unix.Getrandom(b[:], 0)
		return hex.EncodeToString(b[:]), err
	case "memory":
		online("/sys/devices/system/memory/memory*/state", "online")
		var si unix.Sysinfo_t
		err := unix.Sysinfo(&si)
		return strconv.FormatUint(si.Totalram*uint64(si.Unit), 10), err
	case "cpus":
		online("/sys/devices/system/cpu/cpu*/online", "1")
		data, err := os.ReadFile("/proc/cpuinfo")
		return strconv.Itoa(strings.Count(string(data), "processor\t")), err
	case "cmdline":
		data, err := os.ReadFile("/proc/cmdline")
		return strings.TrimSpace(string(data)), err
	case "clocksource":
		data, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
		return strings.TrimSpace(string(data)), err
	case "dmesg":
		buf := make([]byte, 1<<18)
		n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
		return strconv.Quote(string(buf[:max(n, 0)])), err
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return "", errors.New("unknown command " + w[0])
}

// online brings hot-added parts into use; parts that are in use already refuse, which is fine.
func online(pattern, value string) {
	for range 25 {
		names, _ := filepath.Glob(pattern)
		for _, n := range names {
			_ = os.WriteFile(n, []byte(value), 0)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func bySerial(serial string) (string, error) {
	names, _ := filepath.Glob("/sys/block/vd*/serial")
	for _, n := range names {
		if data, _ := os.ReadFile(n); strings.TrimSpace(string(data)) == serial {
			return "/dev/" + filepath.Base(filepath.Dir(n)), nil
		}
	}
	return "", errors.New("no disk " + serial)
}

// appears bounds how long a hot-added disk takes to appear: a moment, or seconds on a busy host. The one who asked
// waits a little longer.
const appears = 4 * time.Minute

func byLUN(lun string) (string, error) {
	for end := time.Now().Add(appears); ; time.Sleep(2 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/scsi_device/*:0:0:" + lun + "/device/block/*")
		if len(names) == 1 {
			return "/dev/" + filepath.Base(names[0]), nil
		}
		if time.Now().After(end) {
			return "", errors.New("no disk at lun " + lun)
		}
	}
}

// open opens a disk. A hot-added one has its name a moment before it can be opened.
func open(dev string, flag int) (*os.File, error) {
	for end := time.Now().Add(appears); ; time.Sleep(2 * time.Millisecond) {
		f, err := os.OpenFile(dev, flag, 0)
		if !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENOENT) || time.Now().After(end) {
			return f, err
		}
	}
}

func read(dev, off, n string) (string, error) {
	o, err1 := strconv.ParseInt(off, 10, 64)
	size, err2 := strconv.Atoi(n)
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	f, err := open(dev, os.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf := make([]byte, size)
	_, err = f.ReadAt(buf, o)
	return hex.EncodeToString(buf), err
}

func write(dev, off, data string) error {
	o, err1 := strconv.ParseInt(off, 10, 64)
	buf, err2 := hex.DecodeString(data)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	f, err := open(dev, os.O_RDWR)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(buf, o)
	return errors.Join(err, f.Sync(), f.Close())
}

func erofs(serial, name string) (string, error) {
	dev, err := bySerial(serial)
	if err != nil {
		return "", err
	}
	_ = os.Mkdir("/mnt/e", 0o755)
	if err := unix.Mount(dev, "/mnt/e", "erofs", unix.MS_RDONLY, ""); err != nil {
		return "", fmt.Errorf("mounting: %w", err)
	}
	data, err := os.ReadFile("/mnt/e/" + name)
	return strings.TrimSpace(string(data)), errors.Join(err, unix.Unmount("/mnt/e", 0))
}

func ext4(serial string) error {
	dev, err := bySerial(serial)
	if err != nil {
		return err
	}
	_ = os.Mkdir("/mnt/s", 0o755)
	if err := unix.Mount(dev, "/mnt/s", "ext4", 0, "prjquota,discard"); err != nil {
		return fmt.Errorf("mounting: %w", err)
	}
	err = os.WriteFile("/mnt/s/file", make([]byte, 1<<20), 0o600)
	return errors.Join(err, unix.Unmount("/mnt/s", 0))
}
