package volumes

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// mount is one line of mountinfo, see proc(5).
type mount struct {
	device string // major:minor
	root   string // path in the file system that is mounted
	point  string // where
}

type mountTable []mount

// maxMountinfo bounds what is read; a host with 500 pods has some 10,000 mounts of 200 bytes.
const maxMountinfo = 64 << 20

func readMounts(name string) (mountTable, error) {
	if name == "" {
		name = "/proc/self/mountinfo"
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading mount table: %w", err)
	}
	defer f.Close()
	return parseMounts(io.LimitReader(f, maxMountinfo))
}

func parseMounts(r io.Reader) (mountTable, error) {
	var table mountTable
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 6 {
			return nil, fmt.Errorf("reading mount table: line %q is too short", lines.Text())
		}
		table = append(table, mount{device: f[2], root: unescape(f[3]), point: unescape(f[4])})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("reading mount table: %w", err)
	}
	return table, nil
}

// unescape undoes the kernel's \ooo for space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.ContainsRune(s, '\\') {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// origins returns under which other paths the content of a mount point can be seen.
func (t mountTable) origins(point string) ([]string, error) {
	var self *mount
	for i := range t {
		if t[i].point == point {
			self = &t[i] // the last one is on top
		}
	}
	if self == nil {
		return nil, fmt.Errorf("nothing is mounted at %s", point)
	}
	// A file that was deleted while it was mounted.
	root, _ := strings.CutSuffix(self.root, "//deleted")
	var out []string
	for _, m := range t {
		if m.device != self.device || m.point == point {
			continue
		}
		rest, ok := strings.CutPrefix(root, strings.TrimSuffix(m.root, "/"))
		if ok && (rest == "" || rest[0] == '/') {
			out = append(out, filepath.Join(m.point, rest))
		}
	}
	return out, nil
}
