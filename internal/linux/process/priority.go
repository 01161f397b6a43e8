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
	if err := unix.Setpriority(unix.PRIO_PGRP, leader, nice); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("setting the priority of process %d: %w", leader, err)
	}
	return SetSessionNice(leader, nice)
}

// SetSessionNice sets the priority of a whole session against others, by one of its processes, where the kernel
// groups processes by session; elsewhere it does nothing. The processes' own priorities stay, so that what they start
// in sessions and control groups of its own does not inherit any of it. A process that has ended is no error.
func SetSessionNice(pid, nice int) error {
	name := fmt.Sprintf("/proc/%d/autogroup", pid)
	err := os.WriteFile(name, []byte(strconv.Itoa(nice)), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("setting the priority of the session of process %d: %w", pid, err)
	}
	return nil
}
