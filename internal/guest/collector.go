package guest

import (
	"math"
	"runtime"
	"runtime/debug"
)

const (
	// gcPercent: few objects live long, and a page a clone does not write is a page it shares.
	gcPercent = 50
	// untilCollection is how much a clone may allocate before its first garbage collection.
	untilCollection = 8 << 20
)

// postponeCollection collects what the boot and the rehearsals left on the heap, so that no clone has to,
// and puts the next collection off: most pods start, and many live, without one. Under emulation the code of
// the collector alone takes megabytes once it has run.
func postponeCollection() {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	debug.SetGCPercent(-1) // this also keeps the runtime from collecting every two minutes
	debug.SetMemoryLimit(int64(m.Sys-m.HeapReleased) + untilCollection)
	sentinel := new([16]byte)
	runtime.AddCleanup(sentinel, func(struct{}) { // the first collection finds it
		debug.SetMemoryLimit(math.MaxInt64)
		debug.SetGCPercent(gcPercent)
	}, struct{}{})
}
