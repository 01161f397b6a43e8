package attach_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir/attach"
)

// serve answers "status" and returns the socket.
func serve(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := attach.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("serving ended with %v", err)
		}
	})
	go func() {
		done <- attach.Serve(ctx, l, map[string]attach.Handler{
			attach.MethodStatus: attach.Handle(func(ctx context.Context, r attach.VolumeRequest) (attach.Status, error) {
				switch r.Volume {
				case "v":
					return attach.Status{Layers: []string{"a", "b"}, Size: 7}, nil
				case "slow":
					<-ctx.Done()
					return attach.Status{}, ctx.Err()
				}
				return attach.Status{}, attach.ErrNotFound
			}),
			"echo": attach.Stream(func(_ context.Context, greeting string) (func(net.Conn), error) {
				if greeting == "" {
					return nil, errors.New("no greeting")
				}
				return func(conn net.Conn) {
					_, _ = io.WriteString(conn, "\n"+greeting)
					_, _ = io.Copy(conn, conn)
				}, nil
			}),
		})
	}()
	return socket
}

func TestCall(t *testing.T) {
	socket := serve(t)
	var st attach.Status
	call := func(method, volume string) error {
		return attach.Call(t.Context(), socket, method, attach.VolumeRequest{Volume: volume}, &st)
	}
	if err := call(attach.MethodStatus, "v"); err != nil || len(st.Layers) != 2 || st.Size != 7 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := call(attach.MethodStatus, "w"); !errors.Is(err, attach.ErrNotFound) {
		t.Errorf("an unknown volume: %v", err)
	}
	var refused *attach.Error
	if err := call("nonsense", "v"); !errors.As(err, &refused) || errors.Is(err, attach.ErrNotFound) {
		t.Errorf("an unknown method: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := attach.Call(ctx, socket, attach.MethodStatus, attach.VolumeRequest{Volume: "slow"}, &st); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an answer that does not come: %v", err)
	}
	if err := attach.Call(t.Context(), socket+"x", attach.MethodStatus, attach.VolumeRequest{}, nil); err == nil || errors.As(err, &refused) {
		t.Errorf("nobody there: %v", err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}
}

// TestStream: after the answer the connection is something else's, from its first byte on.
func TestStream(t *testing.T) {
	socket := serve(t)
	conn, err := attach.CallStream(t.Context(), socket, "echo", "hello ")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "world"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, len("\nhello world"))
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "\nhello world" {
		t.Errorf("%q, %v", buf, err)
	}
	var refused *attach.Error
	if _, err := attach.CallStream(t.Context(), socket, "echo", ""); !errors.As(err, &refused) {
		t.Errorf("refused: %v", err)
	}
}

// TestNonsense: what is no request is not answered, and does no harm.
func TestNonsense(t *testing.T) {
	socket := serve(t)
	for _, text := range []string{"\n\n", "{", "[]\n", strings.Repeat("x", 2<<20), `{"method":5}`} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(text))
		_ = conn.(*net.UnixConn).CloseWrite()
		buf := make([]byte, 1)
		if n, err := conn.Read(buf); n > 0 {
			t.Errorf("%.20q was answered: %v", text, err)
		}
		_ = conn.Close()
	}
	if err := attach.Call(t.Context(), socket, attach.MethodStatus, attach.VolumeRequest{Volume: "v"}, nil); err != nil {
		t.Error(err)
	}
}

func TestRecords(t *testing.T) {
	run := t.TempDir()
	r := attach.NewRecords(run)
	if got, err := r.Find("v"); got != nil || err != nil {
		t.Errorf("without a directory: %v, %v", got, err)
	}
	for _, rec := range []attach.Record{{Volume: "v", Pod: "p1", Socket: "s1"}, {Volume: "v", Pod: "p2", Socket: "s2"}, {Volume: "w", Pod: "p1", Socket: "s1"}} {
		if err := r.Put(rec); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := r.Find("v"); len(got) != 2 || err != nil || got[0].PID != os.Getpid() {
		t.Errorf("%+v, %v", got, err)
	}
	if err := r.Remove("v", "p1"); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove("v", "p1"); err != nil {
		t.Errorf("again: %v", err)
	}
	if got, err := r.Find("v"); len(got) != 1 || err != nil || got[0].Pod != "p2" {
		t.Errorf("%+v, %v", got, err)
	}
	// A record of a process that has ended does not count, even if its pid was given away again.
	files, _ := filepath.Glob(filepath.Join(run, "attached/*"))
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Replace(string(data), `"start":`, `"start":1`, 1)
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := r.Find("v"); len(got) != 0 || err != nil {
		t.Errorf("of another process: %+v, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(run, "attached/*")); len(left) != len(files) {
		t.Errorf("of %v these are left: %v; the next shim may be replacing them", files, left)
	}
	if err := os.WriteFile(filepath.Join(run, "attached", filepath.Base(files[0])), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, errV := r.Find("v")
	_, errW := r.Find("w")
	if !errors.Is(errors.Join(errV, errW), attach.ErrRecord) {
		t.Errorf("a damaged record: %v, %v", errV, errW)
	}
}
