package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`

// server is a QEMU that answers what a test tells it to.
type server struct {
	t    *testing.T
	conn *net.UnixConn
	dec  *json.Decoder

	mu    sync.Mutex // guards files
	files []*os.File
}

// start makes a client and the server it talks to.
func start(t *testing.T, onEvent func(Event)) (*Client, *server) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		conns[i] = c.(*net.UnixConn)
	}
	s := &server{t: t, conn: conns[1]}
	s.dec = json.NewDecoder(s)
	c := New(conns[0], onEvent)
	t.Cleanup(func() {
		_ = c.Close()
		_ = s.conn.Close()
		for _, f := range s.files {
			_ = f.Close()
		}
	})
	return c, s
}

// Read implements io.Reader and keeps files that come along.
func (s *server) Read(p []byte) (int, error) {
	oob := make([]byte, 64)
	n, oobn, _, _, err := s.conn.ReadMsgUnix(p, oob)
	if err == nil && n == 0 {
		return 0, io.EOF
	}
	messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m)
		s.mu.Lock()
		for _, fd := range fds {
			s.files = append(s.files, os.NewFile(uintptr(fd), "passed"))
		}
		s.mu.Unlock()
	}
	return n, err
}

func (s *server) say(lines ...string) {
	s.t.Helper()
	if _, err := io.WriteString(s.conn, strings.Join(lines, "\r\n")+"\r\n"); err != nil {
		s.t.Error(err)
	}
}

// next is the next command as compact JSON.
func (s *server) next() string {
	s.t.Helper()
	var raw json.RawMessage
	if err := s.dec.Decode(&raw); err != nil {
		s.t.Error(err)
	}
	return string(raw)
}

func TestGreeting(t *testing.T) {
	c, s := start(t, nil)
	s.say(greeting)
	g, err := c.Greeting(t.Context())
	if err != nil || g.Version() != "7.2.22 Debian" {
		t.Fatalf("%v, %v", g, err)
	}
	s.say(greeting)
	<-c.Done()
	if err := c.Err(); err == nil || !strings.Contains(err.Error(), "second greeting") {
		t.Errorf("a second greeting: %v", err)
	}
}

func TestExecute(t *testing.T) {
	c, s := start(t, nil)
	go func() {
		s.say(greeting)
		if got := s.next(); got != `{"execute":"query-x","arguments":{"a":1}}` {
			t.Errorf("got %s", got)
		}
		s.say(`{"return": {"b": 2}}`)
	}()
	var result struct{ B int }
	if err := c.Execute(t.Context(), "query-x", map[string]int{"a": 1}, &result); err != nil || result.B != 2 {
		t.Fatalf("%+v, %v", result, err)
	}
}

func TestRunReturnsFirstErrorAfterAllReplies(t *testing.T) {
	c, s := start(t, nil)
	go func() {
		for range 3 {
			s.next()
		}
		s.say(
			`{"return": {}}`,
			`{"error": {"class": "GenericError", "desc": "no such node"}}`,
			`{"error": {"class": "CommandNotFound", "desc": "later"}}`,
		)
	}()
	err := c.Run(t.Context(), Command{Name: "a"}, Command{Name: "b"}, Command{Name: "c"})
	var e *Error
	if !errors.As(err, &e) || e.Command != "b" || e.Class != "GenericError" || e.Desc != "no such node" {
		t.Fatalf("got %v", err)
	}
	if want := "qmp b: GenericError: no such node"; e.Error() != want {
		t.Errorf("text is %q", e)
	}
}

func TestFilePassing(t *testing.T) {
	c, s := start(t, nil)
	var files []*os.File
	for i := range 3 {
		f, err := os.CreateTemp(t.TempDir(), "f")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(strings.Repeat("x", i+1)); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	go func() {
		for range 5 {
			s.next()
		}
		for range 5 {
			s.say(`{"return": {}}`)
		}
	}()
	err := c.Run(
		t.Context(), Command{Name: "x"}, Command{Name: "add-fd", File: files[0]},
		Command{Name: "add-fd", File: files[1]}, Command{Name: "y"}, Command{Name: "add-fd", File: files[2]},
	)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.files) != len(files) {
		t.Fatalf("%d files arrived", len(s.files))
	}
	for i, f := range s.files {
		if st, err := f.Stat(); err != nil || st.Size() != int64(i+1) {
			t.Errorf("file %d: %v, %v", i, st, err)
		}
	}
}

func TestEventsInOrder(t *testing.T) {
	events := make(chan Event, 10)
	_, s := start(t, func(e Event) { events <- e })
	s.say(
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}`,
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}`,
	)
	if e := <-events; e.Name != "STOP" || e.Data != nil {
		t.Errorf("got %+v", e)
	}
	if e := <-events; e.Name != "SHUTDOWN" || string(e.Data) != `{"guest": true}` {
		t.Errorf("got %+v", e)
	}
}

func TestBadPeers(t *testing.T) {
	for name, line := range map[string]string{
		"no json":             "hello",
		"other json":          `{"hello": 1}`,
		"two kinds":           `{"return": {}, "event": "X"}`,
		"unasked reply":       `{"return": {}}`,
		"array":               `[]`,
		"oversized":           `{"event": "` + strings.Repeat("x", MaxMessage) + `"}`,
		"oversized no ending": strings.Repeat("x", MaxMessage+1),
	} {
		t.Run(name, func(t *testing.T) {
			c, s := start(t, nil)
			go func() { _, _ = io.WriteString(s.conn, line+"\n") }()
			<-c.Done()
			if err := c.Err(); err == nil {
				t.Error("no error")
			}
			if err := c.Execute(t.Context(), "x", nil, nil); err == nil {
				t.Error("a command on a dead connection worked")
			}
		})
	}
}

func TestEndsFailCalls(t *testing.T) {
	for name, end := range map[string]func(*Client, *server){
		"qemu ends":    func(_ *Client, s *server) { _ = s.conn.Close() },
		"client close": func(c *Client, _ *server) { _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			c, s := start(t, nil)
			go func() {
				s.next()
				end(c, s)
			}()
			if err := c.Execute(context.Background(), "x", nil, nil); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v", err)
			}
			if _, err := c.Greeting(context.Background()); !errors.Is(err, ErrClosed) {
				t.Errorf("greeting: %v", err)
			}
		})
	}
}

func TestCancelledCallKeepsOrder(t *testing.T) {
	c, s := start(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	go func() {
		s.next()
		s.next()
		s.say(`{"return": 1}`, `{"return": 2}`)
	}()
	var n int
	if err := c.Execute(t.Context(), "next", nil, &n); err != nil || n != 2 {
		t.Fatalf("got the reply %d, %v", n, err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(greeting))
	f.Add([]byte(`{"return": {}, "id": 1}`))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "x"}}`))
	f.Add([]byte(`{"event": "STOP", "timestamp": {"seconds": 1}}`))
	f.Add([]byte(`{"QMP": null}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		m, k, err := decode(line)
		if err != nil {
			return
		}
		ok := map[kind]bool{
			kindGreeting: m.QMP != nil, kindReturn: m.Return != nil,
			kindError: m.Error != nil, kindEvent: m.Event != "",
		}
		if !ok[k] {
			t.Errorf("%q is said to be of kind %d", line, k)
		}
	})
}

func FuzzStream(f *testing.F) {
	f.Add([]byte(greeting + "\r\n" + `{"return": {}}` + "\r\n"))
	f.Add([]byte("\n\n\n"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		c := &Client{ready: make(chan struct{}), done: make(chan struct{})}
		call := &call{name: "x", reply: make(chan reply, 1)}
		c.pending = append(c.pending, call)
		for line := range bytes.Lines(data) {
			if line = bytes.TrimSpace(line); len(line) > 0 && c.handle(line) != nil {
				return
			}
		}
	})
}
