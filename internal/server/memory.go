package server

import (
	"os"
	"runtime/debug"
)

// tuneMemory trades a little processor time for memory: the control plane of one
// host is mostly idle, and its heap is mostly caches. GOGC in the environment
// wins.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(40)
	}
}
