package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (a *agent) hostName(json.RawMessage) (any, error) {
	return map[string]string{"host-name": hostname()}, nil
}

func (a *agent) osInfo(json.RawMessage) (any, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	return map[string]string{
		"id": "tinyvm", "name": "Tiny VM", "pretty-name": "Tiny VM for tests", "version": "1", "version-id": "1",
		"kernel-release": unix.ByteSliceToString(name.Release[:]),
		"kernel-version": unix.ByteSliceToString(name.Version[:]),
		"machine":        unix.ByteSliceToString(name.Machine[:]),
	}, nil
}

func (a *agent) getTime(json.RawMessage) (any, error) { return time.Now().UnixNano(), nil }

func (a *agent) setTime(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Time *int64 `json:"time"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	if args.Time != nil {
		now := unix.NsecToTimeval(*args.Time)
		if err := unix.Settimeofday(&now); err != nil {
			return nil, fmt.Errorf("setting the clock: %w", err)
		}
		return struct{}{}, nil
	}
	return struct{}{}, setClockFromHardware()
}

// setClockFromHardware sets the clock from the RTC, as after a pause.
func setClockFromHardware() error {
	fd, err := unix.Open("/dev/rtc0", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the hardware clock: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	at, err := unix.IoctlGetRTCTime(fd)
	if err != nil {
		return fmt.Errorf("reading the hardware clock: %w", err)
	}
	when := time.Date(int(at.Year)+1900, time.Month(at.Mon+1), int(at.Mday), int(at.Hour), int(at.Min), int(at.Sec), 0, time.UTC)
	now := unix.NsecToTimeval(when.UnixNano())
	return unix.Settimeofday(&now)
}

func (a *agent) timezone(json.RawMessage) (any, error) {
	return map[string]any{"zone": "UTC", "offset": 0}, nil
}

func (a *agent) users(json.RawMessage) (any, error) {
	return []map[string]any{{"user": "root", "login-time": float64(time.Now().Add(-uptime()).Unix())}}, nil
}

func (a *agent) interfaces(json.RawMessage) (any, error) {
	list, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	out := []map[string]any{}
	for _, i := range list {
		entry := map[string]any{"name": i.Name}
		if len(i.HardwareAddr) > 0 {
			entry["hardware-address"] = i.HardwareAddr.String()
		} else if i.Flags&net.FlagLoopback != 0 {
			entry["hardware-address"] = "00:00:00:00:00:00"
		}
		found, _ := i.Addrs()
		var addresses []map[string]any
		for _, address := range found {
			network, ok := address.(*net.IPNet)
			if !ok {
				continue
			}
			kind := "ipv6"
			if network.IP.To4() != nil {
				kind = "ipv4"
			}
			prefix, _ := network.Mask.Size()
			addresses = append(addresses, map[string]any{"ip-address": network.IP.String(), "ip-address-type": kind, "prefix": prefix})
		}
		if addresses != nil {
			entry["ip-addresses"] = addresses
		}
		out = append(out, entry)
	}
	return out, nil
}

func (a *agent) fileSystems(json.RawMessage) (any, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs("/data", &stat); err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return nil, err
	}
	out := []map[string]any{}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) > 2 && fields[1] == "/data" && strings.HasPrefix(fields[0], "/dev/") {
			total := stat.Blocks * uint64(stat.Bsize)
			out = append(out, map[string]any{
				"name": filepath.Base(fields[0]), "mountpoint": "/data", "type": fields[2], "disk": []any{},
				"total-bytes": total, "used-bytes": total - stat.Bfree*uint64(stat.Bsize),
			})
		}
	}
	return out, nil
}

func (a *agent) trim(json.RawMessage) (any, error) {
	fd, err := unix.Open("/data", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	spread := struct{ start, length, minimum uint64 }{length: 1<<64 - 1}
	path := map[string]any{"path": "/data"}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fiTrim, uintptr(unsafe.Pointer(&spread))); errno != 0 {
		path["error"] = errno.Error()
	} else {
		path["trimmed"], path["minimum"] = spread.length, spread.minimum
	}
	return map[string]any{"paths": []any{path}}, nil
}

// shutdown does not answer: the host sees it happen.
func (a *agent) shutdown(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Mode string `json:"mode"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	command := unix.LINUX_REBOOT_CMD_POWER_OFF
	switch args.Mode {
	case "", "powerdown":
	case "reboot":
		command = unix.LINUX_REBOOT_CMD_RESTART
	case "halt":
		command = unix.LINUX_REBOOT_CMD_HALT
	default:
		return nil, agentError{"GenericError", "mode is invalid (valid values are: halt|powerdown|reboot"}
	}
	if unix.Access("/run/ignore-power-button", unix.F_OK) == nil {
		a.system.say("asked to shut down, which is ignored")
		return nil, errNoAnswer
	}
	a.system.say("asked to shut down")
	go powerOff(command)
	return nil, errNoAnswer
}

