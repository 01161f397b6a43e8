package guestagent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of what an agent may answer.
const (
	maxAnswer = 1 << 20  // bytes of an answer
	maxStatus = 12 << 20 // bytes of one with the output of a command
	maxSkip   = 64 << 20 // bytes that are passed over while waiting for an answer
	maxDepth  = 16       // of nested values
	maxText   = 256      // bytes of a text that is kept
	maxItems  = 64       // of a list that is kept
)

// delimiter begins a synchronised exchange: a byte that JSON cannot have, so that both sides know where they are.
const delimiter = 0xff

// How long the answer to a synchronisation may take before another one is sent: at first, and at most. Before an agent
// runs they only pile up. It grows, since an agent that always takes longer would always be asked something newer.
const (
	resyncFirst = 5 * time.Second
	resyncMost  = 20 * time.Second
	// lookFor is long enough to read what has come.
	lookFor = 10 * time.Millisecond
)

// Error is the agent's refusal.
type Error struct {
	Command string
	Class   string // GenericError, CommandNotFound
	Desc    string
}

func (e *Error) Error() string { return fmt.Sprintf("guest agent: %s: %s", e.Command, e.Desc) }

// call runs one command and decodes its answer into result unless that is nil.
func (c *Client) call(ctx context.Context, name string, args, result any) error {
	return c.exchange(ctx, name, args, result, maxAnswer)
}

func (c *Client) exchange(ctx context.Context, name string, args, result any, limit int) error {
	if err := c.lock(ctx); err != nil {
		return fmt.Errorf("guest agent: %s: %w", name, err)
	}
	defer c.unlock()
	stop := c.bind(ctx)
	defer stop()
	if err := c.ask(ctx, name, args); err != nil {
		return c.failure(ctx, name, err)
	}
	line, err := c.line(limit)
	if err != nil {
		return c.failure(ctx, name, err)
	}
	return decode(name, line, result)
}

// lock waits for its turn.
func (c *Client) lock(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: waiting for another command: %w", ErrNoAgent, ctx.Err())
	}
}

func (c *Client) unlock() { <-c.turn }

// bind makes reading and writing end with the context. Once stop has returned, that context ends nobody else's.
func (c *Client) bind(ctx context.Context) (stop func()) {
	_ = c.conn.SetDeadline(time.Time{})
	ended := make(chan struct{})
	end := context.AfterFunc(ctx, func() {
		_ = c.conn.SetDeadline(time.Unix(1, 0))
		close(ended)
	})
	return sync.OnceFunc(func() {
		if !end() {
			<-ended
		}
	})
}

// failure says what a failed exchange means.
func (c *Client) failure(ctx context.Context, name string, err error) error {
	switch {
	case errors.Is(err, ErrAnswer):
	case ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("%w: %w", ErrNoAgent, ctx.Err())
	default:
		err = fmt.Errorf("%w: %w", ErrNoAgent, err)
	}
	return fmt.Errorf("guest agent: %s: %w", name, err)
}

// send writes a command.
func (c *Client) send(name string, args any) error {
	data, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{name, args})
	if err != nil {
		return err
	}
	_, err = c.conn.Write(append(data, '\n'))
	return err
}

// sync finds out that an agent runs, and passes over what is left of earlier exchanges. Nothing else is sent before:
// what no agent reads now, one that is started later would carry out. What a guest that was reset has never read is sent
// again.
func (c *Client) sync(ctx context.Context) error {
	for {
		if c.heard() {
			return nil
		}
		if err := c.hello(); err != nil {
			return err
		}
		_ = c.conn.SetReadDeadline(c.synced.Add(c.resync))
		err := ctx.Err() // its end may have come before the line above
		if err == nil {
			err = c.answered()
		}
		if ctx.Err() != nil {
			return os.ErrDeadlineExceeded
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			_ = c.conn.SetReadDeadline(time.Time{})
			if err == nil && ctx.Err() != nil {
				return os.ErrDeadlineExceeded
			}
			return err
		}
	}
}

