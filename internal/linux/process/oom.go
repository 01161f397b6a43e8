package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// SetOOMScore sets a process's oom_score_adj, -1000 (never killed when memory runs out) to 1000 (killed
// first). A process that has ended is no error. Going below what the process had needs CAP_SYS_RESOURCE
// (fs.ErrPermission).
func SetOOMScore(pid, score int) error {
	name := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	err := os.WriteFile(name, []byte(strconv.Itoa(score)), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("setting oom score of process %d: %w", pid, err)
	}
	return nil
}
