// Package guest asks a guest agent about its guest: names, addresses, how far cloud-init is, and what the guest has said
// about itself.
//
// It keeps nothing and decides nothing. internal/shim/machine is its caller. The guest can answer anything: what is
// passed on is bounded and cleaned. What can go wrong: no agent answers (guestagent.ErrNoAgent, ErrNoAgent, ErrSilent).
package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/guestagent"
)

const (
	// Timeout bounds one question.
	Timeout = 5 * time.Second
	// Busy bounds how long an agent that has answered before may take, in a guest or on a host that is busy.
	Busy = time.Minute
	// restTimeout bounds all questions to an agent that has answered one.
	restTimeout = 30 * time.Second
)

// infoDir is where a guest puts what CommandGuestInfo asks for: one file for each key.
const infoDir = "/run/atoll/guestinfo/"

// ErrSilent is what a user is told of an agent that has answered before.
var ErrSilent = errors.New("the guest agent in the machine has answered before and does not now; the guest may be busy or stand still: look at its serial console (kubectl attach), and try again")

// ErrNoAgent is what a user is told.
var ErrNoAgent = errors.New("no guest agent answers in the machine; install and start qemu-guest-agent in the guest, or use the serial console (kubectl attach)")

// Bounds of what a guest says.
const (
	maxInterfaces = 16
	maxAddresses  = 16
	maxName       = 255
	maxResult     = 64 << 10
)

// Within is how long to wait for an agent: not long for one that may not be there.
func Within(agent *guestagent.Client, otherwise time.Duration) time.Duration {
	if agent.Answered() {
		return Busy
	}
	return otherwise
}

// Ping returns nil when the agent answers.
func Ping(ctx context.Context, agent *guestagent.Client) error {
	return ping(ctx, agent, Within(agent, Timeout))
}

func ping(ctx context.Context, agent *guestagent.Client, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return agent.Ping(ctx)
}

// Look asks for everything once; last is what was known before. Only that the agent answers is sure.
func Look(ctx context.Context, agent *guestagent.Client, last *machinev1.Guest) (*machinev1.Guest, error) {
	if err := ping(ctx, agent, Timeout); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, restTimeout)
	defer cancel()
	g := &machinev1.Guest{Agent: true}
	if last != nil {
		*g = *last
		g.Agent = true
	}
	if name, err := agent.Hostname(ctx); err == nil {
		g.Hostname = clean(name)
	}
	if os, err := agent.OS(ctx); err == nil {
		g.OSID, g.OSName, g.Kernel = clean(os.ID), clean(os.PrettyName), clean(os.Kernel)
	}
	if all, err := agent.Interfaces(ctx); err == nil {
		g.Interfaces = interfaces(all)
	}
	if g.CloudInit == "" || g.CloudInit == cloudInitRunning {
		if status, detail := cloudInit(ctx, agent); ctx.Err() == nil { // else nobody knows
			g.CloudInit, g.Detail = status, detail
		}
	}
	return g, nil
}

// Shutdown asks a guest that answers to end, or to restart. That it was asked is all that is known afterwards.
func Shutdown(ctx context.Context, agent *guestagent.Client, how guestagent.ShutdownMode, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if err := agent.Ping(ctx); err != nil {
		return err
	}
	return agent.Shutdown(ctx, how)
}

// Heartbeat returns nil when the agent answers.
func Heartbeat(ctx context.Context, agent *guestagent.Client) error {
	switch err := ping(ctx, agent, Timeout); {
	case err == nil:
		return nil
	case agent.Answered():
		return ErrSilent
	}
	return ErrNoAgent
}

func interfaces(all []guestagent.Interface) []machinev1.GuestInterface {
	var out []machinev1.GuestInterface
	for _, i := range all[:min(len(all), maxInterfaces)] {
		n := machinev1.GuestInterface{Name: clean(i.Name), MAC: clean(i.MAC)}
		for _, a := range i.Addresses[:min(len(i.Addresses), maxAddresses)] {
			n.Addresses = append(n.Addresses, clean(a))
		}
		out = append(out, n)
	}
	return out
}

// clean bounds a text of the guest and takes out what would spoil an output.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\uFFFD' {
			return -1
		}
		return r
	}, s)
	return strings.ToValidUTF8(s[:min(len(s), maxName)], "")
}

// What State says of cloud-init.
const (
	cloudInitRunning = "running"
	cloudInitDone    = "done"
	cloudInitError   = "error"
)

// cloudInit finds out how far cloud-init is by reading the files it leaves, which costs the guest next to nothing.
func cloudInit(ctx context.Context, agent *guestagent.Client) (status, detail string) {
	const dir = "/run/cloud-init/"
	if data, err := read(ctx, agent, dir+"result.json"); err == nil {
		return cloudInitResult(data)
	}
	if _, err := read(ctx, agent, dir+"status.json"); err == nil {
		return cloudInitRunning, ""
	}
	return "", ""
}

// cloudInitResult reads result.json.
func cloudInitResult(data []byte) (status, detail string) {
	var result struct {
		V1 struct {
			Errors []string `json:"errors"`
		} `json:"v1"`
	}
	if err := json.Unmarshal(data, &result); err != nil {
		return "", ""
	}
	if len(result.V1.Errors) > 0 {
		return cloudInitError, clean(result.V1.Errors[0])
	}
	return cloudInitDone, ""
}

// read reads a small file of the guest.
func read(ctx context.Context, agent *guestagent.Client, name string) ([]byte, error) {
	r, err := agent.Exec(ctx, guestagent.Command{Path: "cat", Args: []string{name}})
	switch {
	case err != nil:
		return nil, err
	case r.ExitCode != 0 || r.Signal != 0:
		return nil, errors.New("the guest cannot read it")
	}
	return r.Stdout[:min(len(r.Stdout), maxResult)], nil
}

var infoKey = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Info compares what the guest has said about itself, one file for each key, with regular expressions.
func Info(ctx context.Context, agent *guestagent.Client, args []string) error {
	if len(args) == 0 || len(args)%2 != 0 {
		return fmt.Errorf("%s takes pairs of a key and a regular expression", machinev1.CommandGuestInfo)
	}
	limit, silent := Timeout, ErrNoAgent
	if agent.Answered() {
		limit, silent = restTimeout, ErrSilent
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for i := 0; i < len(args); i += 2 {
		key := args[i]
		if !infoKey.MatchString(key) {
			return fmt.Errorf("%q is no key", key)
		}
		want, err := regexp.Compile(args[i+1])
		if err != nil {
			return fmt.Errorf("value of %s: %w", key, err)
		}
		data, err := read(ctx, agent, infoDir+key)
		if errors.Is(err, guestagent.ErrNoAgent) || ctx.Err() != nil {
			return silent
		}
		if err != nil {
			return fmt.Errorf("the guest has not set %s (file %s%s)", key, infoDir, key)
		}
		if !want.MatchString(strings.TrimRight(string(data), "\r\n")) {
			return fmt.Errorf("%s is %q and does not match %q", key, clean(string(data)), args[i+1])
		}
	}
	return nil
}
