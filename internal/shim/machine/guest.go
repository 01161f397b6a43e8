package machine

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/guestagent"
)

const (
	// How often the guest is asked: while nothing answers, while it is young, and later.
	pollBoot  = 3 * time.Second
	pollYoung = 10 * time.Second
	pollLater = time.Minute
	youth     = 5 * time.Minute
	// agentTimeout bounds one question.
	agentTimeout = 5 * time.Second
)

// Bounds of what a guest says.
const (
	maxInterfaces = 16
	maxAddresses  = 16
	maxName       = 255
	maxResult     = 64 << 10
)

// watchGuest asks the guest agent how the guest is, seldom when nothing changes.
func (l *life) watchGuest() {
	began := time.Now()
	missed := 0
	for {
		g, err := l.look()
		st := l.s.board.get()
		wait := pollLater
		switch {
		case err == nil:
			missed = 0
			l.s.board.update(func(st *machinev1.State) { st.Guest = g })
			if time.Since(began) < youth {
				wait = pollYoung
			}
		default:
			const enough = 3 // the agent may be busy with a command
			if missed++; missed >= enough && st.Guest != nil && st.Guest.Agent {
				l.s.board.update(func(st *machinev1.State) {
					last := *st.Guest
					last.Agent = false
					st.Guest = &last
				})
			}
			wait = pollBoot
			if time.Since(began) > youth {
				wait = pollYoung
			}
		}
		select {
		case <-time.After(wait):
		case <-l.ctx.Done():
			return
		}
	}
}

// look asks for everything once. Only that the agent answers is sure.
func (l *life) look() (*machinev1.Guest, error) {
	ctx, cancel := context.WithTimeout(l.ctx, agentTimeout)
	defer cancel()
	agent := l.hw.Agent()
	if err := agent.Ping(ctx); err != nil {
		return nil, err
	}
	g := &machinev1.Guest{Agent: true}
	if last := l.s.board.get().Guest; last != nil {
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
		g.CloudInit, g.Detail = cloudInit(ctx, agent)
	}
	return g, nil
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
