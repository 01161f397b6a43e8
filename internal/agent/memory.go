package agent

import (
	"os"
	"runtime/debug"
)

// tuneMemory trades a little processor time for memory: an agent is mostly idle.
// GOGC in the environment wins.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(40)
	}
}
