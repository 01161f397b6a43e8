// Package events tells containerd what happens to the tasks of a pod.
//
// It forwards events, in order, to containerd's ttrpc events service, and keeps them while containerd
// is away: containerd may restart while pods run. It is not the source of truth; containerd also asks
// (Wait, State). internal/shim/task publishes, the shim's daemon runs the Publisher.
//
// What can go wrong: containerd stays away and events pile up. Beyond MaxPending the oldest are
// dropped, which is logged.
package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// MaxPending bounds the events kept for a containerd that is away.
const MaxPending = 1024

const (
	callTimeout = 5 * time.Second
	firstRetry  = 100 * time.Millisecond
	lastRetry   = 5 * time.Second
	// idle is how long a connection without events is kept: each costs memory in both processes.
	idle = 10 * time.Second
)

// Publisher sends events. Make one with New; Run sends what Publish takes.
type Publisher struct {
	address string

	mu        sync.Mutex // guards the fields below
	namespace string
	pending   []*types.Envelope
	dropped   int
	wake      chan struct{} // buffered, has a token when pending is not empty
}

// New makes a publisher for containerd's ttrpc address: a path, or a path with "unix://" before it.
func New(address, namespace string) *Publisher {
	return &Publisher{
		address: strings.TrimPrefix(address, "unix://"), namespace: namespace,
		wake: make(chan struct{}, 1),
	}
}

// Publish takes an event to send. It never blocks.
func (p *Publisher) Publish(event proto.Message) {
	env, err := envelope(event, time.Now())
	if err != nil {
		slog.Error("cannot publish event", "error", err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	env.Namespace = p.namespace
	if len(p.pending) >= MaxPending {
		p.pending = p.pending[1:]
		p.dropped++
	}
	p.pending = append(p.pending, env)
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// envelope wraps an event with its topic.
func envelope(event proto.Message, now time.Time) (*types.Envelope, error) {
	topic, err := topicOf(event)
	if err != nil {
		return nil, err
	}
	value, err := proto.Marshal(event)
	if err != nil {
		return nil, fmt.Errorf("encoding event: %w", err)
	}
	return &types.Envelope{
		Timestamp: timestamppb.New(now),
		Topic:     topic,
		// containerd's type URLs are plain names, without a host.
		Event: &anypb.Any{TypeUrl: string(event.ProtoReflect().Descriptor().FullName()), Value: value},
	}, nil
}

// topicOf is containerd's core/runtime.GetTopic.
func topicOf(event proto.Message) (string, error) {
	switch event.(type) {
	case *apievents.TaskCreate:
		return "/tasks/create", nil
	case *apievents.TaskStart:
		return "/tasks/start", nil
	case *apievents.TaskOOM:
		return "/tasks/oom", nil
	case *apievents.TaskExit:
		return "/tasks/exit", nil
	case *apievents.TaskDelete:
		return "/tasks/delete", nil
	case *apievents.TaskExecAdded:
		return "/tasks/exec-added", nil
	case *apievents.TaskExecStarted:
		return "/tasks/exec-started", nil
	}
	return "", fmt.Errorf("event %T has no topic", event)
}

// Run sends events until ctx ends.
func (p *Publisher) Run(ctx context.Context) error {
	c := &connection{address: p.address}
	defer c.close()
	retry := firstRetry
	for {
		env := p.next()
		if env == nil {
			select {
			case <-p.wake:
			case <-time.After(idle):
				c.close()
				select {
				case <-p.wake:
				case <-ctx.Done():
					return ctx.Err()
				}
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		err := c.forward(context.WithoutCancel(ctx), env)
		if err == nil {
			p.sent(env)
			retry = firstRetry
			continue
		}
		slog.Warn("publishing event", "topic", env.Topic, "error", err)
		select {
		case <-time.After(retry):
			retry = min(2*retry, lastRetry)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Flush waits until everything is sent, or ctx ends.
func (p *Publisher) Flush(ctx context.Context) {
	const interval = 10 * time.Millisecond
	for p.waiting() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(interval):
		}
	}
}

func (p *Publisher) waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pending)
}

// next is the oldest event, which stays pending until it is sent.
func (p *Publisher) next() *types.Envelope {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dropped > 0 {
		slog.Error("events were dropped while containerd was away", "count", p.dropped)
		p.dropped = 0
	}
	if len(p.pending) == 0 {
		return nil
	}
	return p.pending[0]
}

// sent removes an event, which Publish may have dropped in the meantime.
func (p *Publisher) sent(env *types.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.pending) > 0 && p.pending[0] == env {
		p.pending[0] = nil
		p.pending = p.pending[1:]
	}
	if len(p.pending) == 0 {
		p.pending = nil
	}
}

// connection is the connection to containerd, made when needed.
type connection struct {
	address string
	client  *ttrpc.Client
}

func (c *connection) forward(ctx context.Context, env *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for {
		fresh := c.client == nil
		if fresh {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.address)
			if err != nil {
				return fmt.Errorf("connecting to containerd: %w", err)
			}
			c.client = ttrpc.NewClient(conn)
		}
		_, err := api.NewTTRPCEventsClient(c.client).Forward(ctx, &api.ForwardRequest{Envelope: env})
		if err == nil {
			return nil
		}
		c.close()
		if fresh || !errors.Is(err, ttrpc.ErrClosed) {
			return fmt.Errorf("forwarding to containerd: %w", err)
		}
		// The connection was to a containerd that is gone: try the next one at once.
	}
}

func (c *connection) close() {
	if c.client != nil {
		_ = c.client.Close()
		c.client = nil
	}
}
