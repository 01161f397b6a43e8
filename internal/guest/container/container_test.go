package container

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sink is a stream that takes what it gets, slowly if asked.
type sink struct {
	pause time.Duration

	mu     sync.Mutex
	buf    bytes.Buffer
	closed bool
}

func (s *sink) Write(p []byte) (int, error) {
	time.Sleep(s.pause)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, io.ErrClosedPipe
	}
	return s.buf.Write(p)
}

func (s *sink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *sink) content() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String(), s.closed
}

func newPipe(t *testing.T) (*output, *os.File) {
	t.Helper()
	theirs, mine, err := pipe(true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = theirs.Close() })
	o := newOutput()
	o.file = mine
	return o, theirs
}

func TestOutputIsCompleteWhenDrained(t *testing.T) {
	o, w := newPipe(t)
	s := &sink{pause: 5 * time.Millisecond}
	o.stream <- s
	go o.run()
	want := strings.Repeat("0123456789", 20000)
	if _, err := io.WriteString(w, want); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	o.drain()
	if got, closed := s.content(); got != want || !closed {
		t.Errorf("%d of %d bytes, closed %v", len(got), len(want), closed)
	}
}

// A process that was left behind holds the pipe: the stream ends, the left one lives.
func TestOutputOfLeftoverProcess(t *testing.T) {
	o, w := newPipe(t)
	s := &sink{}
	o.stream <- s
	go o.run()
	if _, err := io.WriteString(w, "before"); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	o.drain()
	if d := time.Since(start); d < graceEOF*pollDrain/2 {
		t.Errorf("drained after %v", d)
	}
	if got, closed := s.content(); got != "before" || !closed {
		t.Errorf("got %q, closed %v", got, closed)
	}
	// More than a pipe holds: it is read, and dropped.
	if _, err := io.WriteString(w, strings.Repeat("x", 1<<20)); err != nil {
		t.Errorf("left-over process cannot write: %v", err)
	}
}

// TestOutputOfTerminal: what a process writes to its terminal as the last it does is passed on.
func TestOutputOfTerminal(t *testing.T) {
	for range 200 {
		master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := master.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var slave *os.File
		err = raw.Control(func(fd uintptr) {
			if err := unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err != nil {
				t.Error(err)
				return
			}
			r, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
			if errno != 0 {
				t.Error(errno)
				return
			}
			slave = os.NewFile(r, "slave")
		})
		if err != nil || t.Failed() {
			t.Fatal(err)
		}
		o, s := newOutput(), &sink{}
		o.file = master
		o.stream <- s
		go o.run()
		if _, err := io.WriteString(slave, "last words\n"); err != nil {
			t.Fatal(err)
		}
		_ = slave.Close()
		o.drain()
		if got, closed := s.content(); got != "last words\r\n" || !closed {
			t.Fatalf("got %q, closed %v", got, closed)
		}
	}
}

func TestOutputNobodyWants(t *testing.T) {
	o, w := newPipe(t)
	s := &sink{closed: true}
	o.stream <- s
	go o.run()
	if _, err := io.WriteString(w, strings.Repeat("x", 1<<20)); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	o.drain()
}

func TestAttach(t *testing.T) {
	p := newProcess(nil, false, false)
	if p.attach(0, nil) == nil {
		t.Error("stdin without stdin accepted")
	}
	if err := p.attach(1, nil); err != nil {
		t.Error(err)
	}
	if p.attach(1, nil) == nil {
		t.Error("second stdout accepted")
	}
	if newProcess(nil, true, true).attach(1, nil) == nil {
		t.Error("stdout of a terminal accepted")
	}
}

func TestHome(t *testing.T) {
	passwd := "root:x:0:0:root:/root:/bin/sh\nbad\nuser:x:1000:1000::/home/user:/bin/sh\nnone:x:1:1::relative:/x\n"
	for uid, want := range map[uint32]string{0: "/root", 1000: "/home/user", 1: "", 7: ""} {
		if got := parseHome(strings.NewReader(passwd), uid); got != want {
			t.Errorf("%d: %q, want %q", uid, got, want)
		}
	}
}