// heard tells whether the answer to a synchronisation that is overdue has come while nobody listened.
func (c *Client) heard() bool {
	if c.synced.IsZero() || time.Since(c.synced) < c.resync {
		return false
	}
	_ = c.conn.SetReadDeadline(time.Now().Add(lookFor))
	return c.answered() == nil
}

// hello sends a synchronisation unless one is underway that may still be answered.
func (c *Client) hello() error {
	next := resyncFirst
	if !c.synced.IsZero() {
		if time.Since(c.synced) < c.resync {
			return nil
		}
		next = min(2*c.resync, resyncMost)
	}
	now := time.Now()
	message := fmt.Appendf([]byte{delimiter}, `{"execute":"guest-sync-delimited","arguments":{"id":%d}}`+"\n", c.id+1)
	if _, err := c.conn.Write(message); err != nil {
		return err
	}
	c.id, c.synced, c.resync = c.id+1, now, next
	return nil
}

// answered waits for the answer to the last synchronisation.
func (c *Client) answered() error {
	for skipped := 0; skipped < maxSkip; {
		line, err := c.line(maxStatus)
		if err != nil && !errors.Is(err, ErrAnswer) {
			return err
		}
		skipped += len(line) + 1
		at := bytes.LastIndexByte(line, delimiter)
		var answer struct {
			Return int64 `json:"return"`
		}
		if at >= 0 && json.Unmarshal(line[at+1:], &answer) == nil && answer.Return == c.id {
			c.synced = time.Time{}
			c.ever.Store(true)
			return nil
		}
	}
	return fmt.Errorf("%w: %d bytes that nobody asked for", ErrAnswer, maxSkip)
}

// line reads a line without its end. One that is too long is passed over and is an error.
func (c *Client) line(limit int) ([]byte, error) {
	var line []byte
	for n := 0; ; {
		part, err := c.in.ReadSlice('\n')
		n += len(part)
		if len(line)+len(part) <= limit {
			line = append(line, part...)
		} else {
			line = line[:0:0]
		}
		switch {
		case err == nil && n > limit:
			return line, fmt.Errorf("%w: %d bytes", ErrAnswer, n)
		case err == nil:
			return bytes.TrimRight(line, "\r\n"), nil
		case !errors.Is(err, errBufferFull):
			return nil, err
		case n > maxSkip:
			return nil, fmt.Errorf("%w: a line without end", ErrAnswer)
		}
	}
}

// decode takes an answer.
func decode(name string, line []byte, result any) error {
	bad := func(why string) error {
		return fmt.Errorf("guest agent: %s: %w: %s", name, ErrAnswer, why)
	}
	if depth(line) > maxDepth {
		return bad("nested too deeply")
	}
	var answer struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal(line, &answer); err != nil {
		return bad("no JSON")
	}
	switch {
	case answer.Error != nil:
		return &Error{Command: name, Class: text(answer.Error.Class), Desc: text(answer.Error.Desc)}
	case answer.Return == nil:
		return bad("neither a result nor an error")
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(answer.Return, result); err != nil {
		return bad("a result of another kind")
	}
	return nil
}

// depth is how deeply values are nested, at most.
func depth(data []byte) int {
	deepest, now, inside := 0, 0, false
	for i := 0; i < len(data); i++ {
		switch b := data[i]; {
		case inside && b == '\\':
			i++
		case b == '"':
			inside = !inside
		case inside:
		case b == '{' || b == '[':
			now++
			deepest = max(deepest, now)
		case b == '}' || b == ']':
			now--
		}
	}
	return deepest
}

// text makes words of a guest fit to be shown: one line, valid, bounded, without control characters.
func text(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return ' '
		}
		return r
	}, s[:min(len(s), 4*maxText)])
	s = strings.TrimSpace(s)
	for len(s) > maxText {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// ask sends a command once the guest agent is in step. The lock is held.
func (c *Client) ask(ctx context.Context, name string, args any) error {
	if err := c.sync(ctx); err != nil {
		return err
	}
	return c.send(name, args)
}
