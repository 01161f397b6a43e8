package hardware

import (
	"context"
	"fmt"
	"io"
	"net"

	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Serial opens the first serial port. What the guest printed last comes first. A reader that is too slow
// loses output, the guest never waits. It ends with the machine.
func (m *Machine) Serial() io.ReadWriteCloser { return m.console.Follow() }

// Console returns the last output of the first serial port, at most 64 KiB. The guest wrote it.
func (m *Machine) Console() []byte { return m.console.Tail() }

// Agent is the guest agent's client. It is one for the whole life of the machine.
func (m *Machine) Agent() *guestagent.Client { return m.agent }

// VNC opens the display: a connection that speaks RFB, without authentication. There may be several.
func (m *Machine) VNC(ctx context.Context) (net.Conn, error) {
	const doing = "opening the display"
	ours, theirs, err := qemu.SocketPair()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer theirs.Close()
	m.display.Lock()
	defer m.display.Unlock()
	err = m.do(
		ctx, doing,
		qmp.Command{Name: "getfd", Args: map[string]any{"fdname": "vnc"}, File: theirs},
		qmp.Command{Name: "add_client", Args: map[string]any{"protocol": "vnc", "fdname": "vnc", "skipauth": true}},
	)
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	return ours, nil
}
