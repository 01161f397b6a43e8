// Package tail reads the ends of log files.
//
// It writes no log and knows nothing of what is in one but that it has lines. internal/cli and the packages of commands
// below it use it. What can go wrong: the file cannot be read; one that was cut off meanwhile, as by rotation, is read
// from its beginning.
package tail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Every is how often somebody who follows a log looks whether something was added.
const Every = 300 * time.Millisecond

// Print prints the last lines of a file and, if told to, what is added to it.
func Print(ctx context.Context, w io.Writer, f *os.File, lines int, follow bool) error {
	at, err := Offset(f, lines)
	if err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	tick := time.NewTicker(Every)
	defer tick.Stop()
	for {
		info, err := f.Stat()
		if err != nil {
			return fmt.Errorf("reading the log: %w", err)
		}
		if info.Size() < at {
			at = 0
		}
		n, err := io.Copy(w, io.NewSectionReader(f, at, info.Size()-at))
		if err != nil {
			return fmt.Errorf("printing the log: %w", err)
		}
		at += n
		if !follow {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Offset is where the last n lines of a file begin.
func Offset(f *os.File, n int) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if n <= 0 || info.Size() == 0 {
		return info.Size(), nil
	}
	const block = 64 << 10
	buf := make([]byte, block)
	seen := 0
	if _, err := f.ReadAt(buf[:1], info.Size()-1); err != nil {
		return 0, err
	}
	if buf[0] == '\n' {
		seen = -1 // it ends the last line and begins none
	}
	for end := info.Size(); end > 0; {
		start := max(end-block, 0)
		part := buf[:end-start]
		if _, err := f.ReadAt(part, start); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		for i := bytes.LastIndexByte(part, '\n'); i >= 0; i = bytes.LastIndexByte(part[:i], '\n') {
			if seen++; seen >= n {
				return start + int64(i) + 1, nil
			}
		}
		end = start
	}
	return 0, nil
}
