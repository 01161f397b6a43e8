package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	good := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": `{"return": 1}`, "guest-fsfreeze-thaw": `{"return": 1}`}
	refusing := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": `{"error": {"desc": "busy"}}`, "guest-fsfreeze-thaw": `{"return": 0}`}
	stuck := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-freeze": `{"return": 1}`, "guest-fsfreeze-thaw": `{"error": {"desc": "frozen for good"}}`}
	silent := map[string]string{"guest-ping": `{"return": {}}`, "guest-fsfreeze-thaw": `{"return": 1}`}
	both := []string{"guest-ping", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"}
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
		{"tries, stays frozen", machinev1.TrySoft, stuck, both, "frozen for good"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent, asked := answering(t, c.answers)
				err := Flush(context.WithoutCancel(t.Context()), agent, c.mode)
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
