// Package supervise keeps goroutine services and child processes running.
//
// A Supervisor starts its services in the order of their dependencies, each
// when those it names are ready, restarts what ends with a growing delay, and
// stops everything in the reverse order. The name of a service is also its
// name in logs, log files and status.
//
// It does not restart a service because another one restarted, does not limit
// resources and knows nothing about what the services do. It is called by the
// roles and by `atoll up`.
//
// What can go wrong: a service that never becomes ready is stopped and started
// again for ever, and those that depend on it wait; the reason is in Snapshot.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Service is one thing to keep running. Exactly one of Run and Process is set.
type Service struct {
	// Name is unique within the supervisor.
	Name string
	// After names services that must be ready before this one is started.
	After []string
	// Run works until ctx ends. Returning earlier, with or without an error,
	// is a failure.
	Run func(ctx context.Context) error
	// Process is a child process that is expected not to end by itself.
	Process *Process
	// Ready returns nil when the service does its work. It is asked often
	// until then. A service without Ready is ready when it runs.
	Ready func(ctx context.Context) error
	// ReadyTimeout is how long the service may take to become ready before it
	// is restarted. Zero means DefaultReadyTimeout.
	ReadyTimeout time.Duration
}

// Defaults of Service and Config.
const (
	DefaultReadyTimeout = 3 * time.Minute
	readyPoll           = 100 * time.Millisecond
)

// State is where a service is in its life.
type State string

// The states of a service:
//
//	waiting -> starting -> ready -> backoff -> starting ...
//	                 \______________/
//	any -> stopping -> stopped
const (
	Waiting  State = "waiting"  // for the services it is to be started after
	Starting State = "starting" // runs, not ready yet
	Ready    State = "ready"
	Backoff  State = "backoff" // ended, waits to be started again
	Stopping State = "stopping"
	Stopped  State = "stopped"
)

// Status is what is known about a service at one moment.
type Status struct {
	Name     string    `json:"name"`
	State    State     `json:"state"`
	PID      int       `json:"pid,omitempty"`
	Since    time.Time `json:"since"`             // of the state
	Started  time.Time `json:"started,omitzero"`  // last start
	ReadyIn  float64   `json:"readyInSeconds"`    // of the last start; 0 until ready
	Restarts int       `json:"restarts"`          // starts but the first
	Error    string    `json:"error,omitempty"`   // why it last ended or is not ready
	LogFile  string    `json:"logFile,omitempty"` // of a child process
}

// Config is what New needs.
type Config struct {
	Services []Service
	Logger   *slog.Logger
	// MinDelay and MaxDelay bound the time between the end of a service and
	// its next start. Zero means 200 ms and 20 s.
	MinDelay, MaxDelay time.Duration
	// OnChange is called, when not nil, after every change of state. Calls for
	// one service are in order.
	OnChange func(Status)
}

// Supervisor keeps services running. Make one with New.
type Supervisor struct {
	cfg     Config
	units   []*unit
	spawner *spawner
}

// unit is a service with its state.
type unit struct {
	Service
	sup    *Supervisor
	status Latest[Status]
	cancel context.CancelFunc
	ctx    context.Context
	done   chan struct{} // closed when the service has ended for good
}

// New checks the services. Each may name only services that come before it in
// the list, so the list is a valid order of starting.
func New(cfg Config) (*Supervisor, error) {
	if cfg.Logger == nil {
		return nil, errors.New("supervisor: no logger")
	}
	if cfg.MinDelay == 0 {
		cfg.MinDelay = 200 * time.Millisecond
	}
	if cfg.MaxDelay == 0 {
		cfg.MaxDelay = 20 * time.Second
	}
	s := &Supervisor{cfg: cfg, spawner: newSpawner()}
	var names []string
	for _, svc := range cfg.Services {
		if svc.Name == "" || slices.Contains(names, svc.Name) {
			return nil, fmt.Errorf("supervisor: service name %q is empty or used twice", svc.Name)
		}
		if (svc.Run == nil) == (svc.Process == nil) {
			return nil, fmt.Errorf("supervisor: service %s needs Run or Process, not both", svc.Name)
		}
		for _, dep := range svc.After {
			if !slices.Contains(names, dep) {
				return nil, fmt.Errorf("supervisor: service %s is after %s, which is not before it in the list", svc.Name, dep)
			}
		}
		if svc.ReadyTimeout == 0 {
			svc.ReadyTimeout = DefaultReadyTimeout
		}
		names = append(names, svc.Name)
		u := &unit{Service: svc, sup: s, done: make(chan struct{})}
		u.ctx, u.cancel = context.WithCancel(context.Background())
		first := Status{Name: svc.Name, State: Waiting, Since: time.Now()}
		if svc.Process != nil {
			first.LogFile = svc.Process.Log
		}
		u.status.Set(first)
		s.units = append(s.units, u)
	}
	return s, nil
}

// Run starts the services and keeps them running until ctx ends, then stops
// them, the last of the list first, and returns nil. It may be called once.
func (s *Supervisor) Run(ctx context.Context) error {
	stopSpawner := s.spawner.start()
	defer stopSpawner()
	var wg sync.WaitGroup
	for _, u := range s.units {
		wg.Go(u.run)
	}
	<-ctx.Done()
	for _, u := range slices.Backward(s.units) {
		u.cancel()
		<-u.done
	}
	wg.Wait()
	return nil
}

// Stop ends one service for good and waits until it has ended or ctx ends. The
// others go on.
func (s *Supervisor) Stop(ctx context.Context, name string) error {
	u, err := s.unit(name)
	if err != nil {
		return err
	}
	u.cancel()
	select {
	case <-u.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stopping %s: %w", name, ctx.Err())
	}
}

// WaitReady waits until the named service is ready.
func (s *Supervisor) WaitReady(ctx context.Context, name string) error {
	u, err := s.unit(name)
	if err != nil {
		return err
	}
	st, err := u.status.Wait(ctx, func(st Status) bool { return st.State == Ready })
	if err != nil {
		return fmt.Errorf("waiting for %s (%s, %s): %w", name, st.State, st.Error, err)
	}
	return nil
}

// Snapshot returns the status of all services, in the order of the list.
func (s *Supervisor) Snapshot() []Status {
	out := make([]Status, 0, len(s.units))
	for _, u := range s.units {
		st, _ := u.status.Get()
		out = append(out, st)
	}
	return out
}

func (s *Supervisor) unit(name string) (*unit, error) {
	for _, u := range s.units {
		if u.Name == name {
			return u, nil
		}
	}
	return nil, fmt.Errorf("no service %q", name)
}
