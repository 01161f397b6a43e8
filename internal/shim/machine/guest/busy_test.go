package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/guestagent"
)

// busy is the agent of a guest in which each answer takes a while, and each file says the same. After some answers it
// says no more, unless they are 0.
func busy(t *testing.T, slow time.Duration, answers int, file string) *guestagent.Client {
	mine, theirs := net.Pipe()
	lines := make(chan []byte, 100) // what is said meanwhile piles up
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(theirs); in.Scan(); {
			lines <- bytes.TrimLeft([]byte(in.Text()), "\xff")
		}
	}()
	go func() {
		for line := range lines {
			var c struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if json.Unmarshal(line, &c) != nil {
				continue
			}
			answer := map[string]string{
				"guest-sync-delimited":         fmt.Sprintf("\xff{\"return\": %d}", c.Arguments.ID),
				"guest-get-host-name":          `{"return": {"host-name": "db"}}`,
				"guest-get-osinfo":             `{"return": {"id": "tiny"}}`,
				"guest-network-get-interfaces": `{"return": []}`,
				"guest-exec":                   `{"return": {"pid": 7}}`,
				"guest-exec-status":            fmt.Sprintf(`{"return": {"exited": true, "exitcode": 0, "out-data": %q}}`, base64.StdEncoding.EncodeToString([]byte(file))),
			}[c.Execute]
			if answer == "" {
				answer = `{"return": {}}`
			}
			if answers--; answers == 0 {
				return
			}
			time.Sleep(slow)
			if _, err := fmt.Fprintln(theirs, answer); err != nil {
				return
			}
		}
	}()
	agent := guestagent.New(mine)
	t.Cleanup(func() { _ = agent.Close(); _ = theirs.Close() })
	return agent
}

// TestLookBusy: a guest that takes a second for each answer is known all the same.
func TestLookBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, err := Look(context.WithoutCancel(t.Context()), busy(t, time.Second, 0, `{"v1":{"errors":[]}}`), nil)
		if err != nil || g.Hostname != "db" || g.OSID != "tiny" || g.CloudInit != cloudInitDone {
			t.Errorf("%+v, %v", g, err)
		}
	})
	synctest.Test(t, func(t *testing.T) { // it falls silent after its name: what was known stays
		last := &machinev1.Guest{Hostname: "was", OSID: "was", CloudInit: cloudInitRunning}
		g, err := Look(context.WithoutCancel(t.Context()), busy(t, time.Second, 5, ""), last)
		if err != nil || g.Hostname != "db" || g.OSID != "was" || g.CloudInit != cloudInitRunning {
			t.Errorf("%+v, %v", g, err)
		}
	})
}

// TestInfoBusy: an agent that has answered before has more time than one that may not be there.
func TestInfoBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.WithoutCancel(t.Context())
		agent := busy(t, 3*time.Second, 0, "yes\n")
		if err := Info(ctx, agent, []string{"ready", "^yes$"}); !errors.Is(err, ErrNoAgent) {
			t.Errorf("at first: %v", err)
		}
		if err := Info(ctx, agent, []string{"ready", "^yes$"}); err != nil {
			t.Errorf("when it has answered: %v", err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		agent := busy(t, time.Second, 3, "")
		if err := agent.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := Info(context.WithoutCancel(t.Context()), agent, []string{"ready", "^yes$"}); !errors.Is(err, ErrSilent) {
			t.Errorf("when it has fallen silent: %v", err)
		}
		if err := Heartbeat(context.WithoutCancel(t.Context()), agent); !errors.Is(err, ErrSilent) {
			t.Errorf("its heartbeat: %v", err)
		}
	})
}
