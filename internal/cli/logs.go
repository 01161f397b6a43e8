package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
)

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:   "logs <service>",
		Short: "Print the log of a service of this host",
		Long:  "Prints the end of a service's log: up, containerd, pool, server, agent or keeper.",
		Example: `  atoll logs server
  atoll logs agent -f -n 20`,
		Args: command.ExactArgs("service"),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			if filepath.Base(args[0]) != args[0] {
				return command.UsageError{Err: fmt.Errorf("%q is not the name of a service", args[0])}
			}
			f, err := os.Open(t.Log(args[0]))
			if errors.Is(err, os.ErrNotExist) {
				return command.UsageError{Err: fmt.Errorf("no log of %q; there are: %s", args[0], logNames(t.Logs()))}
			}
			if err != nil {
				return fmt.Errorf("opening the log: %w", err)
			}
			defer f.Close()
			return printLog(cmd.Context(), a.out, f, lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing what is added")
	cmd.Flags().IntVarP(&lines, "lines", "n", 100, "lines to begin with")
	return cmd
}

func logNames(dir string) string {
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(files) == 0 {
		return "none yet"
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".log")
	}
	slices.Sort(files)
	return strings.Join(files, " ")
}

// printLog prints the last lines of a file and, if told to, what is added to
// it, also after it was truncated by rotation.
func printLog(ctx context.Context, w io.Writer, f *os.File, lines int, follow bool) error {
	at, err := lastLines(f, lines)
	if err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	tick := time.NewTicker(300 * time.Millisecond)
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

// lastLines returns the offset at which the last n lines of a file begin.
func lastLines(f *os.File, n int) (int64, error) {
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
