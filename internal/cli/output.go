package cli

import (
	"fmt"
	"io"
	"time"

	"atoll.dev/atoll/internal/cli/text"
)

// structured prints v as JSON or YAML.
func (a *app) structured(format string, v any) error { return text.Structured(a.out, format, v) }

// table prints rows in aligned columns; the first is the heading.
func (a *app) table(rows [][]string) { text.Table(a.out, rows) }

// age prints how long ago something was, in one or two units.
func age(since time.Time) string { return text.Age(since) }

// mib prints a number of bytes.
func mib(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%d MiB", (n+1<<19)>>20)
}

// size prints a number of bytes with the unit that suits it.
func size(n int64) string { return text.Size(n) }

// isTerminal tells whether w is a terminal.
func isTerminal(w io.Writer) bool { return text.IsTerminal(w) }
