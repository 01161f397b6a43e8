package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// SetNice sets the priority, -20 (first) to 19 (last), of a process that leads a session of its own and of
// everything in its process group. Where the kernel groups processes by session (sched_autogroup_enabled)
// the priority of a process only counts within its group, so that of the group is set as well. A process
// that has ended is no error.
func SetNice(leader, nice int) error {
	doing := fmt.Sprintf("setting the priority of process %d", leader)
	if err := unix.Setpriority(unix.PRIO_PGRP, leader, nice); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	name := fmt.Sprintf("/proc/%d/autogroup", leader)
	err := os.WriteFile(name, []byte(strconv.Itoa(nice)), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}
