package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// watchEvents brings hot-plugged processors, memory and network interfaces into
// use. Disks need nothing.
func (s *system) watchEvents() {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
	}
	if err != nil {
		s.say("listening for hot-plugged devices: %v", err)
		return
	}
	buffer := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if err == unix.EINTR || err == unix.ENOBUFS {
			s.onlineAll()
			continue
		}
		if err != nil {
			s.say("listening for hot-plugged devices: %v", err)
			return
		}
		s.event(buffer[:n])
	}
}

func (s *system) event(message []byte) {
	values := map[string]string{}
	for part := range bytes.SplitSeq(message, []byte{0}) {
		if key, value, ok := strings.Cut(string(part), "="); ok {
			values[key] = value
		}
	}
	if values["ACTION"] != "add" {
		return
	}
	switch values["SUBSYSTEM"] {
	case "cpu", "memory":
		s.online(filepath.Join("/sys", values["DEVPATH"]))
	case "net":
		go s.plugged(values["INTERFACE"])
	}
}

func (s *system) onlineAll() {
	for _, pattern := range []string{"/sys/devices/system/cpu/cpu[0-9]*", "/sys/devices/system/memory/memory[0-9]*"} {
		dirs, _ := filepath.Glob(pattern)
		for _, dir := range dirs {
			s.online(dir)
		}
	}
}

func (s *system) online(dir string) {
	file := filepath.Join(dir, "online")
	state, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(state, []byte("0")) {
		return // the first processor has no such file
	}
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		s.say("bringing %s online: %v", filepath.Base(dir), err)
	}
}

// watchPowerButton powers off when ACPI's button is pressed.
func (s *system) watchPowerButton() {
	for wait := 100 * time.Millisecond; ; wait = min(wait*5/4, 2*time.Second) { // its driver may take long on a busy host
		names, _ := filepath.Glob("/sys/class/input/event*/device/name")
		for _, name := range names {
			if text, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(text)) == "Power Button" {
				s.readPowerButton(filepath.Join("/dev/input", filepath.Base(filepath.Dir(filepath.Dir(name)))))
				return
			}
		}
		<-time.After(wait)
	}
}

func (s *system) readPowerButton(device string) {
	file, err := os.Open(device)
	if err != nil {
		s.say("opening the power button: %v", err)
		return
	}
	defer func() { _ = file.Close() }()
	const keyPower = 116
	event := make([]byte, 24) // struct input_event: time, type, code, value
	for {
		if _, err := file.Read(event); err != nil {
			s.say("reading the power button: %v", err)
			return
		}
		kind, code, value := binary.LittleEndian.Uint16(event[16:]), binary.LittleEndian.Uint16(event[18:]), binary.LittleEndian.Uint32(event[20:])
		if kind != 1 || code != keyPower || value != 1 {
			continue
		}
		if unix.Access("/run/ignore-power-button", unix.F_OK) == nil {
			s.say("the power button was pressed, which is ignored")
			continue
		}
		s.say("the power button was pressed: powering off")
		powerOff(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}
