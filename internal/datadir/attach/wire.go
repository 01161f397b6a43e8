package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotFound is wrapped when the other side does not know the volume.
var ErrNotFound = errors.New("volume is not known")

// Error is what the other side says went wrong.
type Error struct{ Text string }

func (e *Error) Error() string { return e.Text }

const (
	// maxMessage bounds a request and an answer: a chain of many layers with their keys.
	maxMessage = 1 << 20
	// readTimeout bounds how long a connection may take to send its request, and to take its answer.
	readTimeout = time.Minute
)

type request struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
}

type answer struct {
	Error    string          `json:"error,omitempty"`
	NotFound bool            `json:"notFound,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
}

// Call calls a method at a socket. result may be nil.
func Call(ctx context.Context, socket, method string, params, result any) error {
	if err := call(ctx, socket, method, params, result); err != nil {
		return fmt.Errorf("%s of a volume: %w", method, err)
	}
	return nil
}

func call(ctx context.Context, socket, method string, params, result any) error {
	raw, err := json.Marshal(params)
	if err != nil {
		return err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var a answer
	err = json.NewEncoder(conn).Encode(request{Method: method, Params: raw})
	if err == nil {
		err = json.NewDecoder(io.LimitReader(conn, maxMessage)).Decode(&a)
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	case a.NotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, &Error{a.Error})
	case a.Error != "":
		return &Error{a.Error}
	case result == nil:
		return nil
	}
	return json.Unmarshal(a.Result, result)
}

// Handler answers one method.
type Handler func(ctx context.Context, params json.RawMessage) (any, error)

// Handle makes a Handler of a function.
func Handle[In, Out any](f func(context.Context, In) (Out, error)) Handler {
	return func(ctx context.Context, params json.RawMessage) (any, error) {
		var in In
		if err := json.Unmarshal(params, &in); err != nil {
			return nil, fmt.Errorf("decoding request: %w", err)
		}
		return f(ctx, in)
	}
}

// Listen makes a socket, in the place of one that is left over.
func Listen(socket string) (*net.UnixListener, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listening: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listening: %w", err), l.Close())
	}
	return l, nil
}

// Serve answers calls until ctx ends, and closes the listener.
func Serve(ctx context.Context, l *net.UnixListener, methods map[string]Handler) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("serving volumes: %w", err)
		}
		wg.Go(func() {
			defer conn.Close()
			serve(ctx, conn, methods)
		})
	}
}

func serve(ctx context.Context, conn *net.UnixConn, methods map[string]Handler) {
	_ = conn.SetReadDeadline(time.Now().Add(readTimeout))
	if !trusted(conn) {
		return
	}
	var r request
	requests := json.NewDecoder(io.LimitReader(conn, maxMessage))
	if err := requests.Decode(&r); err != nil {
		return
	}
	var a answer
	var stream opened
	h, ok := methods[r.Method]
	if !ok {
		a.Error = fmt.Sprintf("no method %q", r.Method)
	} else {
		result, err := h(ctx, r.Params)
		if err == nil {
			if stream, ok = result.(opened); !ok {
				a.Result, err = json.Marshal(result)
			}
		}
		if err != nil {
			a = answer{Error: err.Error(), NotFound: errors.Is(err, ErrNotFound)}
		}
	}
	_ = conn.SetWriteDeadline(time.Now().Add(readTimeout))
	if err := json.NewEncoder(conn).Encode(a); err != nil && stream != nil {
		a.Error = err.Error()
	}
	if stream == nil {
		return
	}
	_ = conn.SetDeadline(time.Time{})
	stream(&rest{Conn: conn, first: after(requests)})
}

// opened is what a handler made by Stream answers: what to do with the connection from then on.
type opened func(net.Conn)

// Stream makes a Handler after whose answer the connection carries something else. What open returns has the
// connection until it returns.
func Stream[In any](open func(context.Context, In) (func(net.Conn), error)) Handler {
	return Handle(func(ctx context.Context, in In) (opened, error) {
		run, err := open(ctx, in)
		return opened(run), err
	})
}

// CallStream calls a method made by Stream and returns the connection.
func CallStream(ctx context.Context, socket, method string, params any) (_ net.Conn, err error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var a answer
	answers := json.NewDecoder(conn)
	err = json.NewEncoder(conn).Encode(request{Method: method, Params: raw})
	if err == nil {
		err = answers.Decode(&a)
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%s: %w", method, err)
	case a.Error != "":
		return nil, fmt.Errorf("%s: %w", method, &Error{a.Error})
	}
	return &rest{Conn: conn, first: after(answers)}, nil
}

// after is what a decoder has read beyond its message, whose last byte is a line feed.
func after(d *json.Decoder) []byte {
	data, err := io.ReadAll(d.Buffered())
	if err != nil { // it is in memory
		return nil
	}
	return bytes.TrimPrefix(data, []byte("\n"))
}

// rest is a connection of which something was read before.
type rest struct {
	net.Conn
	first []byte
}

func (r *rest) Read(p []byte) (int, error) {
	if len(r.first) > 0 {
		n := copy(p, r.first)
		r.first = r.first[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}

// trusted tells whether the peer is of the same user.
func trusted(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && int(cred.Uid) == os.Geteuid()
	})
	return ok && err == nil
}
