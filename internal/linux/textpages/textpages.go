// Package textpages keeps a long-running process from counting program pages
// that only its start used.
//
// The program file of Atoll is large and every role starts by running through
// most of it. The kernel maps what was touched and counts it as resident for each
// process, although afterwards a small part is in use. Run gives the mappings
// back from time to time; pages that are used again are mapped again from the
// page cache, which costs a minor fault each. It does not touch data, and frees
// no memory that is not a clean copy of the file.
//
// Called by the roles. What can go wrong: nothing that matters; a refusal by the
// kernel leaves things as they were.
package textpages

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Times of Run: when the start is over, and how often after that.
const (
	first = time.Minute
	every = 15 * time.Minute
)

// Run releases unused program pages, and the memory the garbage collector holds
// in reserve, until ctx ends. It always returns nil.
func Run(ctx context.Context) error {
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		debug.FreeOSMemory()
		// Failing is harmless and will be the same the next time.
		_ = Release()
		timer.Reset(every)
	}
}

// Release unmaps the pages of the program file that cannot be written to.
func Release() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("finding the program: %w", err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("reading memory map: %w", err)
	}
	for _, r := range readOnly(maps, program) {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, r.start, r.end-r.start, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("releasing program pages: %w", errno)
		}
	}
	return nil
}

// span is a range of addresses.
type span struct {
	start, end uintptr
}

// readOnly lists the mappings of the file that cannot be written to.
func readOnly(maps []byte, file string) []span {
	var out []span
	lines := bufio.NewScanner(bytes.NewReader(maps))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || strings.Join(fields[5:], " ") != file || strings.Contains(fields[1], "w") {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && start < end {
			out = append(out, span{uintptr(start), uintptr(end)})
		}
	}
	return out
}
