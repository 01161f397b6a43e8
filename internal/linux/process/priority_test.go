package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSetSessionNice: the priority of a session changes, that of its processes does not.
func TestSetSessionNice(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err := SetSessionNice(pid, 7); err != nil {
		t.Fatal(err)
	}
	if got, err := unix.Getpriority(unix.PRIO_PROCESS, pid); err != nil || got != 20 {
		t.Errorf("the process's own: %d, %v", got, err)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/autogroup", pid))
	if err == nil && !strings.HasSuffix(string(text), "nice 7\n") || err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the session's: %q, %v", text, err)
	}
	if err := SetSessionNice(1<<30, 7); err != nil {
		t.Errorf("a process that is not there: %v", err)
	}
}

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
