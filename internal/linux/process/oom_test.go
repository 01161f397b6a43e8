package process

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestSetOOMScore(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	// Anybody may make a process of their own more likely to be killed.
	err := SetOOMScore(pid, 1000)
	b, readErr := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil || readErr != nil || strings.TrimSpace(string(b)) != "1000" {
		t.Errorf("score %q, %v, %v", b, err, readErr)
	}
	if err := SetOOMScore(pid, 1000); err != nil {
		t.Errorf("a process that has ended: %v", err)
	}
	if err := SetOOMScore(os.Getpid(), 2000); err == nil {
		t.Error("a score that is out of range was taken")
	}
}