func TestHomeStaysInRoot(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", root+"/etc/passwd"); err != nil { // a loop inside root, a real file outside
		t.Fatal(err)
	}
	if got := home([]string{root}, &specs.Process{}); got != "" {
		t.Errorf("read the host's passwd: %q", got)
	}
	if err := os.Remove(root + "/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(root+"/etc/passwd", 0o600); err != nil {
		t.Fatal(err)
	}
	if got := home([]string{root}, &specs.Process{}); got != "" {
		t.Errorf("read a fifo: %q", got)
	}
}

func FuzzParseHome(f *testing.F) {
	f.Add("a:b:0:c:d:/e:f", uint32(0))
	f.Fuzz(func(t *testing.T, data string, uid uint32) {
		if h := parseHome(strings.NewReader(data), uid); h != "" && !strings.HasPrefix(h, "/") {
			t.Errorf("home %q", h)
		}
	})
}

// verdict interprets a device program, as the kernel would.
func verdict(code []insn, typ, access, major, minor uint32) int32 {
	var r [6]uint32
	ctx := []uint32{access<<16 | typ, major, minor}
	for pc := 0; pc < len(code); pc++ {
		i := code[pc]
		dst, src := i.regs&15, i.regs>>4
		switch i.code {
		case 0x61:
			r[dst] = ctx[i.off/4]
		case 0xbf:
			r[dst] = r[src]
		case 0xb7:
			r[dst] = uint32(i.imm)
		case 0x57:
			r[dst] &= uint32(i.imm)
		case 0x77:
			r[dst] >>= i.imm
		case 0x55:
			if r[dst] != uint32(i.imm) {
				pc += int(i.off)
			}
		case 0x95:
			return int32(r[0])
		}
	}
	return -1
}

func TestDeviceProgram(t *testing.T) {
	rules := append(usualRules(), deviceRule{typeBlock, 8, 1, accessRead}, deviceRule{typeChar, 10, -1, accessAll})
	code := deviceProgram(rules)
	for _, c := range []struct {
		typ, access, major, minor uint32
		want                      int32
	}{
		{typeChar, accessRead | accessWrite, 1, 3, 1},
		{typeChar, accessWrite, 136, 77, 1},
		{typeChar, accessRead, 1, 1, 0},
		{typeBlock, accessRead, 254, 0, 0},
		{typeBlock, accessMknod, 254, 0, 1},
		{typeBlock, accessRead, 1, 3, 0},
		{typeBlock, accessRead, 8, 1, 1},
		{typeBlock, accessWrite, 8, 1, 0},
		{typeBlock, accessRead | accessWrite, 8, 1, 0},
		{typeChar, accessRead, 10, 229, 1},
		{typeChar, accessRead, 11, 229, 0},
	} {
		if got := verdict(code, c.typ, c.access, c.major, c.minor); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

func TestExtraRules(t *testing.T) {
	major, minor := int64(1), int64(3)
	r := &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
	}}
	if extra, all := extraRules(r, nil); len(extra) != 0 || all {
		t.Errorf("%v %v", extra, all)
	}
	linux := &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}}
	if extra, _ := extraRules(r, linux); len(extra) != 1 || extra[0].minor != 229 {
		t.Errorf("%v", extra)
	}
	r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"})
	if _, all := extraRules(r, nil); !all {
		t.Error("privileged container filtered")
	}
}

// TestGuestDevices lists those of the machine the test runs on.
func TestGuestDevices(t *testing.T) {
	nodes, err := guestDevices("/dev")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, n := range nodes {
		switch {
		case n.Path == "/dev/console", n.Path == "/dev/ptmx", strings.HasPrefix(n.Path, "/dev/pts/"):
			t.Errorf("%s is a container's own", n.Path)
		case n.Path == "/dev/null":
			found = n.Type == "c" && n.Major == 1 && n.Minor == 3 && n.FileMode.Perm() == 0o666 && *n.UID == 0
		}
	}
	if !found {
		t.Errorf("no /dev/null in %v", nodes)
	}
	dir := t.TempDir()
	for _, err := range []error{os.WriteFile(filepath.Join(dir, "file"), nil, 0o600), os.Mkdir(filepath.Join(dir, "pts"), 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if nodes, err := guestDevices(dir); err != nil || len(nodes) != 0 {
		t.Errorf("%v, %v", nodes, err)
	}
	if _, err := guestDevices(filepath.Join(dir, "none")); err == nil {
		t.Error("a directory that is not there has devices")
	}
}
