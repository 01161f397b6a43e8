package guestagent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
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

// resync is how long the answer to a synchronisation may take before another one is sent. Before an agent runs they
// only pile up.
const resync = 5 * time.Second

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
	if err := c.ask(name, args); err != nil {
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

// bind makes reading and writing end with the context.
func (c *Client) bind(ctx context.Context) (stop func()) {
	_ = c.conn.SetDeadline(time.Time{})
	end := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	return func() { end() }
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
// what no agent reads now, one that is started later would carry out.
func (c *Client) sync() error {
	if c.synced.IsZero() || time.Since(c.synced) > resync {
		c.id++
		c.synced = time.Now()
		message := fmt.Appendf([]byte{delimiter}, `{"execute":"guest-sync-delimited","arguments":{"id":%d}}`+"\n", c.id)
		if _, err := c.conn.Write(message); err != nil {
			return err
		}
	}
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
func (c *Client) ask(name string, args any) error {
	if err := c.sync(); err != nil {
		return err
	}
	return c.send(name, args)
}
