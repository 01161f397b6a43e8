package pool

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"time"

	"atoll.dev/atoll/internal/pool/wire"
)

const (
	// maxRequest bounds what a client may send, requestTimeout how long it may take to.
	maxRequest     = 64 << 10
	requestTimeout = 5 * time.Second
)

// accept serves clients until the listener is closed.
func (p *Pool) accept(ctx context.Context, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				p.log.Error("accepting shims", "error", err)
			}
			return
		}
		p.wg.Go(func() {
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
			defer stop()
			p.serve(ctx, conn)
		})
	}
}

// serve answers one client.
func (p *Pool) serve(ctx context.Context, conn net.Conn) {
	_ = conn.SetReadDeadline(time.Now().Add(requestTimeout))
	var r wire.Request
	if err := json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&r); err != nil {
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.wg.Go(func() {
		// A client says nothing more; the end of the connection is all that can come.
		_, _ = conn.Read(make([]byte, 1))
		cancel()
	})
	var answer any
	switch {
	case r.Op == wire.OpStatus:
		status := make(chan wire.Status, 1)
		p.send(ctx, func() { status <- p.snapshot() })
		select {
		case answer = <-status:
		case <-ctx.Done():
			return
		}
	case r.Op == wire.OpTake && r.Assignment != nil && r.Assignment.Sandbox != "":
		taken := &request{assignment: *r.Assignment, answer: make(chan wire.Taken, 1), gone: ctx.Done()}
		p.send(ctx, func() { p.queue = append(p.queue, taken) })
		select {
		case answer = <-taken.answer:
		case <-ctx.Done():
			p.send(context.WithoutCancel(ctx), func() {}) // the loop drops the request
			return
		}
	default:
		answer = wire.Taken{Error: "unknown request"}
	}
	_ = json.NewEncoder(conn).Encode(answer) // a client that is gone does not care
}
