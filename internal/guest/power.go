package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
)

const (
	sysMemory = "/sys/devices/system/memory"
	sysCPU    = "/sys/devices/system/cpu"
)

// OnlineResources implements the protocol.
func (s *server) OnlineResources(ctx context.Context, _ *guestv1.Empty) (*guestv1.OnlineResourcesResponse, error) {
	if err := onlineMemory(sysMemory); err != nil {
		return nil, status(err)
	}
	if err := onlineCPU(ctx, sysCPU); err != nil {
		return nil, status(err)
	}
	if err := limitPod(s.m.tree.Pod()); err != nil {
		return nil, status(err)
	}
	memory, err := totalMemory()
	if err != nil {
		return nil, status(err)
	}
	return &guestv1.OnlineResourcesResponse{MemoryBytes: memory, Cpus: uint32(onlineCPUs())}, nil
}

// onlineMemory brings every offline memory block into use.
func onlineMemory(dir string) error {
	blocks, err := filepath.Glob(filepath.Join(dir, "memory*", "state"))
	if err != nil {
		return fmt.Errorf("listing memory blocks: %w", err)
	}
	for _, b := range blocks {
		state, err := os.ReadFile(b)
		if err != nil || strings.TrimSpace(string(state)) != "offline" {
			continue
		}
		if err := os.WriteFile(b, []byte("online_movable"), 0o644); err != nil {
			if err = os.WriteFile(b, []byte("online"), 0o644); err != nil {
				return fmt.Errorf("bringing memory online: %w", err)
			}
		}
	}
	return nil
}

// onlineCPU brings every present CPU into use.
func onlineCPU(ctx context.Context, dir string) error {
	cpus, err := filepath.Glob(filepath.Join(dir, "cpu[0-9]*", "online"))
	if err != nil {
		return fmt.Errorf("listing CPUs: %w", err)
	}
	for _, c := range cpus {
		var werr error
		// A CPU that was just plugged may answer EBUSY for a moment.
		if !waitFor(ctx, time.Second, func() bool {
			state, err := os.ReadFile(c)
			if err == nil && strings.TrimSpace(string(state)) == "1" {
				return true
			}
			werr = os.WriteFile(c, []byte("1"), 0o644)
			return werr == nil
		}) {
			return fmt.Errorf("bringing CPU online: %w", errors.Join(werr, ctx.Err()))
		}
	}
	return nil
}

// onlineCPUs counts the CPUs in use, from a list such as 0-2,4.
func onlineCPUs() int {
	data, err := os.ReadFile(filepath.Join(sysCPU, "online"))
	if err != nil {
		return 1
	}
	return countList(strings.TrimSpace(string(data)))
}

func countList(list string) int {
	n := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, ranged := strings.Cut(part, "-")
		a, err := strconv.Atoi(first)
		if err != nil {
			continue
		}
		b := a
		if ranged {
			if b, err = strconv.Atoi(last); err != nil || b < a {
				continue
			}
		}
		n += b - a + 1
	}
	return n
}

// Shutdown implements the protocol. The answer goes out before the power does.
func (s *server) Shutdown(context.Context, *guestv1.Empty) (*guestv1.Empty, error) {
	go func() {
		time.Sleep(10 * time.Millisecond) // lets the answer leave; nothing depends on it
		_ = s.m.tree.Pod().Kill()
		unix.Sync()
		// Containers are dying; a lazy unmount suffices, sync has written what there is.
		_ = unix.Unmount(scratchDir, unix.MNT_DETACH)
		unix.Sync()
		if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
			s.stop(fmt.Errorf("powering off: %w", err))
		}
	}()
	return &guestv1.Empty{}, nil
}