// suspend sleeps; it returns after the guest was woken.
func (a *agent) suspend(json.RawMessage) (any, error) {
	if err := os.WriteFile("/sys/power/state", []byte("mem"), 0); err != nil {
		return nil, fmt.Errorf("suspending: %w", err)
	}
	return nil, errNoAnswer
}

// unit is a processor or a block of memory that can be switched on and off.
type unit struct {
	Number     int64 `json:"number"`
	Online     bool  `json:"online"`
	CanOffline bool  `json:"can-offline"`
}

// units lists those of one kind, by directory name without the number.
func units(prefix string) []unit {
	out := []unit{}
	dirs, _ := filepath.Glob(prefix + "[0-9]*")
	for _, dir := range dirs {
		number, err := strconv.ParseInt(strings.TrimPrefix(dir, prefix), 10, 64)
		if err != nil {
			continue
		}
		state, err := os.ReadFile(filepath.Join(dir, "online"))
		out = append(out, unit{Number: number, Online: err != nil || strings.HasPrefix(string(state), "1"), CanOffline: err == nil})
	}
	return out
}

func setUnit(prefix string, number int64, online bool) error {
	value := "0"
	if online {
		value = "1"
	}
	return os.WriteFile(fmt.Sprintf("%s%d/online", prefix, number), []byte(value), 0)
}

const (
	processorPrefix = "/sys/devices/system/cpu/cpu"
	memoryPrefix    = "/sys/devices/system/memory/memory"
)

func (a *agent) processors(json.RawMessage) (any, error) {
	out := []map[string]any{}
	for _, u := range units(processorPrefix) {
		out = append(out, map[string]any{"logical-id": u.Number, "online": u.Online, "can-offline": u.CanOffline})
	}
	return out, nil
}

func (a *agent) setProcessors(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		CPUs []struct {
			ID     int64 `json:"logical-id"`
			Online bool  `json:"online"`
		} `json:"vcpus"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	for i, cpu := range args.CPUs {
		if err := setUnit(processorPrefix, cpu.ID, cpu.Online); err != nil {
			if i == 0 {
				return nil, err
			}
			return i, nil
		}
	}
	return len(args.CPUs), nil
}

func (a *agent) memoryBlocks(json.RawMessage) (any, error) {
	out := []map[string]any{}
	for _, u := range units(memoryPrefix) {
		out = append(out, map[string]any{"phys-index": u.Number, "online": u.Online, "can-offline": u.CanOffline})
	}
	return out, nil
}

func (a *agent) setMemoryBlocks(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Blocks []struct {
			Index  int64 `json:"phys-index"`
			Online bool  `json:"online"`
		} `json:"mem-blks"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	out := []map[string]any{}
	for _, block := range args.Blocks {
		result := map[string]any{"phys-index": block.Index, "response": "success"}
		if err := setUnit(memoryPrefix, block.Index, block.Online); err != nil {
			result["response"] = "operation-failed"
		}
		out = append(out, result)
	}
	return out, nil
}

func (a *agent) memoryBlockInfo(json.RawMessage) (any, error) {
	text, err := os.ReadFile("/sys/devices/system/memory/block_size_bytes")
	if err != nil {
		return nil, err
	}
	size, err := strconv.ParseUint(strings.TrimSpace(string(text)), 16, 64)
	if err != nil {
		return nil, err
	}
	return map[string]any{"size": size}, nil
}
