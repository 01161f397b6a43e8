package container

import (
	"bufio"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxPasswd bounds how much of a container's /etc/passwd is read.
const maxPasswd = 1 << 20

// home looks up a user's home directory in the /etc/passwd of the first root that has one, unless
// the environment names it. The file is the user's: it is opened without leaving the root and read
// with a bound.
func home(roots []string, p *specs.Process) string {
	for _, kv := range p.Env {
		if strings.HasPrefix(kv, "HOME=/") {
			return ""
		}
	}
	for _, root := range roots {
		fd, err := openIn(root, "/etc/passwd", unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			continue
		}
		f := os.NewFile(uintptr(fd), "passwd")
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return ""
		}
		return parseHome(io.LimitReader(f, maxPasswd), p.User.UID)
	}
	return ""
}

func parseHome(r io.Reader, uid uint32) string {
	s := bufio.NewScanner(r)
	want := strconv.FormatUint(uint64(uid), 10)
	for s.Scan() {
		f := strings.Split(s.Text(), ":")
		if len(f) >= 6 && f[2] == want && strings.HasPrefix(f[5], "/") {
			return f[5]
		}
	}
	return ""
}
