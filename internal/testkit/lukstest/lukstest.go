// Package lukstest has QEMU make encrypted images. It is for tests only.
package lukstest

import (
	"bytes"
	"fmt"
	"os/exec"
)

// Create runs qemu-img create with these arguments, as often as it takes: QEMU measures how fast a processor derives
// keys, and gives up where the kernel has counted no processor time meanwhile ("Unable to get accurate CPU usage"),
// as happens on a busy host that counts in ticks.
func Create(args ...string) error {
	args = append([]string{"create", "-q"}, args...)
	for try := 0; ; try++ {
		out, err := exec.Command("qemu-img", args...).CombinedOutput()
		switch {
		case err == nil:
			return nil
		case try == 20 || !bytes.Contains(out, []byte("accurate CPU usage")):
			return fmt.Errorf("qemu-img %q: %w: %s", args, err, out)
		}
	}
}
