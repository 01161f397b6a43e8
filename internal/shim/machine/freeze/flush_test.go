package freeze

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/guestagent"
)

// answering is a guest whose agent answers as told, and notes what it was asked; nil is one without an agent.
func answering(t *testing.T, answers map[string]string) (agent *guestagent.Client, asked *[]string) {
	t.Helper()
	mine, theirs := net.Pipe()
	asked = new([]string)
	go func() {
		in := bufio.NewReader(theirs)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				return
			}
			var c struct {
				Execute   string `json:"execute"`
				Arguments struct {
					ID int64 `json:"id"`
				} `json:"arguments"`
			}
			if answers == nil || json.Unmarshal(bytes.TrimLeft(line, "\xff"), &c) != nil {
				continue
			}
			if c.Execute == "guest-sync-delimited" {
				fmt.Fprintf(theirs, "\xff{\"return\": %d}\n", c.Arguments.ID)
				continue
			}
			*asked = append(*asked, c.Execute)
			if answer := answers[c.Execute]; answer != "" {
				fmt.Fprintln(theirs, answer)
			}
		}
	}()
	agent = guestagent.New(mine)
	t.Cleanup(func() { _ = agent.Close(); _ = theirs.Close() })
	return agent, asked
}

func TestFlush(t *testing.T) {
	const no = `{"error": {"class": "CommandNotFound", "desc": "disabled"}}`
	good := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": `{"return": 1}`, "guest-fsfreeze-thaw": `{"return": 1}`}
	refusing := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": `{"error": {"desc": "busy"}}`, "guest-fsfreeze-thaw": `{"return": 0}`}
	stuck := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": `{"return": 1}`, "guest-fsfreeze-thaw": `{"error": {"desc": "frozen for good"}}`, "guest-fsfreeze-status": `{"return": "frozen"}`}
	unable := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": no, "guest-fsfreeze-thaw": no, "guest-fsfreeze-status": no}
	silent := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-thaw": `{"return": 1}`}
	both := []string{"guest-ping", freeze, thaw}
	for _, c := range []struct {
		name    string
		mode    machinev1.StopMode
		answers map[string]string
		asked   []string
		fails   string
	}{
		{"hard", machinev1.Hard, good, nil, ""},
		{"of an older server", "", good, nil, ""},
		{"soft", machinev1.Soft, good, both, ""},
		{"tries", machinev1.TrySoft, good, both, ""},
		{"soft, refused", machinev1.Soft, refusing, both, "busy; suspendMode TrySoft or Hard"},
		{"tries, refused", machinev1.TrySoft, refusing, both, ""},
		{"soft, nobody there", machinev1.Soft, nil, nil, "no guest agent answers"},
		{"tries, nobody there", machinev1.TrySoft, nil, nil, ""},
		{"tries, freezes and says nothing", machinev1.TrySoft, silent, both, ""},
		{"tries, stays frozen", machinev1.TrySoft, stuck, append(both[:3:3], status), "frozen for good"},
		{"tries, cannot freeze", machinev1.TrySoft, unable, append(both[:3:3], status), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent, asked := answering(t, c.answers)
				gone := make(chan struct{})
				g := New(Config{Agent: agent, Gone: gone, Go: func(f func()) { go f() }, Log: slog.New(slog.DiscardHandler)})
				err := g.Flush(context.WithoutCancel(t.Context()), c.mode)
				close(gone)
				if c.fails == "" && err != nil || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
					t.Errorf("%v, want %q", err, c.fails)
				}
				if !slices.Equal(*asked, c.asked) {
					t.Errorf("asked %q", *asked)
				}
				if c.answers == nil && c.mode == machinev1.Soft && !errors.Is(err, guestagent.ErrNoAgent) {
					t.Errorf("%v", err)
				}
			})
		})
	}
}
