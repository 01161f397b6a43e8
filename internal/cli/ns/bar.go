package ns

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/text"
)

// Widths of the terminal: what is taken for one that is not known, and the least and most of a bar.
const (
	plainWidth = 100
	leastBar   = 10
	mostBar    = 40
)

// terminal is the width of the terminal.
func (c *commands) terminal() int {
	if n, err := strconv.Atoi(c.Getenv("COLUMNS")); err == nil && n > 0 {
		return n
	}
	f, ok := c.Out.(*os.File)
	if !ok {
		return plainWidth
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return plainWidth
	}
	return int(size.Col)
}

// unicode tells whether the locale has more than ASCII.
func (c *commands) unicode() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := c.Getenv(name); v != "" {
			v = strings.ToUpper(v)
			return strings.Contains(v, "UTF-8") || strings.Contains(v, "UTF8")
		}
	}
	return false
}

// barWidth is what is left for bars beside n columns of text.
func (c *commands) barWidth(beside int) int {
	return min(max(c.width()-beside, leastBar), mostBar)
}

// bar draws used of limit. What is over the limit fills it, and has a mark at its end.
func (c *commands) bar(used, limit *resource.Quantity, width int) string {
	full, empty, over := "#", "-", "!"
	parts := []string{""}
	if c.unicode() {
		full, empty, over = "█", "░", "▶"
		parts = []string{"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"}
	}
	share := fraction(used, limit)
	if share > 1 {
		return strings.Repeat(full, width-1) + over
	}
	steps := int(share * float64(width*len(parts)))
	if steps == 0 && share > 0 && len(parts) > 1 {
		steps = 1
	}
	out := strings.Repeat(full, steps/len(parts)) + parts[steps%len(parts)]
	return out + strings.Repeat(empty, width-len([]rune(out)))
}

// fraction is used of limit; of a limit of nothing everything is over it.
func fraction(used, limit *resource.Quantity) float64 {
	u, l := used.AsApproximateFloat64(), limit.AsApproximateFloat64()
	switch {
	case l > 0:
		return u / l
	case u > 0:
		return 2
	}
	return 0
}

// percent is the fraction for people.
func percent(used, limit *resource.Quantity) string {
	if limit.IsZero() {
		return ""
	}
	return fmt.Sprintf("%.0f%%", 100*fraction(used, limit))
}

// bytesOf tells whether a resource is counted in bytes.
func bytesOf(name string) bool {
	switch name {
	case "memory", "storage", "registry":
		return true
	}
	return strings.HasPrefix(name, "storageclass/")
}

// human is a quantity of a resource for people.
func human(name string, q *resource.Quantity) string {
	if bytesOf(name) {
		return text.Size(q.Value())
	}
	if name == "cpu" {
		return strconv.FormatFloat(float64(q.MilliValue())/1000, 'f', -1, 64)
	}
	return q.String()
}

// usage finds a resource in the status.
func usage(b *atoll.SupervisorNamespace, name string) *atoll.NamespaceUsage {
	for i := range b.Status.Usage {
		if b.Status.Usage[i].Resource == name {
			return &b.Status.Usage[i]
		}
	}
	return nil
}
