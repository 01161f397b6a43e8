// Package socket makes a stream of bytes of a websocket: the console of a virtual machine, at both of its ends.
//
// It opens no connections and decides nothing. internal/kube/subresources serves one, `atoll vm console` and `vnc` use
// one. What can go wrong: the other end is gone, which ends reading, or says why it ends (ErrEnded).
package socket

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	gwebsocket "github.com/gorilla/websocket"
)

// ErrEnded is wrapped when the other end has said that something went wrong, in words of its own.
var ErrEnded = errors.New("the stream ended")

// Stream is a websocket as a stream of bytes; what is written are binary messages. Its methods may be called from several goroutines, Read
// from one at a time.
type Stream struct {
	conn *gwebsocket.Conn
	// within is how long the other end may take to read a message, 0 for ever.
	within time.Duration
	rest   io.Reader

	writing sync.Mutex // guards writes to conn
}

// New takes a websocket over.
func New(conn *gwebsocket.Conn, within time.Duration) *Stream {
	return &Stream{conn: conn, within: within}
}

// Read implements io.Reader.
func (s *Stream) Read(p []byte) (int, error) {
	for {
		if s.rest == nil {
			_, r, err := s.conn.NextReader()
			if ended, ok := errors.AsType[*gwebsocket.CloseError](err); ok {
				if ended.Code == gwebsocket.CloseNormalClosure || ended.Code == gwebsocket.CloseGoingAway {
					return 0, io.EOF
				}
				return 0, fmt.Errorf("%w: %s", ErrEnded, ended.Text)
			}
			if err != nil {
				return 0, err
			}
			s.rest = r
		}
		n, err := s.rest.Read(p)
		if errors.Is(err, io.EOF) {
			s.rest, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// Write implements io.Writer.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.within > 0 {
		if err := s.conn.SetWriteDeadline(time.Now().Add(s.within)); err != nil {
			return 0, err
		}
	}
	if err := s.conn.WriteMessage(gwebsocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close implements io.Closer.
func (s *Stream) Close() error { return s.conn.Close() }
