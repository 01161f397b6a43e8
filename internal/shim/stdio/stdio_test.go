package stdio

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// end is the guest's side of a stream: in carries what the host writes, out what the host reads.
// Unlike net.Pipe it has two directions that close on their own, as streams have.
type end struct {
	in  *io.PipeReader
	out *io.PipeWriter
}

type hostStream struct {
	io.Reader
	io.Writer
	closeWrite func() error
}

func (h hostStream) Close() error { return h.closeWrite() }

func newStream() (Stream, end) {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	return hostStream{outR, inW, inW.Close}, end{inR, outW}
}

func fifo(t *testing.T, name string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(p, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// start makes an IO whose streams' other ends are returned by descriptor.
func start(t *testing.T, cfg Config) (*IO, map[int]end) {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	ends := map[int]end{}
	err = s.Start(cfg.Terminal, func(fd int) (Stream, error) {
		st, e := newStream()
		ends[fd] = e
		return st, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, ends
}

func TestOutputIsNotLostWhileNobodyReads(t *testing.T) {
	stdout, stderr := fifo(t, "out"), fifo(t, "err")
	s, ends := start(t, Config{Stdout: stdout, Stderr: stderr})
	if _, err := io.WriteString(ends[1].out, "to stdout"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(ends[2].out, "to stderr"); err != nil {
		t.Fatal(err)
	}
	_ = ends[1].out.Close()
	_ = ends[2].out.Close()
	select {
	case <-s.Done():
		t.Fatal("done although nobody has read")
	case <-time.After(20 * time.Millisecond):
	}
	var wg sync.WaitGroup
	for path, want := range map[string]string{stdout: "to stdout", stderr: "to stderr"} {
		wg.Go(func() {
			f, err := os.Open(path)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			got, err := io.ReadAll(f) // ends: the shim closes its end
			if err != nil || string(got) != want {
				t.Errorf("got %q, %v, want %q", got, err, want)
			}
		})
	}
	wg.Wait()
	<-s.Done()
}

func TestBackPressureAndBulk(t *testing.T) {
	stdout := fifo(t, "out")
	s, ends := start(t, Config{Stdout: stdout})
	data := make([]byte, 8<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	written := make(chan int, 1)
	go func() {
		n, _ := ends[1].out.Write(data)
		_ = ends[1].out.Close()
		_ = ends[2].out.Close()
		written <- n
	}()
	select {
	case <-written:
		t.Fatal("8 MiB were taken although nobody reads")
	case <-time.After(50 * time.Millisecond):
	}
	f, err := os.Open(stdout)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	if n := <-written; n != len(data) {
		t.Fatalf("wrote %d", n)
	}
	<-s.Done()
}

func TestStdinSurvivesWriters(t *testing.T) {
	stdin := fifo(t, "in")
	s, ends := start(t, Config{Stdin: stdin})
	for _, part := range []string{"one ", "two"} {
		w, err := os.OpenFile(stdin, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, part); err != nil {
			t.Fatal(err)
		}
		_ = w.Close()
		buf := make([]byte, len(part))
		if _, err := io.ReadFull(ends[0].in, buf); err != nil || string(buf) != part {
			t.Fatalf("got %q, %v", buf, err)
		}
	}
	s.CloseStdin()
	s.CloseStdin()
	if n, err := ends[0].in.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("after CloseStdin: %d, %v", n, err)
	}
}

func TestTerminal(t *testing.T) {
	stdin, stdout := fifo(t, "in"), fifo(t, "out")
	s, ends := start(t, Config{Stdin: stdin, Stdout: stdout, Stderr: "ignored", Terminal: true})
	if len(ends) != 1 {
		t.Fatalf("%d streams", len(ends))
	}
	w, err := os.OpenFile(stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "typed"); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	buf := make([]byte, 5)
	if _, err := io.ReadFull(ends[0].in, buf); err != nil {
		t.Fatal(err)
	}
	s.CloseStdin() // must not end the terminal's output
	if _, err := ends[0].out.Write(buf); err != nil {
		t.Fatal(err)
	}
	_ = ends[0].out.Close()
	f, err := os.Open(stdout)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := io.ReadAll(f); err != nil || string(got) != "typed" {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestSharedFile(t *testing.T) {
	out := filepath.Join(t.TempDir(), "log")
	s, ends := start(t, Config{Stdout: "file://" + out, Stderr: "file://" + out})
	_, _ = io.WriteString(ends[1].out, "a")
	_ = ends[1].out.Close()
	_, _ = io.WriteString(ends[2].out, "b")
	_ = ends[2].out.Close()
	<-s.Done()
	if got, err := os.ReadFile(out); err != nil || len(got) != 2 {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestCloseWhileBlocked(t *testing.T) {
	s, ends := start(t, Config{Stdout: fifo(t, "out"), Stdin: fifo(t, "in")})
	wrote := make(chan struct{})
	go func() {
		_, _ = ends[1].out.Write(make([]byte, 1<<20))
		close(wrote)
	}()
	select {
	case <-wrote:
		t.Fatal("1 MiB was taken")
	case <-time.After(20 * time.Millisecond):
	}
	s.Close()
	s.Close()
	<-wrote
	<-s.Done()
}

func TestOpenErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, cfg := range []Config{{Stdout: "binary:///bin/logger"}, {Stdout: file}, {Stdin: file}} {
		if _, err := Open(cfg); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%+v: got %v", cfg, err)
		}
	}
	if _, err := Open(Config{Stdout: file + "x"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing FIFO: %v", err)
	}
	s, err := Open(Config{Stdout: fifo(t, "out")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Start(false, func(int) (Stream, error) { return nil, net.ErrClosed }); !errors.Is(err, net.ErrClosed) {
		t.Errorf("failing stream: %v", err)
	}
}
