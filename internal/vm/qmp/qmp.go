// Package qmp speaks the QEMU Machine Protocol over a connected Unix socket.
//
// It is the wire only: greeting, commands, file descriptor passing and events. It knows no
// device, no command and no machine; package vm does. It never dials: the socket is one end of a
// pair whose other end QEMU inherited.
//
// What QEMU sends is bounded and parsed as untrusted, because a guest may have taken QEMU over:
// an oversized line, a reply nobody asked for or bad JSON ends the connection with an error.
//
// Replies are matched to commands by order, which QMP guarantees as long as out-of-band execution
// is not negotiated. That saves the "id" member: QEMU 7.2 reads its monitor one byte per turn of
// its main loop, so short commands are faster commands.
package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
)

// MaxMessage bounds one message from QEMU, in bytes.
const MaxMessage = 1 << 20

// ErrClosed is the cause of every call on a connection that has ended.
var ErrClosed = errors.New("qmp connection closed")

// Error is a failure that QEMU reported for one command.
type Error struct {
	Command string // name of the command that failed
	Class   string // QMP error class, nearly always GenericError
	Desc    string // text for people
}

func (e *Error) Error() string {
	return fmt.Sprintf("qmp %s: %s: %s", e.Command, e.Class, e.Desc)
}

// Event is something QEMU reported on its own.
type Event struct {
	Name string          // for example SHUTDOWN
	Data json.RawMessage // members of the event, may be empty
}

// Greeting says which QEMU is at the other end.
type Greeting struct {
	Major, Minor, Micro int
	Package             string
}

// Version is the version as text, package suffix included, fit to tell two builds apart.
func (g Greeting) Version() string {
	v := fmt.Sprintf("%d.%d.%d", g.Major, g.Minor, g.Micro)
	if g.Package != "" {
		v += " " + g.Package
	}
	return v
}

// message is any line QEMU may send.
type message struct {
	QMP *struct {
		Version struct {
			QEMU struct {
				Major int `json:"major"`
				Minor int `json:"minor"`
				Micro int `json:"micro"`
			} `json:"qemu"`
			Package string `json:"package"`
		} `json:"version"`
	} `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// kind names what a message is; exactly one of the four forms is legal.
type kind int

const (
	kindGreeting kind = iota
	kindReturn
	kindError
	kindEvent
)

// decode parses one line and says which of the four kinds of message it is.
func decode(line []byte) (message, kind, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, 0, fmt.Errorf("parsing qmp message: %w", err)
	}
	n, k := 0, kindGreeting
	if m.QMP != nil {
		n++
	}
	if m.Return != nil {
		n, k = n+1, kindReturn
	}
	if m.Error != nil {
		n, k = n+1, kindError
	}
	if m.Event != "" {
		n, k = n+1, kindEvent
	}
	if n != 1 {
		return message{}, 0, errors.New("parsing qmp message: not a greeting, return, error or event")
	}
	return m, k, nil
}
