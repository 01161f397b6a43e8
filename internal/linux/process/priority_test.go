package process

import (
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSetNice(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	err := SetNice(pid, 19) // anybody may lower it
	got, readErr := unix.Getpriority(unix.PRIO_PROCESS, pid)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil || readErr != nil || got != 20-19 { // the system call answers 20 less the value
		t.Errorf("priority %d, %v, %v", got, err, readErr)
	}
	if err := SetNice(pid, 19); err != nil {
		t.Errorf("a process that has ended: %v", err)
	}
}
